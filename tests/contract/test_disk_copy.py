"""A disk's share of a migration, on a real device with every tracker: equal at the end, and little sent for it."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev import blocks, loop
from blockdev.block_device import BLOCK_BYTES
from blockdev.tracker import WriteTracker
from migrator import verify
from migrator.disk import DiskCopy
from migrator.errors import Cancelled
from migrator.ports import LeavingVolume
from migrator.stream import Digests, Meter, Receiver, Sender
from migrator.v1 import peer_pb2
from soakkit.disk import TRACKERS
from soakkit.writers import MIB, writing

pytestmark = pytest.mark.root

SIZE_BYTES = 256 << 20
BLOCKS = SIZE_BYTES // BLOCK_BYTES
ROUNDS = 6
SMALL_BYTES = 16 << 20
SEED = 5
PAGE = 4096


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


def test_little_more_is_sent_than_what_was_there_and_what_was_written(tmp_path: Path, kind_of_tracker: str) -> None:
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
            """Somewhere in so many blocks. How many bytes have to be sent for that: eBPF tells 4 KiB apart."""
            for block in chance.sample(range(BLOCKS), count):
                at = block * BLOCK_BYTES + chance.randrange((BLOCK_BYTES - length) // 4096 + 1) * 4096
                os.pwrite(disk, chance.randbytes(length), at)
            os.fsync(disk)
            return count * (length if kind_of_tracker == "ebpf" else BLOCK_BYTES)

        def store(request: peer_pb2.SendRequest) -> None:
            for piece in receiver.pieces(request):
                blocks.write(target, piece, SIZE_BYTES)

        least = write(400, BLOCK_BYTES)
        container = OneVolume([LeavingVolume(image, SIZE_BYTES, device.path, None)], kind_of_tracker)
        copy = DiskCopy(container, stack)  # type: ignore[arg-type]
        meter, receiver = Meter(), Receiver(Digests())
        sender = Sender("m-1", 1, Digests(), meter)
        for request in copy.first_pass(sender, {}):
            store(request)
        for _ in range(ROUNDS):
            least += write(100, 4096)
            copy.collect()
            for request in copy.requests(sender):
                store(request)
        assert replica.read_bytes() == image.read_bytes()
        sent = sum(meter.content_bytes.values())
        print(f"\n{kind_of_tracker}: {sent / least:.3f} of the least, {meter.wire_bytes / least:.3f} on the wire")
        assert max(sent, meter.wire_bytes) <= 1.05 * least


def _scatter(path: Path, chance: random.Random) -> None:
    """Runs of pages here and there in a sparse file, up to some that are many."""
    with path.open("r+b") as file:
        for _ in range(chance.choice((3, 30, 100))):
            count = chance.randint(1, chance.choice((2, 64)))
            at = chance.randrange(SMALL_BYTES // PAGE - count) * PAGE
            os.pwrite(file.fileno(), chance.randbytes(PAGE) * count, at)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_destination_has_it_becomes_equal(tmp_path: Path, kind_of_tracker: str, seed: int) -> None:
    """An image like the disk, or another one; the disk is written, zeroed and discarded all the time."""
    chance = random.Random(f"{kind_of_tracker} {seed}")
    image, replica = tmp_path / "image", tmp_path / "replica"
    image.touch()
    os.truncate(image, SMALL_BYTES)
    _scatter(image, chance)
    if seed % 2:
        subprocess.run(["cp", "--sparse=always", image, replica], check=True)
    else:
        replica.touch()
        os.truncate(replica, SMALL_BYTES)
    _scatter(replica, chance)
    with ExitStack() as stack:
        device = loop.attach(image)
        stack.callback(device.detach)
        target = os.open(replica, os.O_RDWR)
        stack.callback(os.close, target)
        sender, receiver = Sender("m-1", 1, Digests(), Meter()), Receiver(Digests())

        def store(requests: Iterator[peer_pb2.SendRequest]) -> None:
            for request in requests:
                for piece in receiver.pieces(request):
                    blocks.write(target, piece, SMALL_BYTES)

        base = dict(verify.digests(target, target, SMALL_BYTES, verify.BLOCK_BYTES))
        container = OneVolume([LeavingVolume(image, SMALL_BYTES, device.path, None)], kind_of_tracker)
        inner = stack.enter_context(ExitStack())
        with writing("device", [device.path], seed):
            copy = DiskCopy(container, inner)  # type: ignore[arg-type]
            store(copy.first_pass(sender, {"volume/0": base}))
            for _ in range(ROUNDS):
                copy.collect()
                store(copy.requests(sender))
        copy.collect()
        store(copy.requests(sender))
        ((_, ours),) = copy.digests()
        assert ours == dict(verify.digests(target, target, SMALL_BYTES, verify.CHUNK_BYTES))
        assert replica.read_bytes() == image.read_bytes()


def test_who_is_cancelled_does_not_wait_for_a_comparison(tmp_path: Path) -> None:
    """It reads all of the disk, also while the container stands still."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE_BYTES)
    cancelled: list[bool] = []

    def check() -> None:
        if cancelled:
            raise Cancelled("no more of it")

    with ExitStack() as stack:
        device = loop.attach(image)
        stack.callback(device.detach)
        container = OneVolume([LeavingVolume(image, SIZE_BYTES, device.path, None)], "comparing")
        copy = DiskCopy(container, stack, check=check)  # type: ignore[arg-type]
        image_file = os.open(device.path, os.O_RDWR)
        stack.callback(os.close, image_file)
        os.pwrite(image_file, b"x" * PAGE, MIB)
        os.fsync(image_file)
        sender = Sender("m-1", 1, Digests(), Meter())
        list(copy.first_pass(sender, {}))
        os.pwrite(image_file, b"y" * PAGE, MIB)
        os.fsync(image_file)
        cancelled.append(True)
        with pytest.raises(Cancelled):
            copy.collect()
        cancelled.clear()
        assert copy.collect() == BLOCK_BYTES
