"""A pool that gets full under containers that write: they stand still before a write fails, and go on later."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import room
from agent.container_records import State
from agent.room import RoomGuard
from blockdev import pool
from migrator.errors import Precondition
from migrator.v1.container_pb2 import ContainerSpec, Volume
from tests.lab import containers_kit
from tests.lab.containers_kit import IMAGE_BYTES, Bench, TestImage, make_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20
POOL_BYTES = 1200 * MIB
WITHIN_S = 60.0
# It ends, with a word, when a write fails.
WRITER = (
    "i=0; while head -c 1048576 /dev/urandom >/data/$i && sync -f /data/$i; do i=$((i+1)); echo $i >/data/count; done;"
    " echo FAILED; exec sleep 1000000"
)


@pytest.fixture
def pool_folder(tmp_path: Path) -> Iterator[Path]:
    containers_kit.need("runc", "conmon", "/bin/busybox", "mkfs.ext4")
    state = tmp_path / "pooled"
    state.mkdir()
    try:
        yield pool.ensure(state, POOL_BYTES)
    finally:
        pool.close(state)


class Host(Bench):
    """A bench with a guard that looks when it is told to."""

    def __init__(self, folder: Path, pool_folder: Path, image: TestImage) -> None:
        super().__init__(folder, pool_folder / "volumes", image)
        self.pool = pool_folder
        self.cancelled: list[str] = []
        self.guard = self.make()

    def make(self) -> RoomGuard:
        with self.database.transaction() as cursor:
            cursor.execute(room.SCHEMA)
        guard = RoomGuard(self.database, self.containers, self.pool)
        guard.cancel_migration = self.cancelled.append
        return guard

    def state(self, name: str) -> State:
        return self.containers.record(name).state

    def look_until(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {WITHIN_S:g} s; {pool.room(self.pool)}"
            self.guard.look()
            time.sleep(0.1)


@pytest.fixture
def host(tmp_path: Path, pool_folder: Path) -> Iterator[Host]:
    (tmp_path / "host").mkdir()
    made = Host(tmp_path / "host", pool_folder, make_image(pool_folder / "tiny.img"))
    try:
        yield made
    finally:
        made.clean()


@pytest.fixture
def filler(pool_folder: Path) -> Callable[[int], Path]:
    """Takes room until only so many bytes are free."""

    def fill(free_bytes: int) -> Path:
        path = pool_folder / "filler"
        taken = path.stat().st_size if path.exists() else 0
        wanted = taken + pool.room(pool_folder).free_bytes - free_bytes
        with path.open("ab") as file:
            if wanted > taken:
                os.posix_fallocate(file.fileno(), taken, wanted - taken)
        return path

    return fill


def test_a_writer_stands_still_before_a_write_fails_and_goes_on(host: Host, filler: Callable[[int], Path]) -> None:
    volumes = [
        Volume(mount_point="/", size_bytes=IMAGE_BYTES),
        Volume(mount_point="/data", size_bytes=4 * POOL_BYTES, filesystem="ext4"),
    ]
    host.containers.create("writer", ContainerSpec(image="tiny", volumes=volumes, command=["sh", "-c", WRITER]))
    host.create("waits")
    host.create("still")
    host.containers.start("still")
    host.containers.pause("still")
    for name in ("waits", "writer"):
        host.containers.start(name)
    reserve = pool.room(host.pool).reserve_bytes
    taken = filler(5 * reserve)
    host.guard.look()
    assert host.state("writer") is State.RUNNING
    host.look_until("it stands still", lambda: host.state("writer") is State.PAUSED)
    assert host.containers.cgroup("writer").is_frozen()
    assert host.guard.pauses() == {"writer", "waits"}
    filler(reserve * 3 // 2)
    assert pool.room(host.pool).free_bytes > 0
    with pytest.raises(Precondition, match="the pool is nearly full") as refused:
        host.guard.check_resume("writer")
    assert refused.value.reason == "NO_SPACE"
    host.guard.check_resume("still")
    # Another life of the agent knows whom it has paused.
    host.restart_agent()
    host.guard = host.make()
    host.guard.look()
    assert host.state("writer") is State.PAUSED and host.containers.cgroup("writer").is_frozen()
    taken.unlink()
    host.look_until("it goes on", lambda: not host.guard.pauses())
    assert (host.state("writer"), host.state("waits"), host.state("still")) == ("running", "running", "paused")
    count = host.containers.mounted_volumes("writer")[1].at / "count"
    before = int(count.read_text() or 0)
    deadline = time.monotonic() + WITHIN_S
    while int(count.read_text() or 0) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "FAILED" not in host.log("writer")


def test_one_that_is_busy_is_paused_later_and_its_migration_ended_at_the_last(
    host: Host, filler: Callable[[int], Path]
) -> None:
    host.create("busy")
    host.containers.start("busy")
    reserve = pool.room(host.pool).reserve_bytes
    taken = filler(reserve * 3 // 4)
    with host.containers.hold("busy", "it is on its way"):
        host.guard.look()
        assert host.state("busy") is State.RUNNING
        assert host.cancelled == []
        filler(reserve // 4)
        host.guard.look()
        assert host.cancelled == ["busy"]
    host.guard.look()
    assert host.state("busy") is State.PAUSED
    # As after a migration that was rolled back, which would have let it run elsewhere.
    host.containers.cgroup("busy").thaw()
    host.guard.look()
    assert host.containers.cgroup("busy").is_frozen()
    host.containers.delete("busy", force=True)
    host.guard.look()
    assert host.guard.pauses() == set()
    taken.unlink()


@pytest.mark.parametrize("paused", [True, False])
def test_a_pause_or_resume_that_a_crash_has_cut_short_did_not_happen(host: Host, paused: bool) -> None:
    host.create("ct1", "echo ready; exec sleep 1000000")
    host.containers.start("ct1")
    deadline = time.monotonic() + WITHIN_S
    while "ready" not in host.log("ct1"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if paused:
        host.containers.cgroup("ct1").freeze()
    else:
        host.containers.pause("ct1")
        host.containers.cgroup("ct1").thaw()
    host.restart_agent()
    assert host.state("ct1") is State.RUNNING
    assert not host.containers.cgroup("ct1").is_frozen()
