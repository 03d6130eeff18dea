"""A disk's share of a migration, on a real device with every tracker: equal at the end, and little sent for it."""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev import blocks, loop, tracker
from blockdev.block_device import BLOCK_BYTES
from blockdev.tracker import WriteTracker
from migrator.disk import DiskCopy
from migrator.ports import LeavingVolume
from migrator.stream import Digests, Meter, Receiver, Sender
from soakkit.disk import TRACKERS

pytestmark = pytest.mark.root

SIZE_BYTES = 256 << 20
BLOCKS = SIZE_BYTES // BLOCK_BYTES
ROUNDS = 6
SEED = 5


@dataclass
class OneVolume:
    """As much of a container as its disk needs."""

    volumes: list[LeavingVolume]
    kind_of_tracker: str

    @contextmanager
    def track_writes(self, volume: LeavingVolume) -> Iterator[WriteTracker]:
        assert volume.device is not None
        with closing(TRACKERS[self.kind_of_tracker](volume.device, volume.image)) as writes:
            writes.start()
            yield writes


@pytest.mark.parametrize("kind_of_tracker", list(TRACKERS))
def test_little_more_is_sent_than_what_was_there_and_what_was_written(tmp_path: Path, kind_of_tracker: str) -> None:
    if os.geteuid() != 0 or (kind_of_tracker == "ebpf" and tracker.probe() is not None):
        pytest.skip("needs root and eBPF")
    chance = random.Random(SEED)
    image, replica = tmp_path / "image", tmp_path / "replica"
    with ExitStack() as stack:
        for path in (image, replica):
            with path.open("xb") as file:
                os.truncate(file.fileno(), SIZE_BYTES)
        device = loop.attach(image)
        stack.callback(device.detach)
        disk, target = os.open(device.path, os.O_RDWR), os.open(replica, os.O_RDWR)
        stack.callback(os.close, disk)
        stack.callback(os.close, target)

        def write(count: int, length: int) -> int:
            """Somewhere in so many blocks. How many bytes these blocks have."""
            for block in chance.sample(range(BLOCKS), count):
                at = block * BLOCK_BYTES + chance.randrange((BLOCK_BYTES - length) // 4096 + 1) * 4096
                os.pwrite(disk, chance.randbytes(length), at)
            os.fsync(disk)
            return count * BLOCK_BYTES

        least = write(400, BLOCK_BYTES)
        container = OneVolume([LeavingVolume(image, SIZE_BYTES, device.path, None)], kind_of_tracker)
        copy = DiskCopy(container, stack)  # type: ignore[arg-type]
        meter, receiver = Meter(), Receiver(Digests())
        sender = Sender("m-1", 1, Digests(), meter)
        for request in copy.first_pass(sender, {}):
            blocks.write(target, receiver.piece(request), SIZE_BYTES)
        for _ in range(ROUNDS):
            least += write(100, 4096)
            copy.collect()
            for request in copy.requests(sender):
                blocks.write(target, receiver.piece(request), SIZE_BYTES)
        assert replica.read_bytes() == image.read_bytes()
        sent = sum(meter.content_bytes.values())
        print(f"\n{kind_of_tracker}: {sent / least:.3f} of the least, {meter.wire_bytes / least:.3f} on the wire")
        assert max(sent, meter.wire_bytes) <= 1.05 * least
