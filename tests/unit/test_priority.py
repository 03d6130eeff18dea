"""What is done behind the containers, and what is not."""

import os
import threading

import pytest

from migrator import priority


def seen_in_a_thread() -> list[int]:
    seen = []

    def work() -> None:
        with priority.behind_containers():
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))
        seen.append(os.getpriority(os.PRIO_PROCESS, 0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return seen


def test_one_thread_to_the_end_of_the_block() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    behind = max(before, priority.NICENESS) if os.geteuid() == 0 else before
    assert seen_in_a_thread() == [behind, before]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_who_could_not_come_back_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "_may_come_back", lambda: False)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen_in_a_thread() == [before, before]
