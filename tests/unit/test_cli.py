"""The command line against an agent that is real gRPC and otherwise made up."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from migrator.cli.main import main
from migrator.v1 import migration_pb2
from tests.fakes.agent import FakeAgent

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from migrator.cli.main import main; sys.exit(main(prog_name='migrator'))"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(str(tmp_path / "agent.sock"))
    yield fake
    fake.close()


def run(agent: FakeAgent, *words: str) -> Result:
    return CliRunner().invoke(main, ["--socket", agent.socket, *words], catch_exceptions=False)


def program(agent: FakeAgent, *words: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, "--socket", agent.socket, *words]


def popen(agent: FakeAgent, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(program(agent, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def make(agent: FakeAgent, *more: str) -> None:
    words = ["create", "ct101", "--image", "redis", *more, "--", "redis-server", "--bind", "0.0.0.0"]
    assert run(agent, *words).exit_code == 0


def test_ps_has_a_stable_shape_in_json(agent: FakeAgent) -> None:
    make(agent, "--ip", "10.77.2.101/16", "--disk", "2GiB")
    assert run(agent, "start", "ct101").stdout == "ct101\n"
    for words in (["ps", "-o", "json"], ["-o", "json", "ps"]):
        (found,) = json.loads(run(agent, *words).stdout)
        assert found == {
            "name": "ct101",
            "state": "running",
            "host": "host-a",
            "image": "redis",
            "ip": "10.77.2.101",
            "memory_bytes": 0,
            "disk_bytes": 0,
            "pid": 4711,
            "started": "2026-09-21T14:13:20.123Z",
            "exit_code": None,
            "migration": None,
            "pause_reason": None,
            "pulls_from": None,
            "missing_bytes": 0,
            "lost": None,
        }


def test_create_sends_the_whole_spec(agent: FakeAgent) -> None:
    make(
        agent,
        *("--disk", "2GiB", "--memory", "512MiB", "--cpus", "1.5", "--ip", "auto", "--ip6", "fd00::5/64"),
        *("--net", "name=eth1,bridge=br1,ip=10.1.0.2/24,mac=02:00:00:00:00:01", "-p", "8080:80", "-p", "53:53/udp"),
        *("--volume", "/data=10GiB,xfs", "--bind", "/srv:/srv:ro,shared", "--cap-add", "net_admin", "-e", "A=b=c"),
        *("--restart", "on-failure", "--seccomp", "unconfined", "--shm-size", "1GiB"),
    )
    spec = agent.containers.by_name["ct101"].spec
    assert list(spec.command) == ["redis-server", "--bind", "0.0.0.0"]
    assert [(v.mount_point, v.size_bytes, v.filesystem) for v in spec.volumes] == [
        ("/", 2 << 30, ""),
        ("/data", 10 << 30, "xfs"),
    ]
    assert [list(i.addresses) for i in spec.interfaces] == [["auto4", "fd00::5/64"], ["10.1.0.2/24"]]
    assert [(p.host_port, p.container_port, p.protocol) for p in spec.ports] == [(8080, 80, "tcp"), (53, 53, "udp")]
    assert spec.binds[0].read_only and spec.binds[0].shared and spec.binds[0].target == "/srv"
    assert (spec.memory_limit_bytes, spec.cpu_millis, spec.shm_bytes) == (512 << 20, 1500, 1 << 30)
    assert list(spec.add_capabilities) == ["CAP_NET_ADMIN"] and spec.seccomp_unconfined


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["start", "CT"], "cannot be a container's name"),
        (["create", "a", "--image", "i", "--ip", "10.0.0.1"], "prefix length"),
        (["create", "a", "--image", "i", "-p", "80"], "8080:80"),
        (["create", "a", "--image", "i", "--volume", "data=1GiB"], "/data=10GiB"),
        (["create", "a", "--image", "i", "--disk", "2 potatoes"], "not a size"),
        (["create", "a", "--image", "i", "--cpus", "nan"], "not a number of CPUs"),
        (["create", "a", "--image", "i", "--cpus", "inf"], "not in the range"),
        (["create", "a", "--image", "i", "--pids", "99999999999999999999"], "not in the range"),
        (["migrate", "a", "host-b", "--timeout", "0s"], "too little"),
        (["migrate", "a", "host-b", "--bandwidth", "0Mbit/s"], "too little"),
        (["cert", "issue", "ca", "a", "--role", "peer", "--days", "99999999"], "not in the range"),
        (["kill", "-s", "NONSENSE", "a"], "not a signal"),
        (["start", "absent"], "there is no container absent"),
    ],
)
def test_what_is_malformed_ends_with_2_and_says_why(agent: FakeAgent, words: list[str], part: str) -> None:
    result = run(agent, *words)
    assert result.exit_code == 2
    assert part in result.stderr


def test_an_error_is_an_object_with_json(agent: FakeAgent) -> None:
    make(agent)
    run(agent, "start", "ct101")
    result = run(agent, "create", "ct101", "--image", "redis", "-o", "json", "--", "sh", "-o", "table")
    error = json.loads(result.stdout)["error"]
    assert error == {"reason": "ALREADY_EXISTS", "message": "container ct101 exists", "exit_code": 2}
    result = run(agent, "rm", "absent", "ct101", "-o", "json")
    reasons = [item["error"]["reason"] for item in json.loads(result.stdout)]
    assert (result.exit_code, reasons) == (2, ["NOT_FOUND", "WRONG_STATE"])


def test_no_agent_is_4_and_names_the_socket(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["ps", "--socket", str(tmp_path / "none")])
    assert result.exit_code == 4
    assert str(tmp_path / "none") in result.stderr


def test_logs_keep_the_streams_apart(agent: FakeAgent) -> None:
    make(agent)
    result = run(agent, "logs", "ct101")
    assert (result.stdout, result.stderr) == ("one\nthree\n", "two\n")
    assert run(agent, "logs", "--tail", "1", "--timestamps", "ct101").stdout == "2026-09-21T14:13:20.000Z three\n"


def test_images_hosts_and_doctor(agent: FakeAgent) -> None:
    result = run(agent, "image", "build", "redis", "--include", "redis-server,curl")
    assert (result.stdout, result.stderr) == ("redis\n", "fetching redis-server curl\n")
    assert "redis" in run(agent, "image", "ls").stdout
    assert [host["reachable"] for host in json.loads(run(agent, "hosts", "-o", "json").stdout)] == [True, False]
    result = run(agent, "doctor")
    assert result.exit_code == 3
    assert "-> run scripts/setup" in result.stdout


def test_exec_passes_streams_and_exit_code_on(agent: FakeAgent) -> None:
    make(agent)
    data = os.urandom(3_000_000)
    done = subprocess.run(
        program(agent, "exec", "-i", "ct101", "--", "cat"), cwd=ROOT, input=data, capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stdout == data and done.stderr == b""
    assert run(agent, "exec", "ct101", "exit", "42").exit_code == 42
    assert run(agent, "exec", "ct101", "--", "ls", "-l", "--", "x").stdout == "ls\n-l\n--\nx"
    assert run(agent, "exec", "ct101", "ls", "-l").stdout == "ls\n-l"


def test_exec_on_a_terminal_resizes_and_restores_it(agent: FakeAgent) -> None:
    make(agent)
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (30, 100))
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            program(agent, "exec", "-it", "ct101", "--", "size"), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
        )
        assert b"30x100" in os.read(ours, 1000)
        termios.tcsetwinsize(theirs, (40, 120))
        process.send_signal(signal.SIGWINCH)
        assert process.wait(10) == 0
        assert b"40x120" in os.read(ours, 1000)
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_migrate_tells_phases_and_one_object(agent: FakeAgent) -> None:
    result = run(agent, "migrate", "ct101", "host-b", "-o", "json")
    found = json.loads(result.stdout)
    assert (found["outcome"], found["downtime_ms"], found["where_running"]) == ("migrated", 143.25, "host-b")
    assert found["bytes"] == {"memory": 23 << 20, "disk": 0, "wire": 0}
    assert found["phases"][0] == {"name": "preflight", "start_ms": 10.0, "duration_ms": 12.5, "steps": []}
    assert found["error"] is None
    assert [line.split()[1] for line in result.stderr.splitlines()] == ["preflight", "precopy", "handover"]
    assert "ct101 moved from host-a to host-b" in run(agent, "migrate", "ct101", "host-b").stdout


def test_a_migration_that_waits_is_queued(agent: FakeAgent) -> None:
    agent.migrations.by_name["m1"] = migration_pb2.Migration(
        name="m1", container="ct101", queue_position=2, queue_host="host-b"
    )
    (found,) = json.loads(run(agent, "migrations", "ls", "-o", "json").stdout)
    assert (found["outcome"], found["queue_position"], found["queue_host"]) == ("queued", 2, "host-b")
    assert "queued (2 at host-b)" in run(agent, "migrations", "ls").stdout


@pytest.mark.parametrize(
    ("host", "code", "reason"), [("full", 3, "NO_SPACE"), ("lost", 7, "UNCERTAIN"), ("nowhere", 2, "HOST_UNKNOWN")]
)
def test_migrate_that_fails_has_its_own_exit_code(agent: FakeAgent, host: str, code: int, reason: str) -> None:
    result = run(agent, "migrate", "ct101", host, "-o", "json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["reason"] == reason


@pytest.mark.parametrize(("host", "code", "part"), [("slow", 130, "cancelling"), ("late", 0, "too late to cancel")])
def test_an_interrupt_cancels_and_waits_for_the_end(agent: FakeAgent, host: str, code: int, part: str) -> None:
    waiting = threading.Event()
    agent.migrations.on_waiting = waiting.set
    with popen(agent, "migrate", "ct101", host) as process:
        assert waiting.wait(10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert part in err and "Traceback" not in err


def test_a_watch_goes_on_after_the_agent_was_started_again(agent: FakeAgent) -> None:
    waiting = threading.Event()
    agent.migrations.on_waiting = waiting.set
    with popen(agent, "migrate", "ct101", "gone", "-o", "json") as process:
        assert waiting.wait(10)
        agent.close()
        agent.migrations.by_name["m1"].destination = "host-b"
        time.sleep(0.3)
        agent.start_again()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert json.loads(out)["outcome"] == "migrated"


def test_certificates_are_made_without_an_agent(tmp_path: Path) -> None:
    folder = str(tmp_path / "ca")
    assert CliRunner().invoke(main, ["cert", "init", folder]).exit_code == 0
    words = ["cert", "issue", folder, "host-a", "--role", "peer", "--address", "10.0.0.1", "-o", "json"]
    made = json.loads(CliRunner().invoke(main, words).stdout)
    assert Path(made["certificate"]).exists() and Path(made["key"]).stat().st_mode & 0o77 == 0
    assert CliRunner().invoke(main, words).exit_code == 2


def test_a_key_that_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    CliRunner().invoke(main, ["cert", "init", str(folder)])
    for name in ("alice", "bob"):
        CliRunner().invoke(main, ["cert", "issue", str(folder), name, "--role", "operator"])
    files = ["--ca", f"{folder}/ca.crt", "--cert", f"{folder}/alice.crt", "--key", f"{folder}/bob.key"]
    words = [sys.executable, "-c", SCRIPT, "--host", "127.0.0.1:1", *files, "ps"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert "certificates do not fit" in done.stderr


def test_an_agent_that_stays_away_leaves_7_and_what_is_known(agent: FakeAgent) -> None:
    waiting = threading.Event()
    agent.migrations.on_waiting = waiting.set
    script = "import migrator.cli.follow as f; f.RECONNECT_S = 1.0; " + SCRIPT
    words = [sys.executable, "-c", script, "--socket", agent.socket, "migrate", "ct101", "gone", "-o", "json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert waiting.wait(10)
        agent.close()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 7, err
    found = json.loads(out)
    assert (found["outcome"], found["where_running"]) == ("uncertain", None)
    assert "went away during precopy" in found["error"]["message"]
    assert "Traceback" not in err


def test_migrate_on_a_terminal_draws_the_phases(agent: FakeAgent) -> None:
    ours, theirs = pty.openpty()
    try:
        words = program(agent, "migrate", "ct101", "host-b")
        done = subprocess.run(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, check=False, timeout=20
        )
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0 and "ct101 moved" in done.stdout
    assert all(name in shown for name in ("preflight", "precopy", "handover"))
