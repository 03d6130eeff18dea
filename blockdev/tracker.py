"""Which blocks of a device were written since the last look: what each write tracker does, and which one works here.

eBPF (`blockdev.bpf_tracker`) costs next to nothing. Where the kernel does not allow it, all that is allocated is read
and compared instead (`blockdev.comparing_tracker`), also while the container is frozen.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from blockdev import bpf_tracker
from blockdev.blocks import Piece
from blockdev.bpf_tracker import BpfTracker
from blockdev.comparing_tracker import ComparingTracker
from blockdev.errors import BlockError
from blockdev.extents import Range


class WriteTracker(Protocol):
    """Reports what was written to one device. It does not outlive its process: a new one knows of no earlier write.

    So the order is: `start`, a first copy of all that is allocated to a replica that is zeros, `collect`, a copy of
    that, and so on, with all that is copied passing through `observe`. Whoever has lost its tracker, for example by a
    restart, begins again. The replica is equal once a collect's ranges are copied and nobody has written meanwhile.
    """

    reads_all: bool
    """A collect reads everything that is allocated, and is not to be made for little."""

    def start(self) -> None:
        """From now on what is written is known; what was read before is worth nothing. Raises OSError, BlockError."""

    def collect(self, check: Callable[[], None] = lambda: None) -> list[Range]:
        """Ranges written or discarded since the last collect, or the start: within the device, merged, in order, and no
        wider than whole blocks (`blockdev.block_device.BLOCK_BYTES`); eBPF tells most of what is short apart by 4 KiB.
        They are to be read after this returns. `check` is called now and then if that takes long; what it raises ends
        it, and then nothing is lost. Raises OSError.

        It is the whole device if that is not known: at the first collect of a tracker that was not started, which
        starts it, if the tracker missed something, and if the size of the device has changed.
        """

    def observe(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces, each of which tells the tracker what the replica will have there."""

    def close(self) -> None:
        """Stop tracking. It is of no use afterwards."""


def probe() -> str | None:
    """None if writes are tracked by eBPF on this host, else why they are found by comparing. Takes some 20 ms."""
    return bpf_tracker.probe()


def start(device: Path, image: Path | None = None) -> tuple[WriteTracker, str | None]:
    """A tracker for the device, started, and why it is not the one by eBPF where it is not: the host, or this device.

    `image` is the file under it if that is known. Raises BlockError if the device is not one that can be tracked, and
    OSError.
    """
    if (why := probe()) is None:
        try:
            return _started(BpfTracker(device)), None
        except (OSError, BlockError) as error:
            why = str(error)
    return _started(ComparingTracker(device, image)), why


def _started(tracker: WriteTracker) -> WriteTracker:
    with ExitStack() as undo:
        undo.callback(tracker.close)
        tracker.start()
        undo.pop_all()
    return tracker
