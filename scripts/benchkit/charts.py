"""The charts of the report, as PNG and SVG; matplotlib is needed (requirements.lock beside this file)."""

from collections.abc import Sequence
from pathlib import Path

from benchkit.results import OURS, Results
from benchkit.workloads import GROWTH, WORKLOADS

OWN_COLOUR, COLOURS = "#0b6e4f", ("#7d8597", "#d08c60", "#5c80bc", "#a05195", "#c9ada7", "#444444")


def draw(results: Results, folder: Path) -> list[Path]:
    """The PNG files that were made, each with an SVG of the same name."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Text stays text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})
    made = [pauses(results, folder), growth(results, folder), phases(results, folder)]
    return [path for path in made if path is not None]


def pauses(results: Results, folder: Path) -> Path | None:
    """A bar for each contender in each pause row."""
    tasks = ("idle-16m", "idle-1g", "write-100mbs-25pc", "redis-1g", "postgres", "tree-256")
    wanted = [(task, name) for task in tasks for name in results.contenders(task)]
    bars = [(task, name, value) for task, name in wanted if (value := results.median(task, name, "pause_ms"))]
    if not bars:
        return None
    names = list(dict.fromkeys(name for _, name, _ in bars))
    from matplotlib import pyplot

    # A little room between one workload and the next, whose name stands at its first bar.
    workloads = list(dict.fromkeys(task for task, _, _ in bars))
    places = [index + 0.6 * workloads.index(task) for index, (task, _, _) in enumerate(bars)]
    firsts = [next(index for index, bar in enumerate(bars) if bar[0] == task) for task in workloads]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.2 * places[-1]))
    for place, (_, name, value) in zip(places, bars, strict=True):
        axes.barh(place, value, color=colour(name, names), label=name)
        axes.text(value * 1.05, place, f"{value:,.0f}", va="center", fontsize=7)
    axes.set_yticks([places[index] for index in firsts], workloads, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(10.0, *(value for _, _, value in bars)), 3 * max(value for _, _, value in bars))
    axes.set_xlabel("pause seen by the client, ms (logarithmic)")
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axes.legend(by_label.values(), by_label.keys(), fontsize=7, loc="lower right")
    return save(figure, folder / "pauses.png")


def growth(results: Results, folder: Path) -> Path | None:
    """Pause over memory that is written at 50 MB/s, a line for each contender."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for task in GROWTH:
        for name in results.contenders(task):
            if value := results.median(task, name, "pause_ms"):
                lines.setdefault(name, []).append((WORKLOADS[task].memory_mib / 1024, value))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", color=colour(name, list(lines)), label=name)
    axes.set_xlabel("memory, GiB")
    axes.set_ylabel("pause seen by the client, ms (logarithmic)")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return save(figure, folder / "growth.png")


def phases(results: Results, folder: Path) -> Path | None:
    """What our pause consists of, for each workload."""
    parts = ("freeze", "final", "restore", "handover")
    tasks = [task for task in WORKLOADS if results.values(task, OURS, "phase freeze")]
    if not tasks:
        return None
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.28 * len(tasks)))
    starts = [0.0] * len(tasks)
    for part, shade in zip(parts, (OWN_COLOUR, "#5c80bc", "#d08c60", "#7d8597"), strict=True):
        lengths = [results.median(task, OURS, f"phase {part}") or 0.0 for task in tasks]
        axes.barh(range(len(tasks)), lengths, left=starts, color=shade, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms, as the agents report it")
    axes.legend(fontsize=7)
    return save(figure, folder / "phases.png")


def colour(name: str, names: Sequence[str]) -> str:
    others = [one for one in names if one != OURS]
    return OWN_COLOUR if name == OURS else COLOURS[others.index(name) % len(COLOURS)]


def save(figure: "object", path: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
    return path
