"""What is left to the fill, against a model that knows each page."""

from hypothesis import given
from hypothesis import strategies as st

from migrator.fill.spaces import Segment, Space

PAGES = 40
PAGE = st.integers(0, PAGES - 1)
STEPS = st.lists(st.tuples(st.sampled_from(["remove", "move", "find", "between"]), PAGE, PAGE, st.integers(1, 12)))


def pages(space: Space) -> dict[int, int]:
    found: dict[int, int] = {}
    for start, end, source in space.segments:
        assert start < end
        for at in range(start, end):
            assert at not in found
            found[at] = source + at - start
    assert [*found] == sorted(found)
    return found


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), STEPS)
def test_as_the_model(lengths: list[int], steps: list[tuple[str, int, int, int]]) -> None:
    segments, at = [], 0
    for length in lengths:
        segments.append(Segment(at, at + length, 1000 + at))
        at += length + 1
    space = Space(1, segments)
    model = pages(space)
    for what, first, second, length in steps:
        if what == "remove":
            removed = space.remove(first, first + length)
            gone = {at: model.pop(at) for at in range(first, first + length) if at in model}
            assert pages(Space(1, removed)) == gone
        elif what == "move" and (second >= first + length or first >= second + length):
            space.move(first, second, length)
            moved = {at + second - first: model.pop(at) for at in range(first, first + length) if at in model}
            for at in range(second, second + length):
                model.pop(at, None)
            model.update(moved)
        elif what == "find":
            segment = space.find(first)
            assert (segment.source if segment else None) == model.get(first)
        else:
            found = pages(Space(1, space.segments_between(first, first + length)))
            assert found == {at: source for at, source in model.items() if first <= at < first + length}
        child = space.forked()
        assert pages(space) == pages(child) == dict(sorted(model.items()))
        assert bool(space) == bool(model)
