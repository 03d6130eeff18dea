"""The virtual machines: up once for all tests, clean after each."""

import os
from collections.abc import Iterator

import pytest

from tests.lab.conftest import no_work
from tests.lab.lab_kit import HOSTS, eventually
from tests.vm import vm_kit
from tests.vm.vm_kit import Machines


@pytest.fixture(scope="session")
def machines_session() -> Iterator[Machines]:
    """Two machines, taken down at the end; one that is up is used, and kept, with MIGRATOR_VM_KEEP=1."""
    if os.geteuid() != 0:
        pytest.skip("virtual machines need root")
    keep = os.environ.get("MIGRATOR_VM_KEEP") == "1"
    os.environ["LAB_ANSWER_S"] = "600"  # for the client, whatever the emulator is kept from
    os.environ["LAB_PACE_S"] = "0.25"  # an emulated processor has nothing else to do otherwise
    machines = Machines()
    if not (keep and machines.status()):
        vm_kit.up(vm_kit.suite())
    try:
        for host in HOSTS:
            what = machines.ok(host, "sh", "-c", ". /etc/os-release; echo $PRETTY_NAME, Linux $(uname -r)")
            print(f"\n{host}: {what.strip()}")
        machines.remember()
        yield machines
    finally:
        if not keep:
            vm_kit.down()


@pytest.fixture
def machines(machines_session: Machines) -> Iterator[Machines]:
    """No container on any machine before and after the test; what a removal leaves behind fails the test."""
    yield machines_session
    machines_session.boot_all()
    for host in HOSTS:
        machines_session.lab("heal", host)
        machines_session.await_agent(host)
        eventually(f"{host} has no work left", lambda h=host: no_work(machines_session, h), 30 * vm_kit.SLOWER)  # type: ignore[misc]
    machines_session.remove_all()
    left = {host: machines_session.clean(host) for host in HOSTS}
    assert not any(left.values()), f"left behind after every container was removed: {left}"
