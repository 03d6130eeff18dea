"""What the agent makes of the fill's status."""

import os
from pathlib import Path

import pytest

from agent.arriving_memory import ArrivingMemory
from migrator.fill.status import Hold, State, Status


def memory(folder: Path) -> ArrivingMemory:
    group = folder / "group"
    group.mkdir()
    (group / "cgroup.procs").touch()
    return ArrivingMemory(folder, folder / "work", group)


@pytest.mark.parametrize("state", [State.READY, State.RESTORING, State.FILLING])
def test_a_fill_of_which_nothing_is_left_has_failed(tmp_path: Path, state: State) -> None:
    Status(state, 4096).write(tmp_path / "fill.json")
    assert memory(tmp_path).is_filled()
    found = Status.read(tmp_path / "fill.json")
    assert found.state is State.FAILED
    assert "the container was killed" in found.reason


@pytest.mark.parametrize("state", [State.RESTORING, State.FILLING])
def test_one_that_had_finished_has_not(tmp_path: Path, state: State) -> None:
    """Nobody could write it down: the file system was full."""
    Status(state, 4096).write(tmp_path / "fill.json")
    child = os.fork()
    if child == 0:
        Hold(tmp_path / "fill.json").finish()
        os._exit(0)
    os.waitpid(child, 0)
    assert memory(tmp_path).is_filled()
    assert Status.read(tmp_path / "fill.json").state is state


def test_where_there_was_none(tmp_path: Path) -> None:
    """A container that did not run, or a host that was booted since."""
    group = tmp_path / "group"
    group.mkdir()
    folder = tmp_path / "gone"
    assert ArrivingMemory(folder, folder / "work", group).is_filled()
    assert not folder.exists()


@pytest.mark.parametrize(("state", "filled"), [(State.FILLING, False), (State.DONE, True), (State.FAILED, True)])
def test_a_fill_that_lives_has_its_own_word(tmp_path: Path, state: State, filled: bool) -> None:
    Hold(tmp_path / "fill.json")
    Status(state, 4096).write(tmp_path / "fill.json")
    assert memory(tmp_path).is_filled() is filled
    assert Status.read(tmp_path / "fill.json").state is state
