"""Snapshots of real volumes: of one moment, whole, independent of each other, and never half of anything."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from agent import container_records, snapshot_records
from agent.assembly import Assembly, volume_name
from agent.container_records import Records, State
from agent.database import Database
from agent.runtime import Runtime
from agent.snapshots import SnapshotKeeper
from blockdev import filesystem, live_clone, loop, reflink, thaw_guard, tracker
from blockdev.blocks import Piece
from blockdev.bpf_tracker import BpfTracker
from blockdev.errors import BlockError
from blockdev.extents import Range
from blockdev.snapshot import SnapshotStore
from blockdev.tracker import WriteTracker
from blockdev.volume import MountedVolume, Volume, VolumeStore
from migrator.v1 import container_pb2

pytestmark = pytest.mark.root

MIB = 1 << 20
SIZE = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
ID = "0123456789abcdef"
NONE = "without a tracker"


@pytest.fixture
def folder(pool_folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=pool_folder) as made:
        yield Path(made)


@pytest.fixture(params=["bpf", NONE])
def track(request: pytest.FixtureRequest) -> Callable[[Path], WriteTracker] | None:
    if request.param == NONE:
        return None
    if (reason := tracker.probe()) is not None:
        pytest.skip(f"this kernel has no eBPF tracker: {reason}")
    return BpfTracker


class Host:
    """Volumes that are mounted, and snapshots of them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.volumes = VolumeStore(folder / "volumes")
        self.snapshots = SnapshotStore(folder / "snapshots")

    def mount(self, volume: Volume, name: str) -> MountedVolume:
        at = self.folder / f"{name}.at"
        at.mkdir(exist_ok=True)
        mounted = volume.mount(at)
        self._stack.callback(lambda: mounted.unmount() if os.path.ismount(at) else None)
        return mounted


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(folder, stack)


