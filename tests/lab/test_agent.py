"""The agent as a process: started, locked, killed and stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from blockdev import pool
from migrator import channel
from migrator.errors import Exit
from migrator.v1 import host_pb2, host_pb2_grpc

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

START_S = 20.0


class Agent:
    """One agent with folders of its own and no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.socket = folder / "run/agent.sock"
        self.file = folder / "config.toml"
        self.file.write_text(
            f'host = "host-x"\nstate_dir = "{self.state}"\nrun_dir = "{folder}/run"\ncache_dir = "{folder}/cache"\n'
            f'cgroup_parent = "migrator-test-agent-{os.getpid()}"\npool_size = "1GiB"\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.main", "--config", str(self.file)],
                stderr=log,
                env=os.environ | environment,
            )

    def ask(self) -> host_pb2.Host:
        with channel.connect_local(self.socket) as connection:
            stub = host_pb2_grpc.HostServiceStub(connection)
            host: host_pb2.Host = stub.GetHost(host_pb2.GetHostRequest(), timeout=START_S, wait_for_ready=True).host
            return host

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.end(signal.SIGKILL)
    pool.close(made.state)


def test_it_answers_on_its_socket_and_ends_when_told(agent: Agent) -> None:
    agent.start()
    host = agent.ask()
    assert (host.name, host.reachable, host.containers_total) == ("host-x", True, 0)
    assert agent.socket.stat().st_mode & 0o777 == 0o660
    assert agent.end() == 0
    assert not agent.socket.exists()


def test_it_starts_again_after_it_was_killed(agent: Agent) -> None:
    agent.start()
    agent.ask()
    agent.end(signal.SIGKILL)
    agent.start()
    assert agent.ask().name == "host-x"
    assert agent.end(signal.SIGINT) == 0


def test_a_second_one_is_refused(agent: Agent) -> None:
    agent.start()
    agent.ask()
    command = [sys.executable, "-m", "agent.main", "--config", str(agent.file)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert second.returncode == Exit.PREFLIGHT
    assert f"pid {agent.process.pid if agent.process else 0}" in second.stderr
    assert agent.ask().name == "host-x"


def test_a_broken_configuration_is_refused(agent: Agent) -> None:
    agent.file.write_text(agent.file.read_text() + "pol_size = 3\n")
    agent.start()
    assert agent.process is not None
    assert agent.process.wait(30) == Exit.USAGE
    assert "did you mean pool_size" in agent.log()


def test_systemd_is_told(agent: Agent) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(agent.folder / "notify"))
        manager.settimeout(START_S)
        agent.start(NOTIFY_SOCKET=str(agent.folder / "notify"))
        assert manager.recv(100) == b"READY=1"
        agent.end()
        assert manager.recv(100) == b"STOPPING=1"


def test_changes_leave_a_line_in_the_audit_log(agent: Agent) -> None:
    from migrator.v1 import image_pb2, image_pb2_grpc

    agent.start()
    agent.ask()
    with channel.connect_local(agent.socket) as connection, pytest.raises(grpc.RpcError):
        image_pb2_grpc.ImageServiceStub(connection).DeleteImage(image_pb2.DeleteImageRequest(name="none"), timeout=5)
    agent.end()
    lines = [json.loads(line) for line in agent.log().splitlines() if line.startswith("{")]
    (audit,) = [line for line in lines if line["event"] == "call"]
    assert {key: audit[key] for key in ("who", "role", "method", "image", "outcome")} == {
        "who": "local",
        "role": "operator",
        "method": "DeleteImage",
        "image": "none",
        "outcome": "IMAGE_NOT_FOUND",
    }


def test_the_doctor_needs_no_agent(agent: Agent) -> None:
    command = [sys.executable, "-m", "agent.doctor", "--config", str(agent.file), "-o", "json"]
    begin_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert time.monotonic() - begin_s < 20
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    has_problem = any(finding["severity"] == "problem" for finding in findings.values())
    assert done.returncode == (Exit.PREFLIGHT if has_problem else Exit.DONE)
    assert {"kernel.version", "criu", "runc", "conmon", "disk.direct_io", "network.bridge", "certificates"} <= set(
        findings
    )
    assert all(finding["remedy"] for finding in findings.values() if finding["severity"] != "ok")
    assert findings["certificates"]["severity"] == "warning"
