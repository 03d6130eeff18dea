"""No writes are seen: all that is populated counts as written every time. Right everywhere, and slow."""

from collections.abc import Sequence

from blockdev.extents import Range
from migrator.memory.mappings import Mapping
from migrator.memory.pagemap import Pagemap
from migrator.memory.watching import Scan, Watch, addresses


class Everything:
    """A process of which all is always told. A `temporary` one stands in until the process can be watched."""

    def __init__(self, *, temporary: bool = False) -> None:
        self.temporary = temporary

    def scan(self, source: Pagemap, areas: Sequence[Mapping], populated: list[Range] | None = None) -> Scan:
        """See Watch."""
        result = Scan()
        for area in areas:
            result.add(source.populated(area), all_written=True)
        return result

    def scan_shared(self, source: Pagemap, area: Mapping) -> list[Range]:
        """See Watch."""
        return addresses(source.populated(area))

    def finish(self) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing was done to the process."""


class NoTracking:
    """The method."""

    name = "none"
    needs_pause = False
    tells_all = True

    def watch(self, pid: int, *, running: bool) -> Watch:
        """See Method."""
        return Everything()
