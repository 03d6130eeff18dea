"""A migration's phases on standard error: live on a terminal, a line for each elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from migrator.units import format_duration, format_size
from migrator.v1 import migration_pb2

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Picture(Protocol):
    """Something that shows a migration as it changes."""

    def show(self, migration: migration_pb2.Migration) -> None: ...

    def note(self, text: str) -> None: ...


@contextmanager
def picture() -> Iterator[Picture]:
    """The picture that fits standard error."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=10) as live:
        yield Drawing(live)


class Lines:
    """One line for each phase when it has ended."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, migration: migration_pb2.Migration) -> None:
        phases = migration.phases
        # A phase has ended if it has a duration, or if the next has begun or all is over.
        while self._shown < len(phases) and (
            phases[self._shown].duration_ms or self._shown + 1 < len(phases) or migration.outcome
        ):
            phase = phases[self._shown]
            steps = ", ".join(f"{step.name} {format_duration(step.duration_ms)}" for step in phase.steps)
            more = f" ({steps})" if steps else ""
            print(f"migrate: {phase.name} {format_duration(phase.duration_ms)}{more}", file=sys.stderr, flush=True)
            self._shown += 1

    def note(self, text: str) -> None:
        print(f"migrate: {text}", file=sys.stderr, flush=True)


class Drawing:
    """All phases, the running one with its progress."""

    def __init__(self, live: "Live") -> None:
        self._live = live

    def show(self, migration: migration_pb2.Migration) -> None:
        self._live.update(render(migration), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(f"migrate: {text}", markup=False, highlight=False)


def render(migration: migration_pb2.Migration) -> "RenderableType":
    """The phases as a grid: mark, name, time, and how far the running one is."""
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for _ in range(4):
        grid.add_column()
    for index, phase in enumerate(migration.phases):
        ended = phase.duration_ms or index + 1 < len(migration.phases) or migration.outcome
        if ended:
            detail = "  ".join(f"{step.name} {format_duration(step.duration_ms)}" for step in phase.steps)
            grid.add_row(
                Text("✓", style="green"), phase.name, format_duration(phase.duration_ms), Text(detail, style="dim")
            )
        elif phase.name in ("precopy", "final") and migration.progress:
            grid.add_row(
                Spinner("dots"), phase.name, "", ProgressBar(total=1.0, completed=migration.progress, width=30)
            )
        else:
            sent = format_size(migration.bytes.wire) + " sent" if migration.bytes.wire else ""
            left = f"{format_size(migration.missing_bytes)} left at {migration.source}"
            text = left if migration.missing_bytes else sent
            grid.add_row(Spinner("dots"), phase.name, "", Text(text, style="dim"))
    return grid
