"""What is done behind the containers, and what is not."""

import os
import threading

import pytest

from migrator import priority


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def in_a_thread(work: "list[int]") -> None:
    with priority.behind_containers():
        work.append(niceness())
    work.append(niceness())


def test_this_thread_alone() -> None:
    before, seen = niceness(), list[int]()
    thread = threading.Thread(target=in_a_thread, args=(seen,))
    thread.start()
    thread.join()
    assert seen[0] == max(before, priority.NICENESS)
    assert niceness() == before
    if os.geteuid() == 0:
        assert seen[1] == before


def test_who_may_not_come_back_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(_: int, __: int, value: int) -> None:
        asked.append(value)
        if len(asked) == 2:
            raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with priority.behind_containers():
        pass
    assert asked == [max(niceness(), priority.NICENESS), niceness()]
