"""What stands between runc and CRIU, without either."""

import os
import subprocess
from pathlib import Path

import pytest

from agent import restorer
from agent.processes import note
from agent.restore import HeldRestore
from migrator.errors import ExecutionError


def test_one_that_is_late_to_ask_is_not_kept_waiting(tmp_path: Path) -> None:
    """The agent has given up, and nobody listened by then."""
    folder = tmp_path / "restore"
    folder.mkdir()
    for name in (restorer.GO, restorer.SAID, restorer.VERDICT):
        os.mkfifo(folder / name)
    HeldRestore(folder, tmp_path / "images", tmp_path / "programs").give_up()
    assert list(restorer.ask(folder, "warm", restorer.GO, restorer.RESTORER)) == []


@pytest.mark.parametrize(
    ("name", "who"), [(restorer.RUNC, "runc"), (restorer.RESTORER, "the restorer"), (restorer.CRIU, "CRIU")]
)
def test_who_has_ended_too_early_is_named(tmp_path: Path, name: str, who: str) -> None:
    restore = HeldRestore(tmp_path, tmp_path / "images", tmp_path / "programs")
    waiting = {each: subprocess.Popen(["sleep", "60"]) for each in (restorer.RUNC, restorer.RESTORER, restorer.CRIU)}
    try:
        for each, process in waiting.items():
            note(process.pid, tmp_path / each)
        restore.expect_waiting()
        waiting[name].kill()
        # A child that nobody has waited for yet has ended as well.
        os.waitid(os.P_PID, waiting[name].pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ExecutionError, match=f"^{who}, which waited to restore it, has ended"):
            restore.expect_waiting()
    finally:
        for process in waiting.values():
            process.kill()
            process.wait()
