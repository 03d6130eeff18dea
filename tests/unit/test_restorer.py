"""What stands between runc and CRIU, without either."""

import os
from pathlib import Path

from agent import restorer
from agent.restore import HeldRestore


def test_one_that_is_late_to_ask_is_not_kept_waiting(tmp_path: Path) -> None:
    """The agent has given up, and nobody listened by then."""
    folder = tmp_path / "restore"
    folder.mkdir()
    for name in (restorer.GO, restorer.SAID, restorer.VERDICT):
        os.mkfifo(folder / name)
    HeldRestore(folder, tmp_path / "images", tmp_path / "programs").give_up()
    assert list(restorer.ask(folder, "warm", restorer.GO, restorer.RESTORER)) == []
