"""Runs the parts of a benchmark, contenders in turns, and keeps what comes."""

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchkit.contenders.base import Bench, Contender
from benchkit.errors import BenchError, CannotRunError
from benchkit.plan import Part
from benchkit.results import Results, Run, Store
from labkit.hosts import LabError

# What a run of someone else's program may raise besides; anything else is a mistake of ours.
RUN_ERRORS = (BenchError, LabError, OSError, subprocess.SubprocessError, ValueError)


@dataclass
class Outcome:
    """What was run, and what was not and why."""

    results: Results
    cannot: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, task: str, todo: Iterable[tuple[int, str]]) -> None:
        """There was no time for these runs of a task, by number and contender; a later turn has them once more."""
        words = [f"{task}: {contender}, run {number + 1}" for number, contender in todo]
        self.left_out += [word for word in words if word not in self.left_out]


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def check(bench: Bench, contenders: Iterable[Contender], outcome: Outcome) -> list[Contender]:
    """Those that can run here; the others' reasons go to the outcome."""
    found = []
    for contender in contenders:
        try:
            contender.check(bench)
        except RUN_ERRORS as error:
            outcome.cannot[contender.name] = str(error)
            kind = "cannot run here" if isinstance(error, CannotRunError) else "is not ready"
            say(f"{contender.name} {kind}: {error}")
        else:
            found.append(contender)
    return found


def run(bench: Bench, parts: Iterable[Part], store: Store, outcome: Outcome, limit_s: float) -> None:
    """All parts that have not been run, until the time is over; what is then left out is told in the outcome."""
    deadline = time.monotonic() + limit_s
    for part in parts:
        name = part.task.name
        todo = [
            (number, contender)
            for number in range(part.runs)
            for contender in part.contenders
            if not store.results.has(name, contender, number)
        ]
        if todo and time.monotonic() > deadline:
            outcome.leave_out(name, todo)
            todo = []
        if not todo:
            continue
        try:
            with part.task.opened(bench) as once:
                for number, contender in todo:
                    if time.monotonic() > deadline:
                        outcome.leave_out(name, [(number, contender)])
                        continue
                    began = time.monotonic()
                    try:
                        made = Run(name, contender, number, once(contender))
                    except RUN_ERRORS as error:
                        made = Run(name, contender, number, error=" ".join(str(error).split()))
                    store.add(made)
                    say(f"{name}, {contender}, run {number + 1}: {told(made)} ({time.monotonic() - began:.0f} s)")
        except RUN_ERRORS as error:
            # The task itself could not be made ready or taken down: all of it that has not run has failed.
            for number, contender in todo:
                if not store.results.has(name, contender, number):
                    store.add(Run(name, contender, number, error=" ".join(str(error).split())))
            say(f"{name}: FAILED: {error}")


def told(made: Run) -> str:
    """A run in a few words."""
    if made.error:
        return f"FAILED: {made.error}"
    if "pause_ms" in made.metrics:
        return f"paused {made.metrics['pause_ms']:.0f} ms"
    return ", ".join(f"{name} {value:.4g}" for name, value in made.metrics.items())
