"""Amounts as types of options: 2GiB, 300ms, 2Gbit/s."""

from collections.abc import Callable

import click

from migrator import units
from migrator.errors import InvalidArgument


class _Amount(click.ParamType[int]):
    def __init__(self, name: str, parse: Callable[[str], int], *, least: int = 0) -> None:
        self.name = name
        self._parse = parse
        self._least = least

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            parsed = self._parse(str(value))
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)
        if parsed < self._least:
            self.fail(f"{value!r} is too little; leave the option away for no limit", param, ctx)
        return parsed


class _Cpus(click.FloatRange):
    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        # nan is neither above nor below a limit.
        if str(value).strip().lower().lstrip("+-") == "nan":
            self.fail(f"{value!r} is not a number of CPUs", param, ctx)
        converted: float = super().convert(value, param, ctx)  # type: ignore[arg-type]
        return converted


CPUS = _Cpus(min=0.01, max=8192)
SIZE = _Amount("size", units.parse_size)
DURATION_MS = _Amount("duration", units.parse_duration_ms)
# Where nothing at all would be taken for no limit.
TIME_LIMIT_MS = _Amount("duration", units.parse_duration_ms, least=1)
RATE = _Amount("rate", units.parse_rate, least=1)