@pytest.mark.parametrize("kind", filesystem.KINDS)
def test_one_moment_over_two_volumes(host: Host, track: Callable[[Path], WriteTracker] | None, kind: str) -> None:
    """What was synced before is in it, and what follows from something is there only with what it follows from."""
    made = [host.volumes.create(name, SIZE[kind], kind) for name in ("first", "second")]
    mounted = [host.mount(volume, f"live{index}") for index, volume in enumerate(made)]
    stop, wrote = threading.Event(), [0]

    def write() -> None:
        with (mounted[0].at / "log").open("ab", 0) as first, (mounted[1].at / "log").open("ab", 0) as second:
            while not stop.is_set():
                for file in (first, second):
                    file.write(b"%7d\n" % wrote[0])
                    os.fsync(file.fileno())
                wrote[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while wrote[0] < 5:
            time.sleep(0.01)
        before = wrote[0]
        host.snapshots.take(ID, [(v.path, m) for v, m in zip(made, mounted, strict=True)], track)
        after = wrote[0]
        while wrote[0] < after + 5:
            time.sleep(0.01)
    finally:
        stop.set()
        writer.join()
    for m in mounted:
        m.unmount()
    counts = []
    for index, image in enumerate(host.snapshots.images(ID)):
        at = host.mount(Volume(image, kind), f"taken{index}")
        lines = (at.at / "log").read_bytes().splitlines()
        assert lines == [b"%7d" % number for number in range(len(lines))]
        counts.append(len(lines))
        at.unmount()
    assert counts[1] <= counts[0] <= counts[1] + 1
    assert before <= counts[1] <= after + 1


def test_a_missed_event_costs_time_and_nothing_else(host: Host) -> None:
    """A tracker that says "everything" each time, or at last that nothing was written."""

    class Loud:
        reads_all = False

        def __init__(self, device: Path) -> None:
            self._size_bytes = SIZE["ext4"]

        def start(self) -> None: ...

        def collect(self, check: Callable[[], None] = lambda: None) -> list[Range]:
            return [Range(0, self._size_bytes)]

        def observe(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
            return iter(pieces)

        def close(self) -> None: ...

    volume = host.volumes.create("loud", SIZE["ext4"], "ext4")
    mounted = host.mount(volume, "live")
    (mounted.at / "file").write_bytes(os.urandom(MIB))
    host.snapshots.take(ID, [(volume.path, mounted)], Loud)
    taken = host.mount(Volume(host.snapshots.images(ID)[0], "ext4"), "taken")
    assert (taken.at / "file").read_bytes() == (mounted.at / "file").read_bytes()


def test_what_a_disk_could_hold_costs_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tracker all of it is cloned once more in the freeze: its data, and not every part of its holes."""
    calls = [0]
    clone_range = reflink.clone_range

    def counted(source: int, target: int, part: Range) -> None:
        calls[0] += 1
        clone_range(source, target, part)

    monkeypatch.setattr(reflink, "clone_range", counted)
    volume = host.volumes.create("large", 64 << 30, "ext4")
    mounted = host.mount(volume, "live")
    (mounted.at / "kept").write_bytes(os.urandom(MIB))
    (mounted.at / "gone").write_bytes(os.urandom(MIB))
    filesystem.sync(mounted.at)
    (mounted.at / "gone").unlink()
    host.snapshots.take(ID, [(volume.path, mounted)], None)
    assert calls[0] < 64 * volume.allocated_bytes // live_clone.STEP_BYTES
    taken = host.mount(Volume(host.snapshots.images(ID)[0], "ext4"), "taken")
    assert (taken.at / "kept").read_bytes() == (mounted.at / "kept").read_bytes()
    assert not (taken.at / "gone").exists()


def test_what_fails_leaves_nothing(host: Host) -> None:
    volume = host.volumes.create("failing", SIZE["ext4"], "ext4")
    mounted = host.mount(volume, "live")

    def broken(device: Path) -> WriteTracker:
        raise BlockError("no tracker today")

    def leave() -> None:
        raise BlockError("the caller has left")

    for track, check in ((broken, lambda: None), (None, leave)):
        with pytest.raises(BlockError):
            host.snapshots.take(ID, [(volume.path, mounted)], track, check)
        assert list(host.snapshots.folder.iterdir()) == []
        assert not filesystem.thaw(mounted.at)


def test_sweep_removes_what_a_crash_has_left(host: Host) -> None:
    volume = host.volumes.create("left", SIZE["ext4"], "ext4")
    host.snapshots.copy(ID, [volume.path])
    for suffix in (".new", ".old"):
        half = host.snapshots.folder / f"{ID}{suffix}"
        half.mkdir()
        (half / "0.img").write_bytes(b"half")
    host.snapshots.sweep()
    assert [path.name for path in host.snapshots.folder.iterdir()] == [ID]
    host.snapshots.delete(ID)
    host.snapshots.delete(ID)
    assert list(host.snapshots.folder.iterdir()) == []


def test_a_volume_in_use_is_not_replaced(host: Host) -> None:
    volume = host.volumes.create("busy", SIZE["ext4"], "ext4")
    host.snapshots.copy(ID, [volume.path])
    host.mount(volume, "live")
    with pytest.raises(BlockError, match="in use"):
        host.volumes.replace("busy", host.snapshots.images(ID)[0])


FREEZER = """
import sys, time
from pathlib import Path
from blockdev import filesystem, thaw_guard
at = Path(sys.argv[1])
with thaw_guard.guarding([at]):
    filesystem.freeze(at)
    print("frozen", flush=True)
    time.sleep(60)
"""


def test_a_freezer_that_is_killed_leaves_nothing_frozen(host: Host) -> None:
    mounted = host.mount(host.volumes.create("cold", SIZE["ext4"], "ext4"), "live")
    with subprocess.Popen([sys.executable, "-c", FREEZER, str(mounted.at)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        process.send_signal(signal.SIGKILL)
    # Writing waits for the thaw: by the guard, or by the pair of it at the end of this test.
    done = threading.Event()

    def write() -> None:
        (mounted.at / "file").write_text("goes on")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert done.wait(5)
    finally:
        filesystem.thaw(mounted.at)
        writer.join()


TAKER = """
import sys
from pathlib import Path
from blockdev import loop
from blockdev.snapshot import SnapshotStore
from blockdev.volume import MountedVolume
image, at, folder, identifier = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
(device,) = loop.find(image)
print("begins", flush=True)
for number in range(1000):
    store = SnapshotStore(folder)
    store.take(identifier, [(image, MountedVolume(device, at))], None)
    store.delete(identifier)
"""


def test_killed_at_any_moment(host: Host) -> None:
    """What writes goes on, and a sweep leaves whole snapshots or none."""
    volume = host.volumes.create("hit", SIZE["ext4"], "ext4")
    mounted = host.mount(volume, "live")
    stop, wrote = threading.Event(), [0]

    def write() -> None:
        with (mounted.at / "log").open("ab", 0) as file:
            while not stop.is_set():
                file.write(b"line\n")
                os.fsync(file.fileno())
                wrote[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    words = [sys.executable, "-c", TAKER, str(volume.path), str(mounted.at), str(host.snapshots.folder), ID]
    try:
        for number in range(8):
            with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"begins\n"
                time.sleep(0.05 + 0.037 * number)
                process.kill()
            before, deadline = wrote[0], time.monotonic() + 5
            while wrote[0] == before:
                assert time.monotonic() < deadline, "the file system is frozen"
                time.sleep(0.005)
            host.snapshots.sweep()
            assert host.snapshots.identifiers() in ([], [ID])
            host.snapshots.delete(ID)
            assert list(host.snapshots.folder.iterdir()) == []
    finally:
        stop.set()
        filesystem.thaw(mounted.at)
        writer.join()


def test_the_guard_lets_others_freeze_afterwards(host: Host) -> None:
    mounted = host.mount(host.volumes.create("after", SIZE["ext4"], "ext4"), "live")
    with thaw_guard.guarding([mounted.at]):
        pass
    assert filesystem.freeze(mounted.at)
    time.sleep(0.1)
    assert filesystem.thaw(mounted.at)


def test_a_range_is_shared(folder: Path) -> None:
    source, target = folder / "source", folder / "target"
    source.write_bytes(os.urandom(3 * 65536))
    target.write_bytes(bytes(3 * 65536))
    with source.open("rb") as a, target.open("r+b") as b:
        reflink.clone_range(a.fileno(), b.fileno(), Range(65536, 131072))
    expected = bytes(65536) + source.read_bytes()[65536:131072] + bytes(65536)
    assert target.read_bytes() == expected


CONTAINER = "ct101"
COUNT = 2
KEYS = ("a", "b")
Content = dict[str, bytes]


class Model(RuleBasedStateMachine):
    """A container with two volumes that is started, written, snapshotted, rolled back; and what should be in it.

    `current`, `parents` and `taken` are the model; contents are (volume, file) to bytes.
    """

    root: Path

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=self.root)))
        self._database = Database(self._folder / "agent.db", [container_records.SCHEMA, snapshot_records.SCHEMA])
        self._stack.callback(self._database.close)
        self._runtime = Runtime(self._folder / "state", self._folder / "run", "none")
        self._volumes = VolumeStore(self._folder / "volumes")
        nothing: Any = None
        assembly = Assembly(self._runtime, self._volumes, nothing, nothing)
        self._keeper = SnapshotKeeper(self._database, assembly, self._volumes, self._folder / "snapshots")
        spec = container_pb2.ContainerSpec(image="none")
        for index in range(COUNT):
            size_bytes = 16 * MIB
            spec.volumes.add(mount_point=f"/{index}", size_bytes=size_bytes, filesystem="ext4")
            self._volumes.create(volume_name(CONTAINER, index), size_bytes, "ext4")
        self._spec = spec
        self._records = Records(self._database)
        self._records.insert(CONTAINER, spec, State.STOPPED)
        self._mounted: list[MountedVolume] = []
        self._assembly = assembly
        self.content: dict[tuple[int, str], bytes] = {}
        self.taken: dict[str, dict[tuple[int, str], bytes]] = {}
        self.parents: dict[str, str | None] = {}
        self.current: str | None = None
        self._number = 0

    def teardown(self) -> None:
        self._down()
        self._stack.close()

    @property
    def running(self) -> bool:
        return bool(self._mounted)

    def _up(self) -> None:
        self._assembly.mount(CONTAINER, self._spec)
        self._mounted = self._assembly.mounted(CONTAINER, self._spec)

    def _down(self) -> None:
        for mounted in self._mounted:
            mounted.unmount()
        self._mounted = []

    def start(self) -> None:
        if self.running:
            return
        self._keeper.settle(CONTAINER)
        self._up()
        self._records.update(CONTAINER, state=State.RUNNING)

    @rule()
    def stop(self) -> None:
        self._down()
        self._records.update(CONTAINER, state=State.STOPPED)

    @rule(index=st.integers(0, COUNT - 1), key=st.sampled_from(KEYS), value=st.binary(min_size=1, max_size=8))
    def write(self, index: int, key: str, value: bytes) -> None:
        self.start()
        data = value * 40000
        (self._mounted[index].at / key).write_bytes(data)
        self.content[index, key] = data

    @rule()
    def take(self) -> None:
        name = f"s{self._number}"
        self._number += 1
        self._keeper.take(self._records.get(CONTAINER), name, lambda: None)
        self.taken[name] = dict(self.content)
        self._look_at_a_snapshot(name)
        self.parents[name] = self.current
        self.current = name

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), done=st.sampled_from([COUNT, *range(COUNT)]))
    def roll_back(self, data: st.DataObject, done: int) -> None:
        """Whole, or interrupted after some of the volumes and carried on."""
        self.stop()
        name = data.draw(st.sampled_from(sorted(self.taken)))
        snapshot = self._keeper.records.get(CONTAINER, name)
        if done == COUNT:
            self._keeper.roll_back(snapshot)
        else:
            self._keeper.records.begin_rollback(snapshot)
            for index, image in enumerate(self._keeper.store.images(snapshot.id)[:done]):
                self._volumes.replace(volume_name(CONTAINER, index), image)
            self._volumes.sweep()
            self._keeper.sweep()
            self._keeper.settle(CONTAINER)
        self.content, self.current = dict(self.taken[name]), name
        self.look_at_the_volumes()

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        self._keeper.delete(self._keeper.records.get(CONTAINER, name))
        heir = self.parents.pop(name)
        self.parents = {child: heir if parent == name else parent for child, parent in self.parents.items()}
        self.current = heir if self.current == name else self.current
        del self.taken[name]

    @rule()
    def look_at_the_volumes(self) -> None:
        self.stop()
        images = [self._volumes.open(volume_name(CONTAINER, index)).path for index in range(COUNT)]
        assert self._read(images) == self.content

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def look_at_a_snapshot(self, data: st.DataObject) -> None:
        self._look_at_a_snapshot(data.draw(st.sampled_from(sorted(self.taken))))

    def _look_at_a_snapshot(self, name: str) -> None:
        snapshot = self._keeper.records.get(CONTAINER, name)
        assert self._read(self._keeper.store.images(snapshot.id)) == self.taken[name]

    @invariant()
    def the_tree_is_right(self) -> None:
        found = self._keeper.records.of(CONTAINER)
        names: dict[str | None, str | None] = {snapshot.id: snapshot.name for snapshot in found} | {None: None}
        assert {snapshot.name: names[snapshot.parent] for snapshot in found} == self.parents
        assert [snapshot.name for snapshot in found if snapshot.is_current] == ([self.current] if self.current else [])
        assert self._keeper.store.identifiers() == sorted(snapshot.id for snapshot in found)

    def _read(self, images: list[Path]) -> dict[tuple[int, str], bytes]:
        """Mounted without a way to write: an image that was not whole would not mount."""
        found = {}
        at = self._folder / "look"
        at.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            device = loop.attach(image, read_only=True)
            try:
                filesystem.mount(device.path, at, "ext4", read_only=True)
                for key in KEYS:
                    with contextlib.suppress(FileNotFoundError):
                        found[index, key] = (at / key).read_bytes()
            finally:
                if os.path.ismount(at):
                    filesystem.unmount(at)
                device.detach()
        return found


def test_any_sequence_of_snapshots(pool_folder: Path) -> None:
    Model.root = pool_folder
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=18,
            stateful_step_count=20,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
