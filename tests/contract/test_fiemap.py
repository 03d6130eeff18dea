"""What holds data in the image of a volume, on the file system where images are."""

import os
import random
from pathlib import Path

import pytest

from blockdev import fiemap, reflink
from blockdev.blocks import open_direct

pytestmark = pytest.mark.root

BLOCK = 4096
BLOCKS = 2048


@pytest.mark.parametrize("seed", range(5))
def test_no_data_is_taken_for_a_hole_in_a_clone_that_was_written_to(pool_folder: Path, seed: int) -> None:
    """XFS lays out room for 32 blocks where one is copied, over holes and data beside it."""
    chance = random.Random(seed)
    original, clone = pool_folder / f"original-{seed}", pool_folder / f"clone-{seed}"
    held = {at + number for at in chance.sample(range(BLOCKS - 8), 60) for number in range(chance.randint(1, 8))}
    written = set(chance.sample(sorted(held), 30))
    with original.open("xb") as file:
        os.truncate(file.fileno(), BLOCKS * BLOCK)
        for block in held:
            os.pwrite(file.fileno(), b"x" * BLOCK, block * BLOCK)
    reflink.clone(original, clone)
    with clone.open("r+b") as file:
        for block in written:
            os.pwrite(file.fileno(), b"y" * BLOCK, block * BLOCK)
            os.fsync(file.fileno())
    descriptor = open_direct(clone)
    try:
        found = list(fiemap.allocated(descriptor, BLOCKS * BLOCK))
        later = list(fiemap.allocated(descriptor, BLOCKS * BLOCK, 1000 * BLOCK))
    finally:
        os.close(descriptor)
    assert {at // BLOCK for part in found for at in range(part.start, part.end, BLOCK)} == held
    assert {at // BLOCK for part in later for at in range(part.start, part.end, BLOCK)} == {
        block for block in held if block >= 1000
    }
