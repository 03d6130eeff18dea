"""The agent of a host: start it, wait for it, kill it."""

import os
import socket
import subprocess

from labkit.hosts import NAMESPACES, PATH, Host, LabError, wait_for

CONFIGURATION = ("--config", "/etc/migrator/config.toml")
ANSWER_SECONDS = 60.0
END_SECONDS = 60.0


def start(host: Host) -> None:
    """Start the agent and wait until its socket is answered."""
    if host.agent_pid():
        raise LabError(f"the agent of {host.name} is running already", 2)
    launch(host)
    wait_until_it_answers(host)


def launch(host: Host) -> None:
    pid = host.init_pid()
    if not pid:
        raise LabError(f"{host.name} is not running: scripts/lab down, then scripts/lab up", 4)
    # In the background of a shell setsid does not fork, so $! is the agent's own pid.
    detached = 'setsid "$@" </dev/null >>"$0" 2>&1 & echo $! >/run/lab-agent.pid'
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    # Another version's, if a test wishes so.
    program = os.environ.get("MIGRATOR_LAB_AGENT", "migrator-agent")
    # See migrator/faults.py: a test's wish, for agents that are started by it.
    environment |= {name: os.environ[name] for name in ("MIGRATOR_FAULTS",) if name in os.environ}
    enter = ["nsenter", f"--target={pid}", *NAMESPACES, "--wdns=/", "--"]
    subprocess.run([*enter, "sh", "-c", detached, str(host.log), program, *CONFIGURATION], env=environment, check=True)


def wait_until_it_answers(host: Host) -> None:
    socket_path = f"/proc/{host.init_pid()}/root/run/migrator/agent.sock"

    def answers() -> bool:
        if not host.agent_pid():
            raise LabError("the agent ended")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(socket_path)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    try:
        wait_for("the agent did not answer", ANSWER_SECONDS, answers)
    except LabError as error:
        tail = "\n".join(host.log.read_text(errors="replace").splitlines()[-30:])
        raise LabError(f"{host.name}: {error}; the end of its log:\n{tail}") from None


def kill(host: Host) -> None:
    pid = host.agent_pid()
    if not pid:
        raise LabError(f"the agent of {host.name} is not running", 4)
    subprocess.run(host.inside("kill", "-9", str(pid)), check=True)
    wait_for(f"the agent of {host.name} did not end", END_SECONDS, lambda: not host.agent_pid())
