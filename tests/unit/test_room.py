"""When containers stand still for want of room: a decision from numbers."""

import pytest

from agent.room import is_short
from blockdev.pool import Room

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "unwritten", "rate", "was_short", "short"),
    [
        (1.1, 0, 0, False, False),
        (0.9, 0, 0, False, True),
        (1.5, 0.6, 0, False, True),
        (1.5, 0.4, 0, False, False),
        (2.9, 0, 1, False, True),
        (3.1, 0, 1, False, False),
        (1.1, 0, -5, False, False),  # it is being emptied
        (1.9, 0, 0, True, True),
        (2.0, 0, 0, True, False),
        (2.0, 5, 5, True, False),  # what stood still has written all that it had
        (0, 0, 0, False, True),
    ],
)
def test_containers_stand_still_early_and_go_on_late(
    free: float, unwritten: float, rate: float, was_short: bool, short: bool
) -> None:
    room = Room(int(free * GIB), GIB)
    assert is_short(room, int(unwritten * GIB), rate * GIB, was_short=was_short) is short


def test_the_reserve_is_not_given_away() -> None:
    assert Room(5 * GIB, GIB).available_bytes == 3 * GIB
    assert Room(GIB, GIB).available_bytes == 0
