"""The measuring and soaking programs in scripts/ start, explain themselves, and refuse what they do not know."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOOLS = ("soak-disk", "bench-tracker", "bench-snapshot")


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_explains_itself_and_refuses_what_it_does_not_know(name: str) -> None:
    helped = run(name, "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"scripts/{name} " in helped.stdout
    wrong = run(name, "--nonsense")
    assert wrong.returncode == 2
    assert "--nonsense" in wrong.stderr


def run(name: str, option: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / name), option]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
