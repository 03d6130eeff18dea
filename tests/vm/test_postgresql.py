"""PostgreSQL on kernels of its own: moved under load, and without power; what it has acknowledged is there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.lab_kit import HOSTS, eventually
from tests.vm.vm_kit import SETTLE_S, Machines, faults_allowed

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = HOSTS
NAME, ADDRESS = "db", "10.77.2.103"
MOVES = ((A, B), (B, A))
PROMISE = "INSERT INTO promises DEFAULT VALUES RETURNING number \\watch 0.2\n"


@pytest.fixture(scope="module")
def database(machines_session: Machines) -> Iterator[Machines]:
    """Started again whenever it has ended, and agents that stop where they are asked to."""
    with faults_allowed(machines_session) as machines:
        machines.start_postgresql(A, NAME, ADDRESS, "--disk", "2GiB", "--restart", "always")
        machines.psql(ADDRESS, "CREATE TABLE promises (number serial PRIMARY KEY)")
        yield machines


def test_it_moves_under_load(database: Machines) -> None:
    """There and back: no transaction fails, and the books balance."""
    machines = database
    as_user = ("-h", ADDRESS, "-U", "postgres")
    machines.client_ok("pgbench", *as_user, "-i", "-q", "-s", "1", "postgres")
    # A tenth of what an emulated processor could do: it has to move it, too.
    load = ("pgbench", *as_user, "-c", "2", "-R", "5", "-T", "100000", "postgres")
    with machines.background("client", *load) as pgbench:
        eventually("it works", lambda: history(machines) > 0, SETTLE_S * machines.slower)
        for source, destination in MOVES:
            before = history(machines)
            machines.migrate(NAME, source, destination)
            eventually("it goes on", lambda n=before: history(machines) > n, SETTLE_S * machines.slower)  # type: ignore[misc]
        assert pgbench.poll() is None, pgbench.communicate()
        pgbench.terminate()
        _, err = pgbench.communicate(timeout=60)
    assert not re.search(r"error|abort|fatal|closed", err, re.IGNORECASE), err
    sums = {
        machines.psql(ADDRESS, f"SELECT sum({column}) FROM pgbench_{table}")
        for table, column in (("accounts", "abalance"), ("tellers", "tbalance"), ("history", "delta"))
    }
    assert len(sums) == 1, sums


def history(machines: Machines) -> int:
    return int(machines.psql(ADDRESS, "SELECT count(*) FROM pgbench_history"))


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("source.final", id="source in the freeze"),
        pytest.param("destination.owner", id="destination after the commit"),
        pytest.param("destination.settle", id="destination in the fill"),
    ],
)
def test_power_cut(database: Machines, tmp_path: Path, point: str) -> None:
    """Where its last copy is the disk's: each commit that the client was told of is on it."""
    machines = database
    with promising(machines, tmp_path) as promises:
        host = machines.move_until(NAME, point, lambda: None)
        machines.power_cut(host)
    machines.boot(host)
    machines.forget(host)
    machines.await_alone(NAME, [host])
    machines.await_postgresql(ADDRESS)
    promised = set(promises.read_text().split())
    found = set(machines.psql(ADDRESS, "SELECT number FROM promises").split())
    assert promised
    assert promised <= found, f"what was acknowledged is lost: {sorted(promised - found)}"
    assert machines.ok(host, "migrator", "volume", "check", NAME)
    assert machines.ps(host)[NAME]["lost"]


@contextmanager
def promising(machines: Machines, folder: Path) -> Iterator[Path]:
    """A client that has one row committed after the other; the file has the number of each that was acknowledged."""
    script, told = folder / "promise.sql", folder / "promises"
    script.write_text(PROMISE)
    psql = ("psql", "-h", ADDRESS, "-U", "postgres", "-AtqX", "-f", str(script))
    with told.open("w") as file, machines.background("client", *psql, stdout=file):
        eventually("it is promised", lambda: told.stat().st_size > 0, SETTLE_S * machines.slower)
        yield told
