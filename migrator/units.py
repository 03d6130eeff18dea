"""Amounts as people write and read them: sizes (4GiB), durations (300ms), rates (2Gbit/s). Pure."""

import re
from collections.abc import Mapping
from fractions import Fraction

from migrator.errors import InvalidArgument

SIZES = {
    "": 1, "b": 1,
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
DURATIONS_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000}
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
RATES = {f"{unit}/s": Fraction(factor, 8) for unit, factor in _BITS.items()} | {
    f"{unit}/s": Fraction(factor) for unit, factor in SIZES.items() if unit
}
MAX_VALUE = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes. KiB, MiB, GiB, TiB (or K, M, G, T) are powers of 1024, kB, MB, GB, TB of 1000; a bare number is bytes."""
    return _scaled(text, SIZES, "a size, for example 4GiB or 512MiB")


def parse_duration_ms(text: str) -> int:
    """Milliseconds, from ms, s, m (or min), h. The unit has to be there."""
    return _scaled(text, DURATIONS_MS, "a duration, for example 300ms or 2m")


def parse_rate(text: str) -> int:
    """Bytes per second, from bits (2Gbit/s) or bytes (100MB/s). The unit has to be there."""
    return _scaled(text, RATES, "a rate, for example 2Gbit/s or 100MB/s")


def format_size(count_bytes: int) -> str:
    """With a binary unit, exact where it can be: 4GiB, 1.5GiB, 100B."""
    return _with_unit(count_bytes, (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)), "B")


def format_duration(milliseconds: float) -> str:
    """300ms, 1.5s, 2m."""
    return _with_unit(milliseconds, (("h", 3_600_000), ("m", 60_000), ("s", 1000)), "ms")


def format_rate(bytes_per_second: int) -> str:
    """As network links are named, in bits: 2Gbit/s."""
    units = (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3))
    return _with_unit(bytes_per_second * 8, units, "bit/s")


def _scaled(text: str, units: Mapping[str, int | Fraction], what: str) -> int:
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z/]*)", text.strip())
    if match is None or match[2].lower() not in units:
        raise InvalidArgument(f"{text!r} is not {what}")
    value = round(Fraction(match[1]) * units[match[2].lower()])
    if value > MAX_VALUE:
        raise InvalidArgument(f"{text!r} is too large")
    return value


def _with_unit(value: float, units: tuple[tuple[str, int], ...], smallest: str) -> str:
    for unit, factor in units:
        if value >= factor:
            return f"{value / factor:.1f}".removesuffix(".0") + unit
    return f"{value:.1f}".removesuffix(".0") + smallest
