"""CRIU kept from dumping shared memory that was sent before: it is told that there is nothing but a hole.

CRIU asks by lseek(2) with SEEK_DATA where an object of shared memory has data, and copies that inside the freeze, of
the whole object, whatever its parent dump has (criu/shmem.c, 4.2). `scripts/criu-shim.c` answers with ENXIO for the
objects that are written here.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

FILE = "MIGRATOR_LEFT_OUT"
"""In CRIU's environment: where the file is."""

# st_dev, st_ino, st_ctim of struct stat.
_ENTRY = struct.Struct("=QQqq")


def write(path: Path, objects: Iterable[os.stat_result]) -> None:
    """Before the dump, the objects by their state as it is then: they must not change any more."""
    path.write_bytes(
        b"".join(_ENTRY.pack(item.st_dev, item.st_ino, *divmod(item.st_ctime_ns, 10**9)) for item in objects)
    )
