"""What preflight decides from values alone."""

import pytest

from agent.examination import is_older


@pytest.mark.parametrize(
    ("here", "there", "older"),
    [
        ("4.2.1", "4.2", False),
        ("4.2", "4.2.1", False),
        ("4.1.1", "4.2", True),
        ("3.19", "4.2", True),
        ("4.10", "4.2", False),
        ("", "4.2", False),
        ("4.2", "", False),
        ("unknown", "4.2", False),
    ],
)
def test_an_older_criu(here: str, there: str, older: bool) -> None:
    assert is_older(here, there) is older
