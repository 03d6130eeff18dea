"""The rows as a table for people, on a terminal and in Markdown."""

from collections.abc import Sequence

from benchkit.rows import Found

COLUMNS = ("row", "unit", "ours", "best peer", "", "ratio", "runs", "failed", "p95", "spread", "ceiling")


def number(value: float | None) -> str:
    """Three digits are enough for reading; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Found) -> list[str]:
    peer = row.best_peer
    summary = row.summary
    return [
        row.name, row.unit, number(row.ours), number(peer[1]) if peer else "-", peer[0] if peer else "none",
        number(row.ratio), str(row.runs), str(row.failed), number(summary.p95 if summary else None),
        number(summary.spread if summary else None), number(row.ceiling),
    ]  # fmt: skip


def text(rows: Sequence[Found]) -> str:
    lines = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    left = {0, 1, 4}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)
