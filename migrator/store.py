"""Where what arrives is written: volumes, snapshots, memory, shared memory, CRIU's images and the log."""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from blockdev import blocks
from migrator import faults, wire
from migrator.errors import ExecutionError, PeerError
from migrator.files import write_file
from migrator.fill import missing
from migrator.fill import store as page_store
from migrator.fill.store import ADDRESS_END, PAGE_BYTES
from migrator.ports import Reservation
from migrator.shm import targets
from migrator.stream import Digests, Receiver
from migrator.v1 import peer_pb2

# Of a container that may have been another's pid before each; each has a file open here, and one of marks at the end.
MAX_PROCESSES = 8192
# What is kept in the host's memory, and how much of that is stored between two looks at what the host has left.
IN_MEMORY = ("memory", "missing", "image", "images", targets.KIND)
LOOK_BYTES = 32 << 20
PID = re.compile(r"[1-9][0-9]{0,9}")


class Store:
    """The open files of one container on its way in. `live` if it has processes. Pieces of different targets may come
    from different threads."""

    def __init__(self, reservation: Reservation, *, live: bool) -> None:
        self.digests = Digests()
        """Of everything that was stored, by target."""
        self._receiver = Receiver(self.digests)
        self._reservation = reservation
        self._live = live
        self._lock = threading.Lock()
        self._volumes: dict[str, tuple[int, int]] = {}
        self._pool = Path()
        self._memory: dict[Path, int] = {}
        self._unseen_bytes = 0
        self._stack = ExitStack()

    def open(self) -> None:
        """The volumes; nothing of them is stored before."""
        for index, path in enumerate(self._reservation.volumes):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._stack.callback(os.close, descriptor)
            self._volumes[f"volume/{index}"] = descriptor, os.fstat(descriptor).st_size
            self._pool = path.parent

    def volume(self, target: str) -> tuple[int, int] | None:
        """Descriptor and size of an open volume."""
        return self._volumes.get(target)

    def sync(self) -> None:
        """Volumes are on the disk as they are now. Raises OSError."""
        faults.point("destination.sync")
        for descriptor, _ in self._volumes.values():
            os.fdatasync(descriptor)

    def close(self) -> None:
        """Repeatable."""
        self._volumes.clear()
        self._memory.clear()
        self._stack.close()

    def write(self, request: peer_pb2.SendRequest) -> None:
        """Store one piece. Raises PeerError if it is none that is expected, ExecutionError."""
        if len(request.target) > wire.LONGEST_TARGET:
            raise PeerError(f"a target whose name has {len(request.target)} characters", reason="OUT_OF_ORDER")
        try:
            self._write(request)
            if request.data and request.target.partition("/")[0] in IN_MEMORY:
                self._look(request.length)
        except OSError as error:  # a disk that is full, an address beyond what a file can hold
            why = error.strerror
            if error.errno == errno.ENOSPC and request.target.partition("/")[0] == "memory":
                why = "the container has far more memory than when its migration began: try again when it grows no more"
            raise ExecutionError(f"storing a piece of {wire.shown(request.target)}: {why}") from error

    def _write(self, request: peer_pb2.SendRequest) -> None:
        kind, _, name = request.target.partition("/")
        if kind == "volume" and request.target in self._volumes:
            descriptor, size = self._volumes[request.target]
            wire.check_pool(self._pool, len(request.data))
            for piece in self._receiver.pieces(request):
                blocks.write(descriptor, piece, size)
        elif kind == "snapshot" and self._volumes:
            wire.check_pool(self._pool, len(request.data))
            self._reservation.write_snapshot(name, self._receiver.piece(request))
        elif kind == "memory" and self._live and PID.fullmatch(name):
            pieces = self._receiver.pieces(request)
            file = self._memory_file(page_store.path_of, name)
            for piece in pieces:
                blocks.write(file, piece, ADDRESS_END)
        elif request.target == "memory" and self._live:
            self._write_memory(self._receiver.pieces(request))
        elif kind == "missing" and self._live and PID.fullmatch(name):
            missing.make_pipes(self._reservation.memory)
            file = self._memory_file(missing.path_of, name)
            blocks.write(file, self._receiver.piece(request), ADDRESS_END // PAGE_BYTES)
        elif kind == targets.KIND and self._live:
            for piece in self._receiver.pieces(request):
                self._reservation.shared.write(name, piece)
        elif request.target == "images" and self._live:
            for name, content in self._receiver.files(request):
                write_file(self._reservation.images, name, blocks.Piece(0, len(content), content))
        elif kind == "image" and self._live:
            write_file(self._reservation.images, name, self._receiver.piece(request))
        elif request.target == "log":
            log_file = self._reservation.log
            write_file(log_file.parent, log_file.name, self._receiver.piece(request))
        else:
            raise PeerError(f"{wire.shown(request.target)} is nothing that is expected here", reason="OUT_OF_ORDER")

    def _write_memory(self, pieces: Iterable[blocks.Piece]) -> None:
        """Of several processes: one without a length says whose those are that follow."""
        file = None
        for piece in pieces:
            if not piece.length and PID.fullmatch(str(piece.offset)):
                file = self._memory_file(page_store.path_of, str(piece.offset))
            elif file is None:
                raise PeerError("memory that is no process'", reason="OUT_OF_ORDER")
            else:
                blocks.write(file, piece, ADDRESS_END)

    def _look(self, stored_bytes: int) -> None:
        """Nothing else bounds what memfds hold, and a tmpfs may hold more than the host has."""
        with self._lock:
            self._unseen_bytes += stored_bytes
            if self._unseen_bytes < LOOK_BYTES:
                return
            self._unseen_bytes = 0
        wire.check_memory(0)

    def _memory_file(self, path_of: Callable[[Path, int], Path], pid: str) -> int:
        path = path_of(self._reservation.memory, int(pid))
        with self._lock:
            if path not in self._memory:
                if len(self._memory) >= 2 * MAX_PROCESSES:
                    raise PeerError(f"memory of more than {MAX_PROCESSES} processes")
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._stack.callback(os.close, descriptor)
                self._memory[path] = descriptor
            return self._memory[path]
