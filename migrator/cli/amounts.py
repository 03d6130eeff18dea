"""Units in and out: 2GiB, 300ms, 2Gbit/s; numbers for people."""

import re
from collections.abc import Callable

import click

from migrator.errors import InvalidArgument

BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
BYTES |= {f"{k}ib": v for k, v in list(BYTES.items()) if k in "kmgt" and k}
BYTES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
MILLISECONDS = {"ms": 1, "s": 1000, "min": 60_000, "m": 60_000, "h": 3_600_000, "": 1000}
BITS = {"bit/s": 1, "kbit/s": 10**3, "mbit/s": 10**6, "gbit/s": 10**9}


def parse_size(text: str) -> int:
    """Bytes."""
    return round(_scaled(text, BYTES, "a size, for example 512MiB"))


def parse_duration_ms(text: str) -> int:
    """Milliseconds; a bare number is seconds."""
    return round(_scaled(text, MILLISECONDS, "a duration, for example 300ms"))


def parse_rate(text: str) -> int:
    """Bytes per second."""
    rates = {name: factor / 8 for name, factor in BITS.items()} | {f"{k}/s": float(v) for k, v in BYTES.items() if k}
    return round(_scaled(text, rates, "a rate, for example 2Gbit/s"))


def _scaled(text: str, units: dict[str, float] | dict[str, int], what: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z/]*)", text.strip())
    if not match or match[2].lower() not in units:
        raise InvalidArgument(f"{text!r} is not {what}")
    return float(match[1]) * units[match[2].lower()]


def format_size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_ms(milliseconds: float) -> str:
    if milliseconds < 10:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.2f} s"


class _Amount(click.ParamType[int]):
    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return self._parse(str(value))
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)


SIZE = _Amount("size", parse_size)
DURATION_MS = _Amount("duration", parse_duration_ms)
RATE = _Amount("rate", parse_rate)
