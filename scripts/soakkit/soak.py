"""Rounds of random writing and collecting, and the question whether the replica is equal at the end."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blockdev import extents, filesystem
from soakkit.disk import Disk, open_disk
from soakkit.writers import MIB, trim, writing

# XFS cannot be smaller. What is larger takes the comparing tracker longer.
FILE_SYSTEM_BYTES = {"xfs": 300 * MIB, "ext4": 64 * MIB, "btrfs": 192 * MIB}
DEVICE_BYTES = 100 * MIB + 4096
GROWTH_BYTES = 64 * MIB
WRITERS = 3


@dataclass(frozen=True)
class Result:
    """What came of it: the part of the disk that each round has copied, and what the writers have done."""

    equal: bool
    leftover_bytes: int
    covered: Sequence[float]
    done: frozenset[str]


def soak_file_system(folder: Path, tracker: str, kind: str, seed: int, another: Callable[[int], bool]) -> Result:
    """Files under several writers, with trims, syncs and freezes; XFS and btrfs also grow.

    `another` is asked with the number of each round whether it is to take place. `folder` is to be empty.
    """
    chance, at = random.Random(seed), folder / "mounted"
    at.mkdir()
    with ExitStack() as stack:
        stack.callback(at.rmdir)
        disk = stack.enter_context(open_disk(folder, "disk", FILE_SYSTEM_BYTES[kind], tracker, kind))
        filesystem.mount(disk.device.path, at, kind)
        stack.callback(filesystem.unmount, at)
        covered = []
        with writing("files", [at / str(index) for index in range(WRITERS)], seed) as done:
            disk.first()
            number = 0
            while another(number):
                _between(disk, at, kind, chance, number)
                covered.append(extents.total(disk.round()) / disk.size_bytes)
                number += 1
        filesystem.freeze(at)
        stack.callback(filesystem.thaw, at)
        return _finish(disk, covered, done)


def soak_device(folder: Path, tracker: str, seed: int, another: Callable[[int], bool]) -> Result:
    """A bare device under several writers, which also write or discard all of it."""
    with open_disk(folder, "bare", DEVICE_BYTES, tracker) as disk:
        covered = []
        with writing("device", [disk.device.path] * WRITERS, seed) as done:
            disk.first()
            number = 0
            while another(number):
                covered.append(extents.total(disk.round()) / disk.size_bytes)
                number += 1
        return _finish(disk, covered, done)


def _between(disk: Disk, at: Path, kind: str, chance: random.Random, number: int) -> None:
    if number == 20 and kind != "ext4":  # mounted it takes CAP_SYS_RESOURCE
        disk.grow(GROWTH_BYTES)
        filesystem.grow(at, kind)
    match chance.randrange(20):
        case 0:
            trim(at)
        case 1:
            filesystem.freeze(at)
            filesystem.thaw(at)
        case 2 | 3 | 4 | 5:
            filesystem.sync(at)


def _finish(disk: Disk, covered: Sequence[float], done: set[str]) -> Result:
    """With nobody writing any more."""
    disk.round()
    return Result(disk.equal(), extents.total(disk.tracker.collect()), covered, frozenset(done))
