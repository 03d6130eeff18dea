"""What the demo writes: plain text, with a little weight and colour on a terminal."""

import shlex
import sys
from collections.abc import Sequence

BOLD, DIM, GREEN, RED = "1", "2", "32", "31"


def section(title: str) -> None:
    print(f"\n{_styled(title, BOLD)}", flush=True)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def note(text: str) -> None:
    print(f"  {_styled(text, DIM)}", flush=True)


def command(host: str, words: Sequence[str]) -> None:
    """A command line as it would be typed at a host."""
    print(f"  {_styled(f'{host}#', DIM)} {shlex.join(words)}", flush=True)


def complain(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


class Facts:
    """Claims with their evidence, each true or not."""

    def __init__(self) -> None:
        self._facts: list[tuple[str, bool, str]] = []

    def add(self, name: str, true: bool, text: str) -> None:
        self._facts.append((name, true, text))

    @property
    def all_true(self) -> bool:
        return all(true for _, true, _ in self._facts)

    def show(self) -> None:
        width = max(len(name) for name, _, _ in self._facts)
        for name, true, text in self._facts:
            mark = _styled("ok   ", GREEN) if true else _styled("WRONG", RED)
            print(f"  {mark}  {name:{width}}  {text}", flush=True)


def _styled(text: str, style: str) -> str:
    return f"\033[{style}m{text}\033[0m" if sys.stdout.isatty() else text
