"""What must survive a power cut: fsync(2) by path."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Write out a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, and durable on return; its folder's own name is the caller's matter."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(content)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)
