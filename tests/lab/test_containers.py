"""Containers by runc and conmon, on volumes and networks of the test's own."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import blockdev.pool
from agent.container_records import State
from blockdev import loop
from blockdev.errors import BlockError
from migrator.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Precondition
from migrator.v1 import container_pb2
from tests.lab.containers_kit import Bench, TestImage, bench, make_image, need

POOL_BYTES = 1 << 30

pytestmark = pytest.mark.root


def wait_until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where images can be cloned."""
    need("runc", "conmon", "mkfs.ext4", "mkfs.xfs", "busybox")
    state_dir = tmp_path_factory.mktemp("pool")
    try:
        yield blockdev.pool.ensure(state_dir, POOL_BYTES)
    finally:
        blockdev.pool.close(state_dir)


@pytest.fixture(scope="module")
def image(pool: Path) -> TestImage:
    return make_image(pool / "tiny.img")


@pytest.fixture
def host(tmp_path: Path, pool: Path, image: TestImage) -> Iterator[Bench]:
    with bench(tmp_path, pool / "volumes", image) as made:
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


def test_survives_its_agent(host: Bench) -> None:
    host.create("t-adopt", "while :; do echo tick; sleep 0.05; done")
    record = host.containers.start("t-adopt")
    host.restart_agent()
    assert host.containers.record("t-adopt") == record
    ticks = host.log("t-adopt").count("tick")
    wait_until(lambda: host.log("t-adopt").count("tick") > ticks)
    host.containers.kill("t-adopt")
    wait_until(lambda: host.containers.record("t-adopt").state is State.STOPPED)
    assert host.containers.record("t-adopt").exit_code == 137


def test_end_while_the_agent_is_away(host: Bench) -> None:
    host.create("t-away", "sleep 0.3; exit 5")
    host.containers.start("t-away")
    host.restart_agent(away_s=0.8)
    wait_until(lambda: host.containers.record("t-away").state is State.STOPPED)
    assert host.containers.record("t-away").exit_code == 5
    assert not host.runtime.paths("t-away").netns.exists()


def test_start_after_a_reboot(host: Bench) -> None:
    """As after a power cut: the processes, /run and the mounts are gone, the record says that it runs."""
    host.create("t-boot")
    host.containers.start("t-boot")
    host.restart_agent(reboot=True)
    wait_until(lambda: host.containers.record("t-boot").state is State.STOPPED)
    assert host.containers.record("t-boot").exit_code is None
    host.containers.start("t-boot")
    assert run(host, "t-boot", "echo", "here")[1] == "here\n"


@pytest.mark.parametrize(
    ("policy", "code", "starts_again"),
    [
        (container_pb2.RESTART_POLICY_NO, 1, False),
        (container_pb2.RESTART_POLICY_ON_FAILURE, 0, False),
        (container_pb2.RESTART_POLICY_ON_FAILURE, 3, True),
        (container_pb2.RESTART_POLICY_ALWAYS, 0, True),
    ],
)
def test_restart_policy(host: Bench, policy: container_pb2.RestartPolicy, code: int, starts_again: bool) -> None:
    host.create("t-policy", f"sleep 0.1; exit {code}", restart_policy=policy)
    host.containers.start("t-policy")
    if starts_again:
        wait_until(lambda: host.containers.record("t-policy").restarts > 1)
        host.containers.stop("t-policy", timeout_s=0)
    wait_until(lambda: host.containers.record("t-policy").state is State.STOPPED)
    restarts = host.containers.record("t-policy").restarts
    time.sleep(0.5)
    assert host.containers.record("t-policy").restarts == restarts
    assert host.containers.record("t-policy").state is State.STOPPED


def test_one_operation_at_a_time(host: Bench) -> None:
    host.create("t-busy")
    with host.containers.hold("t-busy", "migration 7 is under way"), pytest.raises(Busy, match="migration 7"):
        host.containers.start("t-busy")
    host.containers.start("t-busy")


