"""Who may come to a host, when there are fewer places than migrations that want one."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import line
from migrator.errors import Busy, InvalidArgument
from migrator.line import Line


class Clock:
    """Stands until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_who_asks_first_comes_first(clock: Clock) -> None:
    made = Line(2, clock)
    assert [made.ask(f"host-{name}", name, 0.0, taken=1) for name in "abc"] == [0, 1, 2]
    assert made.has_place("host-a", "a", 1) and not made.has_place("host-b", "b", 1)
    made.leave("host-a", "a")  # it is on its way
    assert [made.ask(f"host-{name}", name, 0.0, taken=2) for name in "cb"] == [2, 1]
    assert [made.ask(f"host-{name}", name, 0.0, taken=1) for name in "cb"] == [1, 0]
    made.leave("host-b", "b")
    assert made.ask("host-c", "c", 0.0, taken=1) == 0


def test_who_has_never_asked_comes_behind_those_who_have(clock: Clock) -> None:
    """As a source of an older version does."""
    made = Line(2, clock)
    assert made.has_place("host-a", "old", 1)
    assert not made.has_place("host-a", "old", 2)
    made.ask("host-b", "new", 0.0, taken=1)
    assert not made.has_place("host-a", "old", 1)
    assert not made.has_place("host-a", "new", 1), "it is another host's place"


def test_who_stops_asking_has_left(clock: Clock) -> None:
    made = Line(1, clock)
    made.ask("host-a", "a", 0.0, taken=0)
    assert made.ask("host-b", "b", 0.0, taken=0) == 1
    clock.now += line.KEPT_S - 1
    assert made.ask("host-b", "b", 0.0, taken=0) == 1
    clock.now += 2
    assert not made.has_place("host-a", "a", 0)
    assert made.ask("host-b", "b", 0.0, taken=0) == 0


def test_a_line_that_was_lost_has_the_same_order_again(clock: Clock) -> None:
    made = Line(1, clock)
    assert made.ask("host-c", "c", 2.0, taken=1) == 1
    assert made.ask("host-b", "b", 5.0, taken=1) == 1
    assert made.ask("host-a", "a", 9.0, taken=1) == 1
    assert [made.ask(f"host-{name}", name, 0.0, taken=1) for name in "abc"] == [1, 2, 3]


def test_it_is_bounded(clock: Clock) -> None:
    made = Line(1, clock)
    for number in range(line.MOST_OF_ONE):
        made.ask("host-a", f"m-{number}", 0.0, taken=1)
    with pytest.raises(Busy, match="wait here already"):
        made.ask("host-a", "m", 0.0, taken=1)
    assert made.ask("host-b", "m", 0.0, taken=1) == line.MOST_OF_ONE + 1
    for wrong in (-1.0, 1e12, float("nan")):
        with pytest.raises(InvalidArgument):
            made.ask("host-b", "m", wrong, taken=1)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["ask", "come", "end", "leave", "later"]))))
def test_no_more_come_than_there_are_places(steps: list[tuple[str, str]]) -> None:
    clock = Clock()
    made, here = Line(2, clock), set[str]()
    for name, step in steps:
        if step == "ask" and name not in here:
            before = made.has_place("host", name, len(here))
            assert (made.ask("host", name, 0.0, len(here)) == 0) == before
        elif step == "come" and name not in here and made.has_place("host", name, len(here)):
            made.leave("host", name)
            here.add(name)
        elif step == "end":
            here.discard(name)
        elif step == "leave":
            made.leave("host", name)
        elif step == "later":
            clock.now += 10
        assert len(here) <= 2
