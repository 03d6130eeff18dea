"""The freezer of the kernel that this runs on."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroup import Cgroup

pytestmark = pytest.mark.root


@pytest.fixture
def group() -> Iterator[Cgroup]:
    made = Cgroup("/migrator-test-freezer")
    made.freezer.mkdir(exist_ok=True)
    try:
        yield made
    finally:
        made.thaw()
        made.kill()
        made.destroy()


def test_no_task_is_stopped_between_vfork_and_execve(group: Cgroup) -> None:
    """dash starts every program that way, and is in the middle of it at every fifth look without waiting for that."""
    with subprocess.Popen(["dash", "-c", "while :; do /bin/true; done"], cwd="/") as shell:
        (group.freezer / "cgroup.procs").write_text(str(shell.pid))
        midway = []
        for _ in range(60):
            time.sleep(0.003)
            group.freeze(10)
            assert group.is_frozen()
            midway += [
                wait for pid in group.pids() if (wait := Path(f"/proc/{pid}/wchan").read_text()) == "kernel_clone"
            ]
            group.thaw()
        shell.kill()
    assert midway == []
