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


def run(host: Bench, name: str, *command: str, stdin: bytes | None = None, **options: object) -> tuple[int, str, str]:
    """Exit code, output and error output of a command in the container."""
    pieces: dict[bool, bytes] = {False: b"", True: b""}

    def sink(data: bytes, is_error_output: bool) -> None:
        pieces[is_error_output] += data

    with host.containers.execute(name, command, **options) as execution:  # type: ignore[arg-type]
        if stdin is not None:
            execution.write(stdin)
            execution.end_input()
        code = execution.run(sink)
    return code, pieces[False].decode(), pieces[True].decode()


def test_exec(host: Bench) -> None:
    host.create("t-exec", environment=["COLOUR=red"], hostname="somewhere")
    with pytest.raises(Precondition):
        host.containers.execute("t-exec", ["true"])
    host.containers.start("t-exec")
    assert run(host, "t-exec", "sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert run(host, "t-exec", "cat", stdin=b"x" * 300_000) == (0, "x" * 300_000, "")
    assert run(host, "t-exec", "cat", "/etc/hostname") == (0, "somewhere\n", "")
    assert run(host, "t-exec", "sh", "-c", "echo $COLOUR $HOME", user="app")[1] == "red /home/app\n"
    assert run(host, "t-exec", "id", user="app")[1] == "uid=1000(app) gid=1001(app) groups=1002(extra)\n"
    assert run(host, "t-exec", "no-such-program")[0] == 127
    assert run(host, "t-exec", "sh", "-c", "kill -9 $$")[0] == 137
    code, output, _ = run(host, "t-exec", "sh", "-c", "tty; stty size; exit 3", terminal=(33, 99))
    assert (code, output.split()) == (3, ["/dev/pts/0", "33", "99"])


def test_exec_ends_with_its_client(host: Bench) -> None:
    host.create("t-gone")
    host.containers.start("t-gone")
    with host.containers.execute("t-gone", ["sleep", "999"]):
        wait_until(lambda: "sleep 999" in [command for _, command in host.containers.exec_sessions("t-gone")])
    wait_until(lambda: not host.containers.exec_sessions("t-gone"))
    assert len(host.containers.cgroup("t-gone").pids()) == 1
