"""Two hosts, one with the agent of another revision: MIGRATOR_PREVIOUS=v1.2.3, or any other word for a commit."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.lab_kit import CHECKOUT, HOSTS, Lab

pytestmark = [pytest.mark.lab, pytest.mark.root]

A, B = HOSTS
NAME, ADDRESS = "versions", "10.77.2.180"
PROGRAM = """#!{python}
import sys

from agent.main import main

sys.exit(main())
"""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent of that revision, with today's dependencies."""
    folder = tmp_path_factory.mktemp("previous")
    code = folder / "code"
    code.mkdir()
    archive = folder / "code.tar"
    revision = os.environ["MIGRATOR_PREVIOUS"]
    subprocess.run(["git", "-C", str(CHECKOUT), "archive", "-o", str(archive), revision], check=True)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(code)], check=True)
    # Not by PYTHONPATH: some of the agent's programs are started without regard to it.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    (packages / "previous.pth").write_text(f"{code}\n{sysconfig.get_path('purelib')}\n")
    program = folder / "migrator-agent"
    program.write_text(PROGRAM.format(python=folder / "venv/bin/python"))
    program.chmod(0o755)
    return program


Become = Callable[[str, Path | None], None]


@pytest.fixture
def become(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Become]:
    """Restart a host's agent as another version; None is today's."""

    def restart(host: str, program: Path | None) -> None:
        lab.lab("kill", host)
        with monkeypatch.context() as patch:
            if program is not None:
                patch.setenv("MIGRATOR_LAB_AGENT", str(program))
            lab.lab("start", host)

    yield restart
    for host in HOSTS:
        restart(host, None)


@pytest.mark.parametrize("older", [A, B])
def test_it_moves_there_and_back(lab: Lab, previous: Path, become: Become, older: str) -> None:
    become(older, previous)
    lab.start_redis(A, NAME, ADDRESS, "--disk", "1GiB")
    with lab.counting(ADDRESS) as client:
        for source, destination in ((A, B), (B, A)):
            lab.migrate(NAME, source, destination)
            assert not lab.clean(source)
    assert client["wrong"] == [] and client["same_connection"]


def test_hosts_are_upgraded_one_by_one(lab: Lab, previous: Path, become: Become) -> None:
    """A container that the older agents have made and moved stays as it is, and moves on."""
    become(A, previous)
    become(B, previous)
    lab.start_redis(A, NAME, ADDRESS, "--disk", "1GiB")
    with lab.counting(ADDRESS) as client:
        lab.migrate(NAME, A, B)
        become(A, None)
        lab.migrate(NAME, B, A)
        become(B, None)
        lab.migrate(NAME, A, B)
    assert client["wrong"] == [] and client["same_connection"]
