"""Sizes, durations and rates, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import units
from migrator.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5G", 3 << 29), ("123", 123), (" 1 kB ", 1000)],
)
def test_sizes(text: str, value: int) -> None:
    assert units.parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300ms", 300), ("10s", 10_000), ("2m", 120_000), ("0.5s", 500), ("1h", 3_600_000)]
)
def test_durations(text: str, value: int) -> None:
    assert units.parse_duration_ms(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("2Gbit/s", 250_000_000), ("100MB/s", 100_000_000), ("1MiB/s", 1 << 20), ("8bit/s", 1)]
)
def test_rates(text: str, value: int) -> None:
    assert units.parse_rate(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "4 gigs", "1GiB/s", "99999999999TiB", "1_000", "٣"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(InvalidArgument):
        units.parse_size(text)


@pytest.mark.parametrize("text", ["10", "10x", "s", "-3s"])
def test_a_duration_needs_its_unit(text: str) -> None:
    with pytest.raises(InvalidArgument):
        units.parse_duration_ms(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_what_is_written_can_be_read_within_rounding(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == pytest.approx(size, rel=0.05, abs=1)
