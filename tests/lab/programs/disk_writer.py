"""What writes to a container's disks all the time in every way, and knows what has to be there; standard library only.

disk_writer.py FOLDER...

Each folder gets a file for each way of writing, with a copy of it in memory. It answers each line that comes to TCP
port 7000 with one JSON object, as workload.py does: what is wrong, what stays the same, how many writes there were.
"""

import ctypes
import json
import mmap
import os
import random
import socket
import sys
import threading
import time
from pathlib import Path

PORT = 7000
PAGE = 4096
FILE_BYTES = 8 << 20
LONGEST_PAGES = 16
PAUSE_S = 0.02
WAYS = ("direct", "mapped", "synced", "buffered")
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class Writer(threading.Thread):
    """One file, written in one way; every fourth time a hole is punched instead."""

    def __init__(self, path: Path, way: str) -> None:
        super().__init__(daemon=True)
        self.path, self.way = path, way
        self.lock, self.writes = threading.Lock(), 0
        self._random = random.Random(str(path))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if way == "direct" else 0), 0o600)
        os.truncate(self._file, FILE_BYTES)
        self._expected = bytearray(FILE_BYTES)
        self._buffer = mmap.mmap(-1, LONGEST_PAGES * PAGE)
        self._mapping = mmap.mmap(self._file, FILE_BYTES) if way == "mapped" else None

    def run(self) -> None:
        while True:
            with self.lock:
                self._write()
                self.writes += 1
            time.sleep(PAUSE_S)

    def difference(self) -> str:
        """Where the file is not what it has to be; empty if it is."""
        with self.lock, memoryview(self._buffer) as view:
            for at in range(0, FILE_BYTES, len(self._buffer)):
                count = os.preadv(self._file, [view], at)
                if count != len(view) or view != memoryview(self._expected)[at : at + count]:
                    return f"{self.path} differs within {len(view)} bytes from {at}"
        return ""

    def _write(self) -> None:
        length = self._random.randint(1, LONGEST_PAGES) * PAGE
        at = self._random.randrange(FILE_BYTES // PAGE - LONGEST_PAGES) * PAGE
        if self._random.random() < 0.25:
            if _libc.fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, at, length) < 0:
                raise OSError(ctypes.get_errno(), "fallocate")
            self._expected[at : at + length] = bytes(length)
            return
        data = self._random.randbytes(length)
        self._expected[at : at + length] = data
        if self._mapping is not None:
            self._mapping[at : at + length] = data
            if self._random.random() < 0.2:
                self._mapping.flush(at, length)
            return
        self._buffer[:length] = data
        with memoryview(self._buffer) as view:
            assert os.pwritev(self._file, [view[:length]], at) == length
        if self.way == "synced":
            os.fsync(self._file)


def main(*folders: str) -> None:
    writers = [Writer(Path(folder) / f"written-{way}", way) for folder in folders for way in WAYS]
    for writer in writers:
        writer.start()

    def facts() -> dict[str, object]:
        wrong = [f"who writes {writer.path} has ended" for writer in writers if not writer.is_alive()]
        return {
            "wrong": wrong + [found for writer in writers if (found := writer.difference())],
            "same": {"files": [str(writer.path) for writer in writers]},
            "grows": {str(writer.path): writer.writes for writer in writers},
        }

    with socket.create_server(("", PORT)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile() as words:
                for _ in words:
                    connection.sendall(json.dumps(facts()).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
