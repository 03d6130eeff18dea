"""Pages of a file compared to what was last seen of them."""

import os
import tempfile

from blockdev.extents import Range
from migrator.memory.digests import Digests

PAGE = 4096
SIZE = 3 << 20


def test_only_what_has_changed() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        digests = Digests()
        assert digests.changed(file.fileno(), [Range(0, SIZE)]) == [Range(0, SIZE)]
        assert digests.changed(file.fileno(), [Range(0, SIZE)]) == []
        for page in (3, 300, 511):
            os.pwrite(file.fileno(), b"x", page * PAGE)
        changed = [Range(page * PAGE, (page + 1) * PAGE) for page in (3, 300, 511)]
        assert digests.changed(file.fileno(), [Range(0, SIZE)]) == changed
        digests.forget([Range(300 * PAGE, 301 * PAGE)])
        assert digests.changed(file.fileno(), [Range(0, SIZE)]) == [changed[1]]


def test_what_was_taken_between_two_looks_counts() -> None:
    """A lock, say, that was free at both looks, and held when the page was sent."""
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        digests = Digests()
        digests.changed(file.fileno(), [Range(0, SIZE)])
        os.pwrite(file.fileno(), b"held", 300 * PAGE)
        taken = os.pread(file.fileno(), 8 * PAGE, 296 * PAGE)
        digests.seen(296 * PAGE, memoryview(taken))
        os.pwrite(file.fileno(), b"\0\0\0\0", 300 * PAGE)
        assert digests.changed(file.fileno(), [Range(0, SIZE)]) == [Range(300 * PAGE, 301 * PAGE)]
