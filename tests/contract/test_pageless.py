"""A dump without memory, by the CRIU of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from agent.runtime import find_program

pytestmark = pytest.mark.root

# With a tmpfs on /run, as every host has it.
_TRY = """
import os, sys
from pathlib import Path
from migrator import pageless
print(pageless.probe(sys.argv[1], dict(os.environ), Path(sys.argv[2])).cache)
"""


def probe(criu: str, folder: Path, setup: str = "mount -t tmpfs tmpfs /run") -> "subprocess.CompletedProcess[str]":
    inside = ["sh", "-c", f'{setup} && exec "$@"', "sh", sys.executable, "-c", _TRY, criu, str(folder)]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *inside], capture_output=True, text=True, check=False
    )


def test_probe_dumps_without_pages(tmp_path: Path) -> None:
    done = probe(find_program("criu"), tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).stat().st_size > 100
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["criu.kdat"], "nothing else is left"


def test_probe_says_why_it_does_not_work(tmp_path: Path) -> None:
    """A CRIU that cannot be talked into it, as on a kernel of which it believes nothing."""
    stubborn = tmp_path / "criu"
    stubborn.write_text(f'#!/bin/sh\n[ "$1 $2" = "check --feature" ] && exit 1\nexec {find_program("criu")} "$@"\n')
    stubborn.chmod(0o755)
    done = probe(str(stubborn), tmp_path / "kept")
    assert "is not understood" in done.stderr
    assert not list((tmp_path / "kept").iterdir())
