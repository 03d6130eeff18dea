"""The fill behind real restores by CRIU: every page holds what it has to, whatever the process does meanwhile."""

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from migrator.errors import ExecutionError
from migrator.fill.keeper import Keeper
from migrator.fill.status import State, Status, is_held
from tests.contract.fill_kit import Room, Victim, children, kill_workers, room, victim, workers

pytestmark = pytest.mark.root

LAST_WORD = 9


@pytest.fixture(scope="module")
def made() -> Iterator[Room]:
    with room() as found:
        yield found


def move(moved: Victim) -> None:
    moved.dump()
    moved.launch()
    moved.restore()


@pytest.mark.parametrize(
    "scenario",
    ["none", "fork", "grandchildren", "exit", "exec", "munmap", "madvise", "mremap", "threads", "mixed", "slow"],
)
def test_every_page_is_right(made: Room, scenario: str) -> None:
    with victim(made, scenario, 24) as moved:
        move(moved)
        status = moved.wait_until_filled()
        assert (status.state, status.left_bytes, status.restarts) == (State.DONE, 0, 0), moved.log()
        assert moved.stored_bytes() == 0
        assert moved.wait_for("bad") == ["bad 0"]


@pytest.mark.parametrize("environment", [{"SPARSE": "1"}, {"HUGE": "1"}, {"LOCKED": "1"}, {"PROCESSES": "4"}])
def test_memory_of_all_kinds(made: Room, environment: dict[str, str]) -> None:
    with victim(made, "fork", 16, **environment) as moved:
        move(moved)
        assert moved.wait_until_filled().state is State.DONE, moved.log()
        assert set(moved.wait_for("bad", moved.count)) == {"bad 0"}


def test_what_criu_has_dumped_itself_is_restored(made: Room) -> None:
    with victim(made, "fork", 16) as moved:
        moved.dump(whole=True)
        moved.launch()
        moved.restore()
        assert moved.wait_until_filled().state is State.DONE, moved.log()
        assert moved.wait_for("bad") == ["bad 0"]


@pytest.mark.parametrize("scenario", ["mixed", "threads", "slow"])
def test_a_worker_that_dies_is_replaced(made: Room, scenario: str) -> None:
    with victim(made, scenario, 48) as moved:
        moved.dump()
        fill = moved.launch()
        moved.restore()
        kill_workers(fill, 3, 0.01)
        assert moved.wait_until_filled().state is State.DONE, moved.log()
        assert moved.wait_for("bad") == ["bad 0"]


def test_a_worker_that_dies_while_a_child_is_forked(made: Room) -> None:
    """The child's descriptor may be lost with it; then nothing runs with pages of zeros where its memory was."""
    with victim(made, "fork", 48) as moved:
        moved.dump()
        fill = moved.launch()
        moved.restore()
        for worker in workers(fill):
            os.kill(worker, signal.SIGKILL)
        if moved.wait_until_filled().state is State.DONE:
            assert moved.wait_for("bad") == ["bad 0"]
        else:
            assert not moved.members()
            assert not moved.lines("bad")


def test_without_its_keeper_it_goes_on(made: Room) -> None:
    with victim(made, "slow", 48) as moved:
        moved.dump()
        fill = moved.launch()
        moved.restore()
        os.kill(fill, signal.SIGKILL)
        assert moved.wait_until_filled().state is State.DONE, moved.log()
        assert moved.wait_for("bad") == ["bad 0"]


def test_a_keeper_that_dies_as_it_ends(made: Room) -> None:
    """Before its last word: the guard has that too."""
    with victim(made, "none", 4) as moved:
        moved.dump()
        keeper = os.fork()
        if keeper == 0:
            run_until_its_last_word(Keeper(moved.places))
        while moved.status.state is State.STARTING:
            time.sleep(0.005)
        moved.restore()
        assert os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) == LAST_WORD
        assert moved.wait_until_filled().state is State.DONE
        assert moved.wait_for("bad") == ["bad 0"]


def run_until_its_last_word(keeper: Keeper) -> None:
    me, write = os.getpid(), Status.write

    def last(said: Status, path: Path) -> None:
        if os.getpid() == me and said.state is State.DONE:
            os._exit(LAST_WORD)
        write(said, path)

    code = 1
    try:
        with patch.object(Status, "write", last):
            code = keeper.run()
    finally:
        os._exit(code)


def test_a_process_whose_memory_is_lost_does_not_go_on(made: Room) -> None:
    with victim(made, "slow", 512) as moved:
        moved.dump()
        fill = moved.launch()
        moved.restore()
        for process in (fill, *workers(fill)):
            os.kill(process, signal.SIGKILL)
        status = moved.wait_until_filled()
        assert status.state is State.FAILED
        assert "killed" in status.reason
        assert not moved.members()
        assert not moved.lines("bad")


def test_it_is_seen_when_all_of_it_died(made: Room) -> None:
    with victim(made, "slow", 512) as moved:
        moved.dump()
        fill = moved.launch()
        moved.restore()
        family = {process: os.pidfd_open(process) for process in (fill, *children(fill))}
        assert is_held(moved.places.status)
        for process in family:
            os.kill(process, signal.SIGKILL)
        ended = [ends(process) for process in family.values()]
        assert all(ended)
        assert not is_held(moved.places.status)


def test_it_can_be_called_off(made: Room) -> None:
    with victim(made, "none", 1) as moved:
        fill = moved.launch()
        family = [os.pidfd_open(pid) for pid in (fill, *children(fill))]
        os.kill(fill, signal.SIGTERM)
        ended = [ends(process) for process in family]
        assert all(ended)


def test_a_store_without_the_vdso_is_refused(made: Room) -> None:
    with victim(made, "none", 1) as moved:
        moved.dump()
        for file in moved.store.iterdir():
            os.truncate(file, 0)
        with pytest.raises(ExecutionError, match="vdso"):
            moved.restore()


def test_a_file_of_pages_that_is_too_short_is_refused(made: Room) -> None:
    with victim(made, "none", 1) as moved:
        moved.dump(whole=True)
        (pages,) = moved.images.glob("pages-*.img")
        os.truncate(pages, pages.stat().st_size - 4096)
        with pytest.raises(ExecutionError, match="too short"):
            moved.restore()


def ends(descriptor: int) -> bool:
    with os.fdopen(descriptor):
        return bool(select.select([descriptor], [], [], 5.0)[0])
