"""What an object of shared memory is called on the wire: `memfd/INODE/NAME` or `sysv/ID`, after `shared/`.

CRIU names the contents of an object by 32 bits of its inode number, which for System V memory is its id. Shared
anonymous memory is a memfd too, named /dev/zero: that is how CRIU dumps and restores it.
"""

import os
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from migrator import wire
from migrator.errors import PeerError
from migrator.memory import ObjectKey

KIND = "shared"
_MEMFD, _SYSV = "memfd", "sysv"
_PREFIX, _DELETED = "/memfd:", " (deleted)"
# Of memfd_create(2).
_LONGEST_NAME = 249
_LONGEST_NUMBER = 10


@dataclass(frozen=True)
class Target:
    """`number` is the inode number, or the id of System V memory; `name` is a memfd's."""

    number: int
    is_system_v: bool
    name: bytes = b""

    def __str__(self) -> str:
        """As on the wire."""
        if self.is_system_v:
            return f"{KIND}/{_SYSV}/{self.number}"
        return f"{KIND}/{_MEMFD}/{self.number}/{quote_from_bytes(self.name, safe='')}"


def internal_device() -> int:
    """The device number of the kernel's own tmpfs, which memfds, shared anonymous and System V memory have."""
    descriptor = os.memfd_create("migrator")
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def of(key: ObjectKey, name: str) -> Target:
    """The target for an object that a tracker has told."""
    if key.is_system_v:
        return Target(key.inode, is_system_v=True)
    plain = name.removesuffix(_DELETED).removeprefix(_PREFIX)
    return Target(key.inode, is_system_v=False, name=os.fsencode(plain))


def parse(rest: str) -> Target:
    """From what follows `shared/`. Raises PeerError."""
    kind, _, tail = rest.partition("/")
    number, _, name = tail.partition("/")
    if number.isascii() and number.isdecimal() and len(number) <= _LONGEST_NUMBER and int(number) < 1 << 32:
        if kind == _SYSV and not name:
            return Target(int(number), is_system_v=True)
        plain = unquote_to_bytes(name)
        if kind == _MEMFD and len(plain) <= _LONGEST_NAME and b"\0" not in plain:
            return Target(int(number), is_system_v=False, name=plain)
    raise PeerError(f"{wire.shown(rest)} is no object of shared memory")
