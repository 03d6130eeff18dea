"""The report as a Markdown page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchkit import ceilings, table
from benchkit.contenders.base import Contender
from benchkit.results import OURS, Results, Summary
from benchkit.rows import Found
from benchkit.runner import Outcome

CHECKOUT = f"{Path(__file__).resolve().parents[2]}/"
# Of each workload beside its pause: what heads the column, and the metric.
COLUMNS = {
    "total ms": "total_ms", "sent per byte": "wire_per_byte", "CPU s/GiB": "cpu_s_per_gib", "p99 ms": "p99_ms",
    "p99.9 before": "quiet_p999_ms", "p99.9 after": "after_p999_ms", "pause of datagrams": "datagram_pause_ms",
    "longest gap before": "quiet_gap_ms", "agent MiB": "agent_mib",
}  # fmt: skip
ALT = {
    "pauses": "Pauses of all contenders",
    "growth": "Pause over memory that is written at 50 MB/s",
    "phases": "Phases of our pause",
}


def write(
    at: Path, command: str, machine: Mapping[str, str], rows: Sequence[Found], outcome: Outcome,
    movers: Sequence[Contender], charts: Sequence[Path],
) -> None:  # fmt: skip
    """Write the page; the charts are linked from where it is."""
    results = outcome.results
    parts = [
        "# The benchmark",
        "Made by the benchmark itself, not by hand. To make it again, as root on Debian 12 or 13:",
        f"```\n{command}\n```",
        "The pause is the longest time between two answers that a client outside saw. It asks every 0.2 ms, is a small"
        " compiled program with real-time priority, and the typical time between two answers is taken off. Contenders"
        " take turns. Runs that failed are counted. `ceiling` is what this machine could do at best: for a pause, the"
        " workload's memory once through a TCP connection between the hosts. Both hosts are namespaces of one machine"
        " and share its processors, so take the ratios, not the absolutes.",
        "## Rows",
        table.markdown(
            [column or "who" for column in table.COLUMNS],
            [[f"`{row.name}`", *table.cells(row)[1:]] for row in rows],
        ),
        "`ratio` is ours to the best peer's. For `pause-growth`, `pause-disk-growth`, `bytes-overhead` and"
        " `tracker-overhead` it is of our own two settings: large to small, writing to idle, tracked to untracked.",
        "\n".join(f"- `{row.name}`: {row.title}" for row in rows),
        "## Where a peer is better",
        behind(rows),
        *(f"![{ALT.get(path.stem, path.stem)}]({path.relative_to(at.parent)})" for path in charts),
        "## Every workload",
        "`p99 ms` is of the time to an answer during the move, `p99.9 after` of that from the pause's end on."
        " `sent per byte`: for each byte of memory and disk there was, and each that was written until the pause."
        " `agent MiB` is the peak of the larger of our two agents.",
        everything(results),
        "## What was not run",
        not_run(outcome),
        "## Failures",
        failures(results),
        "## Who took part",
        "\n".join(f"- {mover.name}: {mover.note}" for mover in movers),
        "## The machine",
        "\n".join(f"- {name}: {value}" for name, value in machine.items()),
        best(results),
    ]
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text("\n\n".join(part for part in parts if part) + "\n")


def behind(rows: Sequence[Found]) -> str:
    lines = []
    for row in rows:
        peer = row.best_peer
        if peer and row.behind:
            ours, theirs = table.number(row.ours), table.number(peer[1])
            lines.append(f"- `{row.name}`: {ours} {row.unit} against {theirs} of {peer[0]}")
    return "\n".join(lines) or "In none of these rows."


def everything(results: Results) -> str:
    """A line for each task and contender that has a pause."""
    lines = []
    for task in dict.fromkeys(run.task for run in results.runs):
        for name in results.contenders(task):
            pause = Summary.of(results.values(task, name, "pause_ms"))
            failed = results.failed(task, name)
            if pause is None and not (failed and OURS in results.contenders(task)):
                continue
            metrics = [results.median(task, name, metric) for metric in COLUMNS.values()]
            told = [table.number(value) for value in (pause.median, pause.p95, pause.spread)] if pause else ["-"] * 3
            runs = len(results.values(task, name, "pause_ms"))
            lines.append([task, name, *told, *map(table.number, metrics), str(runs), str(failed)])
    header = ["workload", "who", "pause ms", "p95", "spread", *COLUMNS, "runs", "failed"]
    return table.markdown(header, lines)


def not_run(outcome: Outcome) -> str:
    lines = [f"- {name}: {reason}" for name, reason in outcome.cannot.items()]
    if outcome.left_out:
        tasks = Counter(run.partition(":")[0] for run in outcome.left_out)
        counted = ", ".join(f"{task} {count}" for task, count in tasks.items())
        lines.append(f"- {len(outcome.left_out)} runs for want of time: {counted}")
    return "\n".join(lines) or "Nothing was left out."


def failures(results: Results) -> str:
    found = [run for run in results.runs if run.error]
    return (
        "\n".join(f"- {run.task}, {run.contender}, run {run.number + 1}: {_shown(run.error)}" for run in found)
        or "None."
    )


def best(results: Results) -> str:
    names = ceilings.NAMES
    found = {name: value for name in names if (value := results.median("ceilings", "machine", name)) is not None}
    return f"Its ceilings in this run: {ceilings.as_text(found)}." if len(found) == len(names) else ""


def _shown(error: str) -> str:
    """Shortened, and the same wherever the checkout is."""
    return error.replace(CHECKOUT, "")[:300]
