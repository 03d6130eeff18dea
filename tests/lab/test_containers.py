"""Containers by runc and conmon, on volumes and networks of the test's own."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.container_records import State
from migrator.errors import AlreadyExists, NotFound, Precondition
from tests.lab.containers_kit import Bench, TestImage, bench, make_image, need

pytestmark = pytest.mark.root


def wait_until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TestImage:
    need("runc", "conmon", "mkfs.ext4", "busybox")
    return make_image(tmp_path_factory.mktemp("image") / "tiny")


@pytest.fixture
def host(tmp_path: Path, image: TestImage) -> Iterator[Bench]:
    with bench(tmp_path, image) as made:
        yield made


def test_life(host: Bench) -> None:
    host.create("t-life", "echo hello; exec sleep 1000000")
    containers = host.containers
    assert containers.record("t-life").state is State.CREATED
    with pytest.raises(AlreadyExists):
        host.create("t-life")
    record = containers.start("t-life")
    assert record.state is State.RUNNING
    assert containers.init_pid("t-life") in containers.cgroup("t-life").pids()
    with pytest.raises(Precondition):
        containers.start("t-life")
    wait_until(lambda: "stdout F hello" in host.log("t-life"))
    containers.pause("t-life")
    assert containers.cgroup("t-life").is_frozen()
    containers.resume("t-life")
    assert not containers.cgroup("t-life").is_frozen()
    stopped = containers.stop("t-life", timeout_s=0.2)
    assert (stopped.state, stopped.exit_code) == (State.STOPPED, 137)
    assert not containers.cgroup("t-life").folders()
    assert not host.runtime.paths("t-life").netns.exists()
    containers.start("t-life")
    with pytest.raises(Precondition):
        containers.delete("t-life")
    containers.delete("t-life", force=True)
    with pytest.raises(NotFound):
        containers.record("t-life")
    assert not host.runtime.paths("t-life").bundle.exists()
    assert not host.runtime.known()
