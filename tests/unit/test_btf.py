"""BTF: made by hand, damaged, and of the running kernel."""

import random
import struct

import pytest

from blockdev import btf
from blockdev.btf import STRUCT, TYPEDEF, UNION, Btf
from blockdev.errors import BlockError

INT, ENUM64 = 1, 19
NAMES = ["", "int", "outer", "first", "inside", "flags", "alias", "after", "number"]


def _name(name: str) -> int:
    return len("".join(f"{before}\0" for before in NAMES[: NAMES.index(name)]))


def _type(name: str, kind: int, size: int, parts: list[tuple[int, int, int]] | None = None, flag: int = 0) -> bytes:
    parts = parts or []
    record = struct.pack("=III", _name(name), flag << 31 | kind << 24 | len(parts), size)
    return record + b"".join(struct.pack("=III", *part) for part in parts)


def _blob() -> bytes:
    types = [
        _type("int", INT, 4) + bytes(4),
        _type("number", ENUM64, 8, [(_name("first"), 1, 0)]),
        # A union without a name, and a struct in which it is.
        _type("", UNION, 8, [(_name("inside"), 1, 0), (_name("alias"), 1, 32)]),
        _type("outer", STRUCT, 24, [(_name("first"), 1, 0), (_name(""), 3, 64), (_name("after"), 1, 128)]),
        _type("flags", STRUCT, 4, [(_name("first"), 1, 3 << 24 | 0), (_name("after"), 1, 16)], flag=1),
        _type("alias", TYPEDEF, 4),
    ]
    names = "".join(f"{name}\0" for name in NAMES).encode()
    body = b"".join(types)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(names)) + body + names


def test_members_are_found_also_in_unions_without_names() -> None:
    types = Btf(_blob())
    assert [types.offset("outer", name) for name in ("first", "inside", "alias", "after")] == [0, 8, 12, 16]
    assert types.offset("flags", "after") == 2
    assert types.find(TYPEDEF, "alias") == 6


def test_what_is_not_there_or_cannot_be_read() -> None:
    types = Btf(_blob())
    for name in ("missing", "fir", "flags"):
        with pytest.raises(BlockError, match="no member"):
            types.offset("outer", name)
    with pytest.raises(BlockError, match="no member first that could be read"):
        types.offset("flags", "first")
    for kind, name in ((STRUCT, "alias"), (TYPEDEF, "outer"), (TYPEDEF, "ali")):
        with pytest.raises(BlockError, match="no type"):
            types.find(kind, name)


def test_damaged_btf_is_refused_or_read_but_never_worse() -> None:
    whole, chance = _blob(), random.Random(1)
    for length in range(len(whole)):
        with pytest.raises(BlockError):
            Btf(whole[:length])
    for _ in range(3000):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            Btf(bytes(damaged)).offset("outer", "inside")
        except BlockError:
            continue


@pytest.mark.skipif(not btf.KERNEL.exists(), reason="this kernel has no BTF")
def test_the_running_kernel() -> None:
    types = btf.kernel()
    assert types.offset("list_head", "prev") == struct.calcsize("P")
    # In an unnamed struct or union since long ago.
    assert types.offset("page", "lru") > 0
    assert types.find(TYPEDEF, "btf_trace_block_rq_complete") > 0
