"""When another round pays: tables of what was measured, and simulated containers that end in the right way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.convergence import MAX_ROUNDS, Next, Round, decide, limit_bytes, speed, standstill_s

MIB = 1 << 20


def at(mib_per_s: float, *sent_and_left: tuple[int, int]) -> list[Round]:
    """Rounds over a link of that speed, in MiB."""
    return [Round(sent * MIB, sent / mib_per_s, left * MIB) for sent, left in sent_and_left]


@pytest.mark.parametrize(
    ("rounds", "left_mib", "max_downtime_s", "expected"),
    [
        # Nothing has been sent yet.
        ([], 0, 0.1, Next.FREEZE),
        ([], 4, 0.1, Next.FREEZE),
        ([], 1000, 0.1, Next.ROUND),
        # 0.3 of 100 ms at 1000 MiB/s are 30 MiB, at 100 MiB/s 3, and never less than SMALL_BYTES or 40 ms of the link.
        (at(1000, (1000, 30)), 30, 0.1, Next.FREEZE),
        (at(1000, (1000, 31)), 31, 0.1, Next.ROUND),
        (at(100, (1000, 5)), 5, 0.1, Next.ROUND),
        (at(100, (1000, 4)), 4, 0.1, Next.FREEZE),
        (at(10, (1000, 4)), 4, 0.001, Next.ROUND),
        (at(25, (1000, 1)), 1, 0.001, Next.FREEZE),
        # More time allows more.
        (at(100, (1000, 60)), 60, 2.0, Next.FREEZE),
        (at(100, (1000, 61)), 61, 2.0, Next.ROUND),
        # It shrinks, if slowly.
        (at(100, (1000, 500), (500, 250), (250, 125)), 125, 0.1, Next.ROUND),
        (at(100, (100, 80), (80, 64)), 64, 0.1, Next.ROUND),
        # One round that does not is an accident, two are not.
        (at(100, (1000, 100), (100, 95)), 95, 0.1, Next.ROUND),
        (at(100, (100, 95), (95, 95)), 95, 0.1, Next.STUCK),
        (at(100, (100, 95), (95, 40)), 40, 0.1, Next.ROUND),
        (at(100, (50, 200), (200, 800)), 800, 0.1, Next.STUCK),
        # For ever is too long.
        (at(100, *[(100, 70), (100, 70)] * (MAX_ROUNDS // 2)), 70, 0.1, Next.STUCK),
    ],
)
def test_decide(rounds: list[Round], left_mib: int, max_downtime_s: float, expected: Next) -> None:
    assert decide(rounds, left_mib * MIB, max_downtime_s) is expected


def test_speed_is_that_of_the_last_telling_round() -> None:
    assert speed([]) == 100 * MIB
    assert speed([Round(10 * MIB, 0.1, 0), Round(20 * MIB, 0.1, 0), Round(4096, 1.0, 0), Round(0, 0.0, 0)]) == 200 * MIB
    assert standstill_s([Round(10 * MIB, 0.1, 0)], 50 * MIB) == pytest.approx(0.5)


@given(st.floats(1, 20_000), st.floats(0, 30_000), st.integers(0, 1 << 16), st.floats(0.01, 10))
def test_it_always_ends(link: float, writes: float, memory: int, max_downtime_s: float) -> None:
    """Rates in MiB/s: a writer slower than the link ends in a freeze that fits, and any in one or in STUCK."""
    rounds: list[Round] = []
    left = memory * MIB
    while (step := decide(rounds, left, max_downtime_s)) is Next.ROUND:
        seconds = left / MIB / link
        dirty = min(memory * MIB, int(writes * MIB * seconds))
        rounds.append(Round(left, seconds, dirty))
        left = dirty
    assert len(rounds) <= MAX_ROUNDS
    if step is Next.FREEZE:
        assert left <= speed(rounds) * max(0.04, max_downtime_s)
    if writes < 0.79 * link and memory * MIB * (writes / link) ** MAX_ROUNDS < limit_bytes(rounds, max_downtime_s):
        assert step is Next.FREEZE
