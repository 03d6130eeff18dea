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
