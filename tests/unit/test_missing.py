"""Marks of missing pages, and the pipes between who misses and who brings them."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.fill import missing
from migrator.fill.missing import Marks, Pipes
from migrator.fill.store import PAGE_BYTES

LONGEST = 1000


@pytest.fixture
def pipes(tmp_path: Path) -> Iterator[Pipes]:
    missing.make_pipes(tmp_path)
    missing.make_pipes(tmp_path)
    with closing(Pipes(tmp_path)) as made:
        yield made


def made_of(path: Path, ranges: list[tuple[int, int]]) -> Marks:
    """As they come over the wire."""
    path.touch()
    with path.open("r+b") as file:
        for at, marks in missing.marked(ranges, LONGEST):
            assert 0 < len(marks) <= LONGEST
            file.seek(at)
            file.write(marks)
    found = Marks.open_if_there(path)
    assert found is not None
    return found


def pages(runs: Iterator[tuple[int, int]]) -> list[int]:
    return [page for start, end in runs for page in range(start // PAGE_BYTES, end // PAGE_BYTES)]


@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(1, 2500)), max_size=12))
def test_what_was_marked_is_found(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int]]) -> None:
    wanted = sorted({page for first, count in drawn for page in range(first, first + count)})
    ranges: list[tuple[int, int]] = []
    for page in wanted:
        if ranges and ranges[-1][1] == page * PAGE_BYTES:
            ranges[-1] = (ranges[-1][0], (page + 1) * PAGE_BYTES)
        else:
            ranges.append((page * PAGE_BYTES, (page + 1) * PAGE_BYTES))
    path = missing.path_of(tmp_path_factory.mktemp("store"), 7)
    with closing(made_of(path, ranges)) as marks:
        assert pages(marks.runs(0, 1 << 47)) == wanted
        assert marks.left_bytes() == len(wanted) * PAGE_BYTES == missing.left_bytes(path.parent)
        for start, end in ranges:
            assert marks.first(start, end) == start
            marks.clear(start, end)
            assert marks.first(start, end) is None
        assert not missing.left_bytes(path.parent)


def test_a_store_without_marks_misses_nothing(tmp_path: Path) -> None:
    (tmp_path / "mem-7").touch()
    (tmp_path / "missing-07").touch()
    assert missing.pids(tmp_path) == missing.pids(tmp_path / "none") == []
    assert missing.left_bytes(tmp_path) == 0
    assert Marks.open_if_there(missing.path_of(tmp_path, 7)) is None


def test_the_pipes_carry_what_is_wanted_and_news(pipes: Pipes) -> None:
    pipes.want(7, 4096)
    pipes.want(8, 1 << 47)
    assert pipes.are_wanted() == [(7, 4096), (8, 1 << 47)]
    assert pipes.are_wanted() == []
    pipes.has_come()
    assert not pipes.hear()
    pipes.say_again()
    pipes.has_come()
    assert pipes.hear()
    assert not pipes.hear()


def test_a_full_pipe_is_no_failure(pipes: Pipes) -> None:
    size = os.fpathconf(pipes.news, "PC_PIPE_BUF")
    for _ in range(100 * size):
        pipes.has_come()
        pipes.want(1, 0)
    assert pipes.are_wanted()
    assert not pipes.hear()
