"""What the lab of virtual machines takes from the README, and makes of it."""

import tomllib

import pytest

from labkit.hosts import CHECKOUT, LabError
from vmkit import build, readme
from vmkit.machines import Machine

MACHINES = [Machine(1, "bookworm"), Machine(2, "trixie")]


def test_the_readme_has_the_commands_that_are_followed() -> None:
    steps = readme.steps((CHECKOUT / "README.md").read_text())
    assert "scripts/setup" in steps.install and "/usr/bin/" in steps.install
    assert steps.copy.count("host-a:") == 3
    assert "systemctl enable --now migrator-agent" in steps.start
    issued = [line for line in readme.certificates(steps.certificates, MACHINES).splitlines() if "issue" in line]
    assert [line.split()[4:] for line in issued] == [
        ["host-a", "--role", "peer", "--address", "10.77.1.1"],
        ["host-b", "--role", "peer", "--address", "10.77.1.2"],
    ]


def test_another_readme_is_refused() -> None:
    with pytest.raises(LabError, match="has not the commands"):
        readme.steps("\n## Two hosts of your own\n\n```\nmake install\n```\n")


def test_the_example_configuration_is_edited() -> None:
    made = tomllib.loads(readme.configuration(MACHINES[1], MACHINES))
    assert made["host"] == "host-b" and made["listen"]["address"] == "10.77.1.2:7440"
    assert made["network"]["ipv4_pool"] == "10.77.12.0/24" and made["network"]["ipv4_prefix"] == 16
    assert made["peers"] == {"host-a": "10.77.1.1:7440"}


def test_suites() -> None:
    assert build.suites_of("mixed", 3) == ["bookworm", "trixie", "bookworm"]
    assert build.suites_of("trixie", 2) == ["trixie", "trixie"]
    for kind, count in (("sid", 2), ("trixie", 0)):
        with pytest.raises(LabError):
            build.suites_of(kind, count)
