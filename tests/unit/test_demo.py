"""What the demo makes of its client's report."""

from typing import Any

import pytest

from demokit import screen
from demokit.stage import Move, pauses


def move(source: str, destination: str, began_s: float, ended_s: float) -> Move:
    return Move(
        source, destination, began_s, ended_s, outcome="migrated", downtime_ms=250.0, where=[destination],
        file_kept=True, left={},
    )  # fmt: skip


def report(*gaps: tuple[float, float]) -> dict[str, Any]:
    return {"pauses": gaps, "typical_s": 0.001}


MOVES = [move("host-a", "host-b", 10.0, 13.0), move("host-b", "host-a", 20.0, 23.0)]


def test_each_move_has_its_longest_pause() -> None:
    in_moves, elsewhere = pauses(MOVES, report((10.5, 0.031), (11.0, 0.301), (12.9, 0.2), (15.0, 0.051), (21.0, 0.221)))
    assert in_moves == pytest.approx([300.0, 220.0])
    assert elsewhere == pytest.approx(50.0)


def test_pauses_that_were_too_short_to_be_told() -> None:
    assert pauses(MOVES, report()) == ([0.0, 0.0], 0.0)


def test_one_claim_that_is_wrong_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    facts = screen.Facts()
    facts.add("keys", True, "100,000 are there")
    assert facts.all_true
    facts.add("left behind", False, "loop devices")
    assert not facts.all_true
    facts.show()
    assert capsys.readouterr().out == "  ok     keys         100,000 are there\n  WRONG  left behind  loop devices\n"
