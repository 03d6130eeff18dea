"""When another round pays."""

import pytest

from migrator.rounds import MAX_ROUNDS, SMALL_BYTES, Round, another

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sent", "dirty", "expected"),
    [
        ([1000 * MIB], 0, False),
        ([1000 * MIB], SMALL_BYTES, False),
        ([1000 * MIB], 100 * MIB, True),
        ([1000 * MIB, 100 * MIB], 90 * MIB, False),
        ([1000 * MIB, 100 * MIB], 20 * MIB, True),
        ([1000 * MIB] * MAX_ROUNDS, 100 * MIB, False),
    ],
)
def test_another(sent: list[int], dirty: int, expected: bool) -> None:
    assert another([Round(count, 1.0) for count in sent], dirty) is expected
