"""Amounts as types of options: 2GiB, 300ms, 2Gbit/s."""

from collections.abc import Callable

import click

from migrator import units
from migrator.errors import InvalidArgument


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


SIZE = _Amount("size", units.parse_size)
DURATION_MS = _Amount("duration", units.parse_duration_ms)
RATE = _Amount("rate", units.parse_rate)
