"""Types of the running kernel: where a member of a struct is, and the number of a type, from BTF.

Document: Documentation/bpf/btf.rst. The kernel's structs differ from build to build: BTF is of this very one.
"""

import struct
from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from blockdev.errors import BlockError

KERNEL = Path("/sys/kernel/btf/vmlinux")

STRUCT, UNION, TYPEDEF, FUNCTION = 4, 5, 8, 12
_MAGIC, _VERSION = 0xEB9F, 1
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
# What follows a type's record: a number of bytes, or a number for each of its `vlen` parts.
_TRAILING = {1: 4, 3: 12, 14: 4, 17: 4}
_TRAILING_EACH = {STRUCT: 12, UNION: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_LAST_KIND = 19
# How far a struct without a name may be within another one.
_DEEPEST = 8


class Btf:
    """The types in a BTF blob of this machine's byte order. Raises BlockError for one that it cannot read."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, version, _, header, types_at, types_length, names_at, names_length = _HEADER.unpack_from(data)
        except struct.error as error:
            raise BlockError(f"BTF of {len(data)} bytes is shorter than its header") from error
        if magic != _MAGIC or version != _VERSION:
            raise BlockError(f"not BTF of version {_VERSION} (magic {magic:#x}, version {version})")
        self._types = data[header + types_at : header + types_at + types_length]
        self._names = data[header + names_at : header + names_at + names_length]
        if len(self._types) != types_length or len(self._names) != names_length:
            raise BlockError(f"BTF is cut off after {len(data)} bytes")
        # Types have no index and records of different lengths: number 1 is the first one.
        self._places = array("Q", [0])
        self._places.extend(self._walk())

    def find(self, kind: int, name: str) -> int:
        """The number of the type of that kind and name. Raises BlockError if there is none."""
        wanted = name.encode()
        for number in range(1, len(self._places)):
            name_at, info, _ = _TYPE.unpack_from(self._types, self._places[number])
            if info >> 24 & 31 == kind and self._names.startswith(wanted + b"\0", name_at):
                return number
        raise BlockError(f"this kernel has no type {name} (BTF kind {kind})")

    def offset(self, struct_name: str, member: str) -> int:
        """Bytes from the start of a struct to its member, also one of a struct or union without a name within it.

        Raises BlockError if there is no such member, or it does not begin with a byte.
        """
        try:
            bits = self._bits(self.find(STRUCT, struct_name), member, _DEEPEST)
        except (IndexError, struct.error) as error:
            raise BlockError(f"BTF of struct {struct_name} points outside of it") from error
        if bits is None or bits % 8:
            raise BlockError(f"this kernel's struct {struct_name} has no member {member} that could be read")
        return bits // 8

    def _bits(self, number: int, wanted: str, deeper: int) -> int | None:
        place = self._places[number]
        _, info, _ = _TYPE.unpack_from(self._types, place)
        if info >> 24 & 31 not in (STRUCT, UNION):
            return None
        for index in range(info & 0xFFFF):
            name_at, kind, offset = self._member(place, index)
            # With the kind flag the upper byte is the number of bits of a bit field, else 0.
            bits = offset & 0xFFFFFF if info >> 31 else offset
            if self._names.startswith(wanted.encode() + b"\0", name_at):
                return bits if bits == offset else None
            if self._names[name_at] == 0 and deeper and (inner := self._bits(kind, wanted, deeper - 1)) is not None:
                return bits + inner
        return None

    def _member(self, place: int, index: int) -> tuple[int, int, int]:
        name_at, kind, offset = _MEMBER.unpack_from(self._types, place + _TYPE.size + index * _MEMBER.size)
        return name_at, kind, offset

    def _walk(self) -> Iterator[int]:
        place, types, unpack = 0, self._types, _TYPE.unpack_from
        try:
            while place < len(types):
                yield place
                _, info, _ = unpack(types, place)
                kind = info >> 24 & 31
                if not 0 < kind <= _LAST_KIND:
                    raise BlockError(f"BTF has a type of kind {kind}, which is newer than this program")
                place += 12 + _TRAILING.get(kind, 0) + _TRAILING_EACH.get(kind, 0) * (info & 0xFFFF)
        except struct.error as error:
            raise BlockError("BTF ends in the middle of a type") from error
        if place != len(types):
            raise BlockError("BTF ends in the middle of a type")


@cache
def kernel() -> Btf:
    """The running kernel's types (CONFIG_DEBUG_INFO_BTF). Takes some 50 ms, once. Raises BlockError, OSError."""
    if not KERNEL.exists():
        raise BlockError(f"there is no {KERNEL}: the kernel was built without CONFIG_DEBUG_INFO_BTF")
    return Btf(KERNEL.read_bytes())
