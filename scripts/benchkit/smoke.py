"""The short benchmark that CI runs: whether a report is what it has to be. Never about a time."""

import math
from collections.abc import Sequence
from pathlib import Path

ROW, PEER = "pause-idle-16m", "runc + copy"
FIELDS = ["name", "unit", "ours", "peer", "peer_name", "ratio", "runs", "failed", "ceiling"]
NUMBERS = ("ours", "peer", "ratio", "ceiling")
FILES = ("benchmark.md", "benchmark/rows.json", "benchmark/pauses.png", "benchmark/pauses.svg", "benchmark/phases.png")


def problems(rows: Sequence[dict[str, object]], folder: Path) -> list[str]:
    """What is wrong with the report of one run of `ROW` against `PEER`; empty if nothing is."""
    found = [f"there is no {name}" for name in FILES if not (folder / name).exists()]
    if [row.get("name") for row in rows] != [ROW]:
        return [*found, f"not the row {ROW} alone: {rows}"]
    row = rows[0]
    if list(row) != FIELDS:
        return [*found, f"a row has {', '.join(row)}"]
    found += [f"{name} is {row[name]!r}" for name in NUMBERS if not _is_positive(row[name])]
    found += [f"{name} is {row[name]!r}" for name, value in (("unit", "ms"), ("peer_name", PEER)) if row[name] != value]
    if (row["runs"], row["failed"]) != (1, 0):
        found.append(f"{row['runs']} runs and {row['failed']} failed, of one")
    if not found and not math.isclose(_number(row["ratio"]), _number(row["ours"]) / _number(row["peer"]), rel_tol=0.01):
        found.append("the ratio is another")
    return found


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
