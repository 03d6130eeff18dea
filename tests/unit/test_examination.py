"""What preflight decides from values alone."""

import pytest

from agent.examination import is_older, missing_instructions


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


@pytest.mark.parametrize(
    ("here", "there", "missing"),
    [
        ("sse2 sse4_2", "sse2 sse4_2", []),
        ("sse2 sse4_2 avx", "sse2", []),
        ("sse2", "sse2 sse4_2 avx512_vp2intersect", ["avx512_vp2intersect", "sse4_2"]),
        # Another kernel knows more, or has found out more, about the same processor.
        ("sse2", "sse2 xtopology rep_good cpuid extd_apicid tsc_known_freq srso", []),
        ("", "", []),
    ],
)
def test_instructions_that_are_missing(here: str, there: str, missing: list[str]) -> None:
    assert missing_instructions(here.split(), there.split()) == missing
