"""A container's log as conmon writes it: `<RFC 3339 time> <stdout|stderr> <F|P> <text>`, P for a part of a line."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

POLL_S = 0.05


@dataclass(frozen=True)
class Entry:
    """A line with its newline, or the part of one that the container wrote without."""

    time_ns: int
    is_error_output: bool
    text: bytes


def parse(line: bytes) -> Entry | None:
    """One line of the file without its newline; None for what conmon has not written (a crash cut it short)."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[1] not in (b"stdout", b"stderr") or parts[2] not in (b"F", b"P"):
        return None
    moment = _time_ns(parts[0].decode("ascii", "replace"))
    if moment is None:
        return None
    return Entry(moment, parts[1] == b"stderr", parts[3] + (b"\n" if parts[2] == b"F" else b""))


def _time_ns(text: str) -> int | None:
    """Nanoseconds since 1970. Nine digits of a second are more than datetime holds: it is given six."""
    whole, point, rest = text.partition(".")
    digits = rest[:9]
    if not point or not digits.isdecimal():
        return None
    try:
        seconds = datetime.fromisoformat(whole + (rest[9:].replace("Z", "+00:00") or "+00:00")).timestamp()
    except ValueError:
        return None
    return int(seconds) * 1_000_000_000 + int(digits.ljust(9, "0"))


def read(path: Path, *, tail: int = 0, follow: Callable[[], bool] | None = None) -> Iterator[Entry]:
    """Entries, oldest first; the last `tail` lines of what is there, all if 0.

    With `follow`, goes on with what is written until follow() is False, through stops and starts and also when the file
    is replaced by another (a container that came back).
    """
    file = _open(path)
    waiting = b""
    if file is not None:
        entries, waiting = _complete(file.read())
        yield from _last_lines(entries, tail) if tail else entries
    try:
        while follow is not None:
            goes_on = follow()
            if file is None or _is_replaced(file, path):
                file = _reopen(file, path)
                waiting = b""
            piece = file.read() if file is not None else b""
            entries, waiting = _complete(waiting + piece)
            yield from entries
            if not goes_on:
                return
            if not piece:
                time.sleep(POLL_S)
    finally:
        if file is not None:
            file.close()


def _complete(text: bytes) -> tuple[list[Entry], bytes]:
    """Entries of whole lines, and what is left behind the last newline."""
    *lines, rest = text.split(b"\n")
    return [entry for line in lines if (entry := parse(line)) is not None], rest


def _last_lines(entries: list[Entry], count: int) -> list[Entry]:
    """The entries of the last `count` lines; parts of a line belong together with its end."""
    kept: deque[Entry] = deque()
    ends: dict[bool, bool] = {}
    lines = 0
    for entry in reversed(entries):
        # Read backwards, an entry with a newline begins another line of its stream, and so does its stream's first.
        if entry.text.endswith(b"\n") or entry.is_error_output not in ends:
            ends[entry.is_error_output] = True
            lines += 1
        if lines > count:
            break
        kept.appendleft(entry)
    return list(kept)


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _reopen(file: BinaryIO | None, path: Path) -> BinaryIO | None:
    if file is not None:
        file.close()
    return _open(path)


def _is_replaced(file: BinaryIO, path: Path) -> bool:
    opened = os.fstat(file.fileno())
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino) or now.st_size < file.tell()
