"""A handover whose other host stays away: what an operator is told, and what one's word does. And a source that was
rebooted before it had decided."""

import json
import os
import signal
from pathlib import Path

import pytest

from labkit.hosts import host_named
from tests.lab.crash_kit import NAME, A, B, Crashes
from tests.lab.lab_kit import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]


def resolve(ready: Crashes, host: str, *options: str) -> tuple[int, dict[str, object]]:
    done = ready.lab.run(host, "migrator", "resolve", NAME, *options, "-o", "json")
    return done.returncode, json.loads(done.stdout or "{}")


def test_the_destination_is_gone(ready: Crashes) -> None:
    code, found = resolve(ready, A, "--here", "--yes")
    assert (code, found["error"]["reason"]) == (3, "NOTHING_TO_RESOLVE")  # type: ignore[index]
    ready.ask(B, "destination.released", "kill")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("it is dead", lambda: ready.reached(B, "destination.released") and not ready.agent_runs(B), 30)
        code, found = resolve(ready, A)
        assert (code, found["side"], found["peer"], found["heard"]) == (0, "source", B, "it is ready")
        assert not found["peer_answers"] and "cannot be reached" in str(found["answer"])
        code, found = resolve(ready, A, "--here", "--yes")
        assert (code, found["kept"]) == (0, "here")
        value = ready.counter()
        eventually("it counts on", lambda: ready.counter() > value, 10)
        ready.forget()
        # What the destination holds when it is back, it gives up.
        ready.settled(moved=False)
    print(f"resolved at the source: longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, A, B)


def test_the_source_is_gone(ready: Crashes) -> None:
    """As far as the destination can see: in truth it hangs before it has decided, and comes back."""
    ready.ask(A, "source.ready", "hang")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("it hangs", lambda: ready.reached(A, "source.ready"), 30)
        code, found = resolve(ready, B, "--here", "--yes")
        assert (code, found["error"]["reason"]) == (3, "PEER_ANSWERS")  # type: ignore[index]
        ready.lab.lab("cut", A)
        eventually("it is silent", lambda: not resolve(ready, B)[1]["peer_answers"], 20)
        code, found = resolve(ready, B, "--here", "--yes")
        assert (code, found["side"], found["kept"]) == (0, "destination", "here")
        value = ready.counter()
        eventually("it counts on", lambda: ready.counter() > value, 10)
        ready.lab.lab("heal", A)
        ready.forget()
        ready.settled(moved=True)
    print(f"resolved at the destination: longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, B, A)


def test_the_source_is_rebooted_before_it_has_decided(ready: Crashes) -> None:
    """The container's memory is at the destination alone: it goes on there."""
    ready.ask(A, "source.ready", "hang")
    with ready.counting(), ready.migrating(A, B):
        eventually("it hangs", lambda: ready.reached(A, "source.ready"), 30)
        lose(A)
        ready.forget()
        ready.settled(moved=True)
    ready.lab.migrate(NAME, B, A)


def lose(name: str) -> None:
    """Agent, guard and container are gone at once, as by a reboot."""
    inside = {pid: text for pid in processes(host_named(name).init_pid()) if (text := command(pid))}
    (guard,) = [pid for pid, text in inside.items() if "agent.guard" in text and NAME in text]
    tasks = [pid for pid, text in inside.items() if "redis-server" in text]
    assert tasks
    os.kill(guard, signal.SIGSTOP)
    for pid in [pid for pid, text in inside.items() if "migrator-agent" in text]:
        os.kill(pid, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    for pid in tasks:
        os.kill(pid, signal.SIGKILL)
    thaw(tasks[0])


def processes(init: int) -> list[int]:
    """Those in the pid namespace of a host, and below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {init}
    while more := {pid for pid, above in parents.items() if above in found} - found:
        found |= more
    return sorted(found)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def thaw(pid: int) -> None:
    """A frozen task of version 1 dies when it is thawed."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "freezer":
            Path(f"/sys/fs/cgroup/freezer{path}/freezer.state").write_text("THAWED")
