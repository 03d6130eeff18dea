"""The demo beside a lab that is up: it says so, and lets it be."""

import subprocess

import pytest

from tests.lab.lab_kit import CHECKOUT, Lab

pytestmark = [pytest.mark.lab, pytest.mark.root]


def test_lab_that_is_up_stays_up(lab: Lab) -> None:
    before = lab.status()
    done = subprocess.run([CHECKOUT / "scripts/demo"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "the lab is up already, with 2 hosts: scripts/lab down first" in done.stderr
    assert lab.status() == before
