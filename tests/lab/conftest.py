"""The lab for the tests that move containers between hosts: up once for all of them, and clean after each."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import pool
from tests.lab.containers_kit import TestImage, make_image, need
from tests.lab.crash_kit import NAME, A, Crashes, faults_allowed
from tests.lab.lab_kit import HOSTS, SCRIPT, Lab, eventually

# Only against a revision that somebody has named.
collect_ignore = [] if os.environ.get("MIGRATOR_PREVIOUS") else ["test_versions.py"]


@pytest.fixture(scope="session")
def lab_session() -> Iterator[Lab]:
    """Two hosts, taken down at the end."""
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    up = subprocess.run([SCRIPT, "up", "--hosts", "2"], capture_output=True, text=True, check=False, timeout=120)
    assert up.returncode == 0, f"scripts/lab up: {up.stderr}"
    try:
        lab = Lab()
        lab.remember()
        yield lab
    finally:
        down = subprocess.run([SCRIPT, "down"], capture_output=True, text=True, check=False, timeout=120)
    assert down.returncode == 0, f"scripts/lab down: {down.stderr}"


@pytest.fixture
def lab(lab_session: Lab) -> Iterator[Lab]:
    """The lab, with no container on any host before and after the test; what a removal leaves behind fails the test.

    The agents run and the links are up afterwards, also where the test has killed or cut them.
    """
    yield lab_session
    mend(lab_session)
    for host in HOSTS:
        eventually(f"{host} has no work left", lambda h=host: no_work(lab_session, h), 30)  # type: ignore[misc]
    lab_session.remove_all()
    left = {host: lab_session.clean(host) for host in HOSTS}
    assert not any(left.values()), f"left behind after every container was removed: {left}"


def mend(lab: Lab) -> None:
    """Every agent runs, every link is up."""
    for row in lab.status():
        if row["link"] == "cut":
            lab.lab("heal", row["name"])
        if row["agent"] != "running":
            lab.lab("start", row["name"])


def no_work(lab: Lab, host: str) -> bool:
    """No container of the host is arriving or in a migration."""
    return all(not row["migration"] and row["state"] != "arriving" for row in lab.ps(host).values())


@pytest.fixture(scope="module")
def crashes(lab_session: Lab) -> Iterator[Crashes]:
    """Both agents with faults allowed, and the container."""
    with faults_allowed(lab_session) as made:
        made.start_redis()
        yield made


@pytest.fixture
def ready(crashes: Crashes) -> Iterator[Crashes]:
    """The container at host-a, no fault asked for."""
    crashes.forget()
    (where,) = crashes.lab.where(NAME)
    if where != A:
        crashes.lab.migrate(NAME, where, A)
    yield crashes
    crashes.forget()
    for row in crashes.lab.status():
        if row["link"] == "cut":
            crashes.lab.lab("heal", row["name"])


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pool of a module's own, sparse, for containers without the lab."""
    need("runc", "conmon", "/bin/busybox", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
    state = tmp_path_factory.mktemp("state")
    try:
        yield pool.ensure(state, 4 << 30)
    finally:
        pool.close(state)


@pytest.fixture(scope="module")
def image(pool_folder: Path) -> TestImage:
    """What its containers are made from."""
    return make_image(pool_folder / "tiny.img")
