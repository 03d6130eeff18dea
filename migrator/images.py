"""CRIU's images, where what CRIU writes has to be amended (criu.org/Images; CRIU 4.2)."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from pycriu.images import fdinfo_pb2

from migrator import wire

# An image of which is asked, before it is read, whether there is room in memory for it and what is made of it.
LARGE_BYTES, COPIES = 16 << 20, 8
HEADER_BYTES = 8  # two magic numbers: of all images, and of the kind
_LENGTH = struct.Struct("<I")


def read(path: str | Path) -> bytes:
    """All of an image, which may be a peer's and sparse. Raises FileNotFoundError, PeerError if it is too much."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size > LARGE_BYTES:
            wire.check_memory(COPIES * size)
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def replace(path: str | Path, header: bytes, messages: Sequence[bytes]) -> None:
    """Write another image in its place, in one step: the restorer may be reading it (agent/read_ahead.py)."""
    written = Path(f"{path}.new")
    written.write_bytes(header + joined(messages))
    written.replace(path)


def rearm_timers(images: Path) -> None:
    """Let periodic timerfds go on that expired between the freeze and the dump.

    The kernel starts such a timer again only when it is read, and until then shows none of its time as left: CRIU
    would restore it as one that was never started.
    """
    path = images / "files.img"
    content = path.read_bytes()
    files = [fdinfo_pb2.file_entry.FromString(entry) for entry in entries(content)]
    stopped = [
        entry.tfd
        for entry in files
        if entry.type == fdinfo_pb2.TIMERFD
        and (entry.tfd.isec or entry.tfd.insec)
        and not (entry.tfd.vsec or entry.tfd.vnsec)
        and entry.tfd.ticks
    ]
    if stopped:
        for timer in stopped:
            timer.vsec, timer.vnsec = timer.isec, timer.insec
        replace(path, content[:HEADER_BYTES], [entry.SerializeToString() for entry in files])


def last_errors(log: Path) -> str:
    """The last error lines of a log of CRIU's, for people; empty if there are none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    errors = [line for line in lines if "Error" in line and "RLIMIT_NOFILE" not in line]
    return "".join(f"\n  {line}" for line in errors[-3:])


def entries(content: bytes) -> Iterator[bytes]:
    """The messages of an image, without its header."""
    offset = HEADER_BYTES
    while offset < len(content):
        (length,) = _LENGTH.unpack_from(content, offset)
        offset += _LENGTH.size
        yield content[offset : offset + length]
        offset += length


def joined(messages: Sequence[bytes]) -> bytes:
    """Messages as they follow an image's header."""
    return b"".join([_LENGTH.pack(len(message)) + message for message in messages])
