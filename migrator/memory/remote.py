"""Small reads of another process' memory."""

import errno
import os

from migrator.memory.errors import ProcessGone


def read_bytes(pid: int, address: int, length: int) -> bytes:
    """Up to `length` bytes, fewer where the mapping ends. Raises ProcessGone."""
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error
    try:
        return os.pread(descriptor, length, address)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""  # not mapped
    finally:
        os.close(descriptor)