def test_limits_and_seccomp(host: Bench) -> None:
    host.create("t-limit", memory_limit_bytes=32 << 20, cpu_millis=500, pids_limit=20, shm_bytes=2 << 20)
    host.containers.start("t-limit")
    assert run(host, "t-limit", "mount", "-t", "tmpfs", "x", "/tmp")[0] != 0
    fill = ("busybox", "dd", "if=/dev/zero", "of=/dev/shm/file", "bs=1M")
    assert run(host, "t-limit", *fill, "count=2")[0] == 0
    assert run(host, "t-limit", *fill, "count=3")[0] != 0
    code, _, errors = run(host, "t-limit", "sh", "-c", "for i in $(seq 30); do sleep 1 & done")
    assert code != 0 and "fork" in errors


@pytest.mark.parametrize("name", ["", "../x", "Upper", "a" * 32, "-a", "a/b"])
def test_names(host: Bench, name: str) -> None:
    with pytest.raises(InvalidArgument):
        host.create(name)


def test_failed_start_leaves_nothing(host: Bench) -> None:
    host.containers.create("t-fail", container_pb2.ContainerSpec(image="tiny", command=["/no/such/program"]))
    with pytest.raises(InvalidArgument, match="no such file"):
        host.containers.start("t-fail")
    assert host.containers.record("t-fail").state is State.CREATED
    assert not host.containers.cgroup("t-fail").folders()
    assert not host.runtime.paths("t-fail").netns.exists()
    assert not host.runtime.known()


def test_an_interrupted_creation_leaves_nothing(host: Bench) -> None:
    host.create("t-whole")
    spec = host.containers.spec("t-whole")
    # As far as an agent comes that is killed just before it says that the container is there.
    host.containers.reserve("t-cut", spec)
    host.containers._assembly.create("t-cut", spec, host._images.get("tiny").path)
    host.containers._assembly.mount("t-cut", spec)
    image = host._volumes.open("t-cut-0").path
    host.restart_agent()
    assert [record.name for record in host.containers.all()] == ["t-whole"]
    assert not image.exists()
    assert not host.runtime.paths("t-cut").bundle.exists()
    host.create("t-cut")


def test_one_that_has_just_begun_can_be_paused(host: Bench) -> None:
    # runc's init has threads when it becomes the command: freezing then must not wait for ever.
    for _ in range(10):
        host.create("t-exec")
        host.containers.start("t-exec")
        host.containers.pause("t-exec")
        assert host.containers.cgroup("t-exec").is_frozen()
        host.containers.delete("t-exec", force=True)


def test_what_somebody_keeps_mounted_is_not_mounted_twice(host: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an operator does who looks around in it with nsenter. The others are looked after all the same."""
    monkeypatch.setattr(loop, "RELEASE_TIMEOUT_S", 0.3)
    containers = host.containers
    for name in ("t-held", "t-other"):
        host.create(name, restart_policy=container_pb2.RESTART_POLICY_ALWAYS)
        containers.start(name)
    pid = containers.init_pid("t-held")
    with subprocess.Popen(["nsenter", "--target", str(pid), "--mount", "sleep", "100"]) as entered:
        try:
            own, wanted = Path(f"/proc/{entered.pid}/ns/mnt"), Path(f"/proc/{pid}/ns/mnt").readlink()
            wait_until(lambda: own.readlink() == wanted)
            with pytest.raises(BlockError, match="still in use"):
                containers.stop("t-held", timeout_s=0.1)
            with pytest.raises(BlockError, match="still mounted"):
                containers.stop("t-held")
            with pytest.raises(Precondition):
                containers.start("t-held")
            host.restart_agent()
            containers = host.containers
            containers.stop("t-other", timeout_s=0.1)
            assert containers.start("t-other").state is State.RUNNING
        finally:
            entered.kill()
    # Nobody has to ask for it again.
    wait_until(lambda: containers.record("t-held").state is State.STOPPED)
    containers.start("t-held")
