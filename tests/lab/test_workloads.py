"""What processes consist of survives a move there and back: threads, pipes, sockets, timers, signals, files."""

import pytest

from tests.lab.lab_kit import Lab, eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.110"
MOVES = (("host-a", "host-b"), ("host-b", "host-a"))


@pytest.mark.parametrize("feature", ["threads", "tree", "sockets", "timers", "signals", "deleted", "shm", "pool"])
def test_it_survives(lab: Lab, feature: str) -> None:
    """Asked by the client before, between and after: nothing wrong, nothing different, everything goes on."""
    lab.start_workload("host-a", feature, feature, ADDRESS, "--disk", "1GiB", "--shm-size", "100MiB")
    before = lab.ask(ADDRESS)
    assert before["wrong"] == []
    assert feature != "shm" or before["same"]["size"] == 100 << 20
    for source, destination in MOVES:
        lab.migrate(feature, source, destination, "--verify")
        now = lab.ask(ADDRESS)
        assert now["wrong"] == []
        assert now["same"] == before["same"]
        stands = [name for name, value in now["grows"].items() if value < before["grows"][name]]
        assert not stands, f"counters that went back: {stands}"
        eventually(f"all of {sorted(now['grows'])} go on", lambda n=now: grown(lab, n["grows"]), 5)  # type: ignore[misc]
        before = now
    if feature == "signals":
        # SIGUSR1, SIGUSR2, and three of SIGRTMIN+2 with their values.
        assert lab.ask(ADDRESS, "take")["taken"] == [[10, 0], [12, 0], [36, 11], [36, 12], [36, 13]]


def grown(lab: Lab, before: dict[str, int], address: str = ADDRESS) -> bool:
    """Whether every counter has gone on."""
    now = lab.ask(address)["grows"]
    return all(now[name] > value for name, value in before.items())


def test_log_is_complete_across_moves(lab: Lab) -> None:
    """Numbered lines on both streams: none is missing, none is there twice."""
    lab.start_workload("host-a", "lines", "lines", ADDRESS)
    for source, destination in MOVES:
        lab.migrate("lines", source, destination)
    lab.ok("host-a", "migrator", "kill", "-s", "KILL", "lines")
    eventually("it has ended", lambda: lab.ps("host-a")["lines"]["state"] == "stopped")
    done = lab.run("host-a", "migrator", "logs", "lines")
    written = done.stdout.splitlines()
    assert len(written) > 500
    assert written == [f"line {number}" for number in range(len(written))]
    errors = done.stderr.splitlines()
    assert errors == [f"error {number * 10}" for number in range(len(errors))]
    assert len(written) - 10 * len(errors) in range(-9, 2)
