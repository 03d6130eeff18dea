"""What the agent makes of the fill's status."""

from pathlib import Path

import pytest

from agent.arriving_memory import ArrivingMemory
from migrator.fill.status import State, Status, hold


def memory(folder: Path) -> ArrivingMemory:
    group = folder / "group"
    group.mkdir()
    (group / "cgroup.procs").touch()
    return ArrivingMemory(folder, folder / "images", folder / "work", group)


@pytest.mark.parametrize("state", [State.READY, State.RESTORING, State.FILLING])
def test_a_fill_of_which_nothing_is_left_has_failed(tmp_path: Path, state: State) -> None:
    Status(state, 4096).write(tmp_path / "fill.json")
    assert memory(tmp_path).is_filled()
    found = Status.read(tmp_path / "fill.json")
    assert found.state is State.FAILED
    assert "the container was killed" in found.reason


@pytest.mark.parametrize(("state", "filled"), [(State.FILLING, False), (State.DONE, True), (State.FAILED, True)])
def test_a_fill_that_lives_has_its_own_word(tmp_path: Path, state: State, filled: bool) -> None:
    hold(tmp_path / "fill.json")
    Status(state, 4096).write(tmp_path / "fill.json")
    assert memory(tmp_path).is_filled() is filled
    assert Status.read(tmp_path / "fill.json").state is state
