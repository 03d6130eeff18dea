"""The benchmark's client reads a known pause as what it is."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchkit import native
from benchkit.contenders.base import Bench
from benchkit.contenders.ours import Ours
from benchkit.hosts import Lab as BenchLab
from benchkit.native import Programs
from benchkit.probe import Probe
from benchkit.trace import Trace, Window
from benchkit.workloads import Workload
from tests.lab.lab_kit import Lab

pytestmark = [pytest.mark.lab, pytest.mark.root]

STALL_US = 50_000
PORT = 7100


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return native.build(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def service(lab: Lab, programs: Programs) -> Iterator[str]:
    """A workload at real-time priority on host-b, which stands still when it is asked to."""
    with lab.background("host-b", str(programs.workload), "--port", str(PORT), "--realtime") as process:
        yield f"10.77.1.2:{PORT}"
        assert process.poll() is None


def stalls_seen(trace: Trace, stalls_s: list[float]) -> list[float]:
    """What the client saw of each artificial pause, in ms."""
    return [trace.longest_gap_ms(Window(at, at + 0.001)) for at in stalls_s]


def test_a_known_pause_is_seen_as_it_is(lab: Lab, programs: Programs, service: str, tmp_path: Path) -> None:
    """50 ms read as 50 within 1 ms, by TCP and by datagrams."""
    flows = [f"tcp:{service}", f"udp:{service}"]
    enter = BenchLab().at_client()
    with Probe(programs.probe, tmp_path, flows, enter=enter, stall_us=STALL_US) as probe:
        time.sleep(3)
    check(probe)


def test_and_while_a_migration_streams(lab: Lab, programs: Programs, service: str, tmp_path: Path) -> None:
    bench = Bench(BenchLab(), programs, tmp_path)
    with Ours().session(bench, Workload("stream", memory_mib=512, disk_span_mib=256)) as session:
        flows = [f"tcp:{service}", f"udp:{service}"]
        with Probe(programs.probe, tmp_path, flows, enter=bench.lab.at_client(), stall_us=STALL_US) as probe:
            ended: list[float] = []

            def move() -> None:
                session.move()
                ended.append(time.monotonic())

            mover = threading.Thread(target=move)
            mover.start()
            mover.join()
    assert ended, "the move failed"
    check(probe)


def check(probe: Probe) -> None:
    """The median of the pauses; each of them may have met a moment in which the machine did something else."""
    assert len(probe.stalls_s) >= 4
    for trace in probe.traces:
        pauses = sorted(stalls_seen(trace, probe.stalls_s[:-1]))
        print(f"seen of {STALL_US / 1000:g} ms: {[round(pause, 2) for pause in pauses]}")
        assert trace.error == ""
        assert pauses[len(pauses) // 2] == pytest.approx(STALL_US / 1000, abs=1.0)
