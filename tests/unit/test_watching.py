"""What a look at a process keeps of what the kernel tells."""

from hypothesis import given
from hypothesis import strategies as some

from blockdev import extents
from blockdev.extents import Range
from migrator.memory.pagemap import PAGE_BYTES, WRITTEN, Region
from migrator.memory.watching import Scan

# What a page is: nothing, there, or written.
PAGES = some.lists(some.sampled_from([None, 0, WRITTEN]), max_size=200)


def regions(pages: list[int | None], first: int = 0) -> list[Region]:
    return [
        Region((first + number) * PAGE_BYTES, (first + number + 1) * PAGE_BYTES, kind)
        for number, kind in enumerate(pages)
        if kind is not None
    ]


def ranges(found: list[Region]) -> list[Range]:
    return extents.merge(Range(start, end) for start, end, _ in found)


@given(PAGES, PAGES)
def test_all_of_it_is_kept_in_as_few_ranges_as_there_are(low: list[int | None], high: list[int | None]) -> None:
    scan, more = Scan(), Scan()
    scan.add(iter(regions(low)))
    more.add(iter(regions(high, len(low))))
    scan.extend(more)
    found = regions([*low, *high])
    assert scan.populated == ranges(found)
    assert scan.written == ranges([region for region in found if region.categories])


@given(PAGES, some.integers(1, 20))
def test_many_are_joined_over_what_is_populated(pages: list[int | None], most: int) -> None:
    scan = Scan(most=most)
    scan.add(regions(pages))
    found = regions(pages)
    assert scan.populated == ranges(found)
    assert scan.written == extents.merge(scan.written)
    assert extents.subtract(ranges([region for region in found if region.categories]), scan.written) == []
    assert extents.subtract(scan.written, scan.populated) == []
    # What is between two that do not touch cannot be told.
    assert len(scan.written) <= 2 * max(most, len(scan.populated))
