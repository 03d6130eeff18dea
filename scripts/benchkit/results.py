"""What runs have given: kept in a file as they come, so that a benchmark that was cut short goes on where it was."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from benchkit.trace import percentile

OURS = "migrator"


@dataclass(frozen=True)
class Run:
    """One run of a task by a contender; with an error it failed and has no metrics."""

    task: str
    contender: str
    number: int
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Results:
    """Runs, and what is asked of them."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self.runs = list(runs)

    def has(self, task: str, contender: str, number: int) -> bool:
        return any((run.task, run.contender, run.number) == (task, contender, number) for run in self.runs)

    def contenders(self, task: str) -> list[str]:
        """In the order of their first run."""
        return list(dict.fromkeys(run.contender for run in self.runs if run.task == task))

    def values(self, task: str, contender: str, metric: str) -> list[float]:
        """Of the runs that did not fail, in order."""
        return [
            run.metrics[metric]
            for run in self.runs
            if (run.task, run.contender) == (task, contender) and metric in run.metrics
        ]

    def median(self, task: str, contender: str, metric: str) -> float | None:
        values = self.values(task, contender, metric)
        return statistics.median(values) if values else None

    def failed(self, task: str, contender: str) -> int:
        return sum(bool(run.error) for run in self.runs if (run.task, run.contender) == (task, contender))


@dataclass(frozen=True)
class Summary:
    """Median, 95th percentile, and spread: the largest less the smallest."""

    median: float
    p95: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        if not values:
            return None
        return cls(statistics.median(values), percentile(values, 0.95), max(values) - min(values))


class Store:
    """The runs of one benchmark in a file, a line each; the first line says of what.

    If the file is of the same thing, its runs count; else it begins anew.
    """

    def __init__(self, path: Path, heading: dict[str, str], *, resume: bool) -> None:
        self._path = path
        self.results = Results()
        if resume and path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            if lines and lines[0] == heading:
                self.results = Results(Run(**line) for line in lines[1:])
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(heading) + "\n")

    def add(self, run: Run) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        self.results.runs.append(run)
