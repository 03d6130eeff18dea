"""Memory that is pulled after the handover: never a wrong byte, whoever dies, and an end if its last copy is lost."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import victim
from tests.lab.crash_kit import Crashes, faults_allowed
from tests.lab.lab_kit import HOSTS, Lab, eventually
from tests.lab.victim import POSTCOPY, expect_whole, start

pytestmark = [pytest.mark.lab, pytest.mark.root]

# The image is at the second: of the disk there is little to send then, however slow the link is.
A, B = reversed(HOSTS)
NAME = "endless"
# Whatever waits for pages goes on by then.
PULL_S = 60
# A move whose last memory is little by chance leaves nothing behind.
TRIES = 3


@pytest.fixture(scope="module")
def program() -> str:
    return victim.compiled()


@pytest.fixture(scope="module")
def allowed(lab_session: Lab) -> Iterator[Crashes]:
    with faults_allowed(lab_session) as made:
        yield made


@pytest.fixture
def faulty(allowed: Crashes, lab: Lab, program: str) -> Iterator[Crashes]:
    """The container at A, and agents that fail where they are asked to."""
    allowed.forget()
    start_at_a(lab, program, 24)
    yield allowed
    allowed.forget()


def start_at_a(lab: Lab, program: str, mib: int) -> None:
    start(lab, program, NAME, mib)
    lab.migrate(NAME, B, A)


def phases(report: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in report["phases"]]


def expect_moved(lab: Lab) -> None:
    """All of it is at B, and nothing at A."""
    eventually("it is at B alone", lambda: lab.where(NAME) == [B], 60)
    expect_whole(lab, B, NAME, PULL_S)
    eventually("nothing is left to pull", lambda: not lab.leftovers(A), 60)


def test_never_a_wrong_byte(lab: Lab, program: str) -> None:
    start_at_a(lab, program, 24)
    pulled = 0
    for _ in range(2):
        report = lab.migrate(NAME, A, B, *POSTCOPY)
        print(f"{report['downtime_ms']:.0f} ms", *report["notes"], sep="\n")
        # In a quiet moment nothing need stay behind.
        pulled += phases(report)[-3:] == ["handover", "pull", "finish"]
        assert not report["missing_bytes"]
        # Half of a second goes for the images, at that rate.
        assert report["downtime_ms"] < 2500
        expect_whole(lab, B, NAME, PULL_S)
        assert not [kind for kind, found in lab.clean(A).items() if found]
        lab.migrate(NAME, B, A)
    assert pulled


def test_it_says_how_much_is_missing(lab: Lab, program: str) -> None:
    start_at_a(lab, program, 64)
    with lab.background(A, "migrate", NAME, B, *POSTCOPY) as process:
        eventually("it pulls", lambda: any(row["missing_bytes"] for row in migrations(lab)), 60)
        (running,) = [row for row in migrations(lab) if row["outcome"] == "running"]
        assert (running["where_running"], running["phases"][-1]["name"]) == (B, "pull")
        assert lab.ps(B)[NAME]["pulls_from"] == A
        assert f"running, pulls from {A}" in lab.ok(B, "migrator", "ps")
        done = lab.run(A, "migrator", "migrations", "cancel", running["migration"])
        assert done.returncode != 0 and "committed" in done.stderr
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"is still at {A}" in err
    assert f"moved from {A} to {B}" in out
    expect_whole(lab, B, NAME, PULL_S)


def migrations(lab: Lab) -> list[dict[str, Any]]:
    names = [row["migration"] for row in json.loads(lab.ok(A, "migrator", "migrations", "ls", "-o", "json"))]
    return [json.loads(lab.ok(A, "migrator", "migrations", "show", name, "-o", "json")) for name in names[:1]]


def test_a_disk_cannot_be_left_behind(lab: Lab) -> None:
    lab.image(B, "tools")
    write = "while :; do dd if=/dev/urandom of=/file bs=1M count=24 conv=fsync 2>/dev/null; done"
    lab.start(B, "writer", "tools", "--disk", "1GiB", command=["sh", "-c", write])
    lab.migrate("writer", B, A)
    fast = ("--on-no-converge", "postcopy", "--bandwidth", "100Mbit/s", "--max-downtime", "20ms")
    code, report = lab.try_migrate("writer", A, B, *fast)
    assert (code, report["outcome"], report["error"]["reason"]) == (5, "rolled_back", "NOT_CONVERGED"), report
    assert "only private memory can be pulled" in report["error"]["message"]


@pytest.mark.parametrize(
    ("host", "point"),
    [(A, "source.pulled"), (A, "source.lend"), (B, "destination.pulled"), (B, "destination.owner")],
)
def test_either_agent_dies(faulty: Crashes, host: str, point: str) -> None:
    lab = faulty.lab
    for _ in range(TRIES):
        faulty.ask(host, point, "kill")
        with lab.background(A, "migrate", NAME, B, *POSTCOPY, "-o", "json") as moving:
            eventually(
                "the agent died, or all could be sent",
                lambda m=moving: not faulty.agent_runs(host) or m.poll() is not None,  # type: ignore[misc]
                60,
            )
            died = not faulty.agent_runs(host)
            faulty.forget()
            if died:
                lab.lab("start", host)
                expect_moved_or_not(lab, point)
                return
        eventually("it is at one host", lambda: len(lab.where(NAME)) == 1 and not busy(lab), 90)
        if lab.where(NAME) == [B]:
            lab.migrate(NAME, B, A)
    raise AssertionError(f"no move has come to {point}")


def expect_moved_or_not(lab: Lab, point: str) -> None:
    """Where it dies before the handover, as it may while the first page is pulled, the container goes on as ever."""
    eventually("it is at one host", lambda: len(lab.where(NAME)) == 1 and not busy(lab), 90)
    (where,) = lab.where(NAME)
    assert where == B or point.endswith("pulled")
    if where == B:
        expect_moved(lab)
    else:
        expect_whole(lab, A, NAME, PULL_S)


def busy(lab: Lab) -> bool:
    rows = [row for host in HOSTS for row in lab.ps(host).values()]
    return any(row["migration"] or row["state"] != "running" for row in rows)


@contextmanager
def pulling(faulty: Crashes) -> Iterator["subprocess.Popen[str]"]:
    """A migration whose container runs at B, while A waits before it asks how much is missing: until `forget`."""
    faulty.ask(A, "source.lend", "hang")
    with faulty.lab.background(A, "migrate", NAME, B, *POSTCOPY, "-o", "json") as process:
        eventually("it pulls", lambda: faulty.reached(A, "source.lend"), 60)
        yield process


def test_the_link_is_cut(faulty: Crashes) -> None:
    lab = faulty.lab
    with pulling(faulty) as process:
        lab.lab("cut", A)
        faulty.forget()
        out, err = process.communicate(timeout=60)
        report = json.loads(out)
        assert (process.returncode, report["outcome"]) == (7, "uncertain"), err
        assert f"runs at {B}" in report["error"]["message"]
        lab.lab("heal", A)
        expect_moved(lab)


def test_the_source_loses_its_power(faulty: Crashes) -> None:
    """And with it pages that are nowhere else: the container is ended, not left to read others."""
    lab = faulty.lab
    with pulling(faulty):
        lab.lab("power-cut", A)
        faulty.forget()
        lab.lab("boot", A)
        eventually("it is ended", lambda: lab.ps(B)[NAME]["state"] == "stopped", 60)
        eventually("it is at B alone", lambda: lab.where(NAME) == [B], 60)
    eventually("nothing is left at A", lambda: not lab.leftovers(A), 60)


def test_the_destination_is_gone_for_good(faulty: Crashes) -> None:
    """An operator says so: it goes on at the source, as it was at the freeze."""
    lab = faulty.lab
    with pulling(faulty):
        lab.lab("power-cut", B)
        faulty.forget()
        eventually("it can be resolved", lambda: resolved(lab), 60)
        eventually("that is done", lambda: not lab.ps(A)[NAME]["migration"], 60)
        expect_whole(lab, A, NAME, PULL_S)
        # It comes back all the same, and had been the owner: the disk is there, and the memory went with the power.
        lab.lab("boot", B)
        eventually("its copy is found", lambda: lab.ps(B).get(NAME, {}).get("state") == "stopped", 60)
        assert lab.ps(B)[NAME]["lost"]
        expect_whole(lab, A, NAME, PULL_S)


def resolved(lab: Lab) -> bool:
    return lab.run(A, "migrator", "resolve", NAME, "--here", "--yes").returncode == 0
