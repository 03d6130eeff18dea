"""What another host may say: names, lengths and amounts that are refused before anything is made of them."""

import math
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from blockdev import pool
from migrator.errors import InvalidArgument, PeerError
from migrator.v1 import peer_pb2

MIGRATION_NAME = re.compile(r"m-[a-z0-9-]{1,40}")
# A memfd's name is up to 249 bytes, each of which may be three characters on the wire.
LONGEST_TARGET = 1024
# Of one migration: each is a digest and often a file here. CRIU writes some seven images for each process.
MAX_TARGETS = 1 << 16
# Epochs are counted one by one; who leaps further wants the numbers to end.
EPOCH_LEAP = 1 << 32
# 9999-12-31, the last day that a google.protobuf.Timestamp can say.
LATEST_TIME_MS = 253_402_300_799_999
# What a file system keeps for others when pieces are stored in it: a part of it, and no more than so much.
RESERVE_PART, LARGEST_RESERVE_BYTES = 20, 1 << 30
# What the host keeps of its memory.
MEMORY_RESERVE_BYTES = 256 << 20
MOST_STEPS, LONGEST_MS = 64, 1e9
LONGEST_REASON = 1000
_SHOWN = 80


def check_migration(name: str) -> str:
    """The name, if it can be a migration's: it becomes part of paths. Raises InvalidArgument."""
    if not MIGRATION_NAME.fullmatch(name):
        raise InvalidArgument(f"{shown(name)} cannot be a migration's name")
    return name


def check_epoch(epoch: int, known: int) -> None:
    """Whether this may follow the highest epoch that is known here. Raises InvalidArgument; one that is lower may."""
    if not 0 <= epoch <= known + EPOCH_LEAP:
        raise InvalidArgument(f"epoch {epoch} cannot follow {known}")


def check_time(time_ms: int, what: str) -> None:
    """Raises InvalidArgument for what is no moment since 1970 that can be shown."""
    if not 0 <= time_ms <= LATEST_TIME_MS:
        raise InvalidArgument(f"{what} {time_ms} is no time in ms")


def check_room(descriptor: int, wanted_bytes: int) -> None:
    """Whether the file system of this file has so much left for a stranger. Raises PeerError (NO_SPACE)."""
    status = os.fstatvfs(descriptor)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    few_files = status.f_favail < status.f_files // RESERVE_PART  # none are counted where there is no limit
    if few_files or free - wanted_bytes < min(LARGEST_RESERVE_BYTES, total // RESERVE_PART):
        raise PeerError(f"the destination's file system is nearly full: {free >> 20} MiB are left", reason="NO_SPACE")


def check_pool(folder: Path, wanted_bytes: int) -> None:
    """Whether the pool that the folder is in has so much left for a stranger; of one that is a sparse file what is
    under it counts, too. Raises PeerError (NO_SPACE), before containers would have to be paused for it."""
    room = pool.room(folder)
    if wanted_bytes > room.available_bytes:
        free = f"{room.free_bytes >> 20} MiB are left"
        raise PeerError(f"the destination's pool is nearly full: {free}", reason="NO_SPACE")


def check_memory(wanted_bytes: int) -> None:
    """Whether the host has so much memory left for a stranger. Raises PeerError (NO_MEMORY)."""
    available = memory_available_bytes()
    if available - wanted_bytes < MEMORY_RESERVE_BYTES:
        raise PeerError(f"the destination has {available >> 20} MiB of memory left", reason="NO_MEMORY")


def memory_available_bytes() -> int:
    """MemAvailable of /proc/meminfo (proc(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def plausible_steps(steps: Iterable[peer_pb2.TimedStep]) -> list[peer_pb2.TimedStep]:
    """What another host says it has spent its time with, as far as that can be shown; nothing depends on it."""
    return [
        peer_pb2.TimedStep(name=step.name[:_SHOWN], duration_ms=plausible_ms(step.duration_ms))
        for step in islice(steps, MOST_STEPS)
    ]


def plausible_ms(duration_ms: float) -> float:
    """A duration that can be computed with."""
    return min(max(duration_ms, 0.0), LONGEST_MS) if math.isfinite(duration_ms) else 0.0


def shown(text: str) -> str:
    """A stranger's words for a message or a log: quoted, without control characters, and not for ever."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."
