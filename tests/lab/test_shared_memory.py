"""Shared memory that is large and being written moves like other memory: in rounds, and not in the freeze."""

import pytest

from tests.lab.lab_kit import Lab

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.130"
SIZES_MIB = (24, 264)


def test_little_and_much_of_it_move(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kind a third. Everything is right afterwards; what the dump takes is printed for little and for much."""
    for size in SIZES_MIB:
        name = f"pool{size}"
        lab.start_workload("host-a", name, f"pool {size}", ADDRESS, "--disk", "1GiB")
        assert lab.ask(ADDRESS)["wrong"] == []
        report = lab.migrate(name, "host-a", "host-b")
        assert lab.ask(ADDRESS)["wrong"] == []
        assert report["bytes"]["memory"] > size << 20
        steps = {step["name"]: step["duration_ms"] for phase in report["phases"] for step in phase["steps"]}
        phases = {phase["name"]: phase["duration_ms"] for phase in report["phases"]}
        with capsys.disabled():
            print(f"\n{size} MiB: {report['downtime_ms']:.0f} ms still; ms by phase and step:", phases, steps)
        lab.ok("host-b", "migrator", "rm", "-f", name)
