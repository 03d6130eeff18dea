"""Root file system tarballs from anywhere: measured, and unpacked below one folder and nowhere else.

GNU tar does the unpacking (owners, modes, extended attributes, devices). It strips leading slashes, refuses `..`, and
puts off links that lead up or out until everything else is there (tar manual, "Security"), so that nothing is written
through them; hard links cannot leave the folder, which is a file system of its own.
"""

import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from migrator.errors import Cancelled, ExecutionError, InvalidArgument, MigratorError, NotFound, Precondition

AnyProcess = subprocess.Popen[bytes] | subprocess.Popen[str]
PIECE_BYTES = 1 << 20
_HEAD_BYTES = 512
_MAGIC_AT = 257
_DECOMPRESSORS = ((b"\x1f\x8b", ("gzip", "-dc")), (b"\x28\xb5\x2f\xfd", ("zstd", "-dcq")))


class Full(MigratorError):
    """The file system is too small for the tarball."""

    reason = "NO_SPACE"


@dataclass
class Cancel:
    """Lets a caller that has gone end what runs for it."""

    _event: threading.Event = field(default_factory=threading.Event)
    _processes: set[AnyProcess] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """End the programs that run; from any thread."""
        with self._lock:
            self._event.set()
            for process in self._processes:
                process.terminate()

    def check(self) -> None:
        """Raises Cancelled."""
        if self._event.is_set():
            raise Cancelled("the caller has gone: the image was not made")

    @contextmanager
    def covering(self, process: AnyProcess) -> Iterator[None]:
        """The process is ended by `cancel` and in any case at the end of the block."""
        with self._lock:
            self._processes.add(process)
            if self._event.is_set():
                process.terminate()
        try:
            yield
        finally:
            with self._lock:
                self._processes.discard(process)
                if process.poll() is None:
                    process.terminate()
            process.wait()


@dataclass(frozen=True)
class Tarball:
    """A tarball and what decompresses it to standard output; nothing for a plain one."""

    path: Path
    decompressor: tuple[str, ...] = ()


def recognise(path: Path) -> Tarball:
    """Plain, gzip or zstd, by its first bytes. Raises NotFound, InvalidArgument."""
    if not path.is_absolute():
        raise InvalidArgument(f"{str(path)!r} is not an absolute path on the agent's host")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidArgument(f"{path} is not a file")
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path} on the agent's host", reason="FILE_NOT_FOUND") from error
    except OSError as error:
        raise InvalidArgument(f"open {path}: {error.strerror}") from error
    for magic, command in _DECOMPRESSORS:
        if head.startswith(magic):
            return Tarball(path, command)
    if not is_tarball(head):
        raise InvalidArgument(f"{path} is not a tarball: plain, gzip and zstd are understood", reason="NOT_A_TARBALL")
    return Tarball(path)


def is_tarball(head: bytes) -> bool:
    """Whether a file that begins so, with 512 bytes, is a tarball or is compressed as one may be."""
    return head[_MAGIC_AT : _MAGIC_AT + 5] == b"ustar" or head.startswith(tuple(magic for magic, _ in _DECOMPRESSORS))


def measure(source: Tarball, cancel: Cancel, limit_bytes: int) -> int:
    """The size of the uncompressed stream, about what it holds. Raises Precondition (NO_SPACE) above the limit."""
    if not source.decompressor:
        total = source.path.stat().st_size
        _check_limit(source, total, limit_bytes)
        return total
    total = 0
    with _stream(source, cancel) as (process, pipe):
        while piece := os.read(pipe, PIECE_BYTES):
            total += len(piece)
            _check_limit(source, total, limit_bytes)
        _finish(source, process, cancel)
    return total


def unpack(source: Tarball, into: Path, cancel: Cancel) -> None:
    """Extract below `into`, the root of a file system of its own. Raises Full, InvalidArgument, Cancelled."""
    command = [
        "tar",
        "--extract",
        "--file=-",
        f"--directory={into}",
        "--numeric-owner",
        "--same-owner",
        "--same-permissions",
    ]
    command += [
        "--xattrs",
        "--xattrs-include=*",
        "--delay-directory-restore",
        "--warning=no-timestamp",
        "--no-wildcards",
    ]
    with _stream(source, cancel) as (reader, pipe):
        tar = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
        with cancel.covering(tar):
            assert tar.stderr is not None
            words = _tail(tar.stderr.fileno())
            tar.stderr.close()
            code = tar.wait()
        cancel.check()
        if "No space left on device" in words:
            raise Full(f"{source.path} does not fit")
        if code != 0:
            raise InvalidArgument(f"{source.path} cannot be unpacked: {words.strip()[-500:]}", reason="BAD_TARBALL")
        # tar stops at the archive's end mark; only at the end of the stream its checksum is known.
        while reader is not None and os.read(pipe, PIECE_BYTES):
            pass
        _finish(source, reader, cancel)
    if not any(entry.name != "lost+found" for entry in into.iterdir()):
        raise InvalidArgument(f"{source.path} is empty", reason="BAD_TARBALL")


@contextmanager
def _stream(source: Tarball, cancel: Cancel) -> Iterator[tuple["subprocess.Popen[bytes] | None", int]]:
    """The uncompressed bytes as a descriptor, and the process that makes them if there is one."""
    cancel.check()
    with source.path.open("rb") as file:
        if not source.decompressor:
            yield None, file.fileno()
            return
        try:
            process = subprocess.Popen(
                source.decompressor, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError as error:
            raise ExecutionError(f"{source.decompressor[0]} is not installed: run scripts/setup") from error
    assert process.stdout is not None
    with cancel.covering(process), process.stdout as pipe:
        yield process, pipe.fileno()


def _finish(source: Tarball, process: "subprocess.Popen[bytes] | None", cancel: Cancel) -> None:
    code = process.wait() if process is not None else 0
    cancel.check()
    if code != 0:
        raise InvalidArgument(f"{source.path} is damaged: it cannot be decompressed", reason="BAD_TARBALL")


def _check_limit(source: Tarball, total: int, limit_bytes: int) -> None:
    if total > limit_bytes:
        raise Precondition(
            f"no room for {source.path}: it unpacks to more than the {limit_bytes >> 20} MiB that are free",
            reason="NO_SPACE",
        )


def _tail(pipe: int) -> str:
    """The first and last words of a program, however much it says."""
    text = b""
    while piece := os.read(pipe, 65536):
        text = text + piece if len(text) < 4096 else text[:4096] + piece[-4096:]
    return text.decode(errors="replace")
