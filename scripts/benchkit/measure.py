"""One run: a workload at the source, the client asking, the move, and the numbers of it."""

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchkit import loads, machine
from benchkit.contenders.base import Bench, Contender
from benchkit.errors import BenchError
from benchkit.probe import Probe
from benchkit.trace import Trace, Window
from benchkit.wire import Meter
from benchkit.workloads import Workload

# A client's TCP may wait twice as long as the pause before it tries again, and a second more.
QUIET_S, AFTER_S, AFTER_BUSY_S = 1.0, 2.0, 4.0
AFTER_GAP_S = 1e-6
# Of the speed before the move: a writer's at random varies.
RECOVERED, REDIS_RECOVERED = 0.9, 0.95

# What a move takes of memory: its images at both ends and the restored container, for those who copy it in one piece.
TOUCHED_BYTES, TOUCHED_PARTS, TOUCHED_LIMIT_BYTES = 512 << 20, 3, 3 << 30

Metrics = dict[str, float]


def one_run(bench: Bench, contender: Contender, workload: Workload) -> Metrics:
    """All metrics of one move; times in ms. Raises BenchError if it failed: the move, or the service afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="migrator-bench-", dir="/dev/shm")))
        stack.enter_context(bench.lab.shaped(workload.shape))
        session = stack.enter_context(contender.session(bench, workload))
        meter = stack.enter_context(Meter())
        flows = workload.flows(session.address)
        with (
            Probe(bench.programs.probe, folder, flows, enter=bench.lab.at_client()) as probe,
            loads.running(bench, workload, session.address),
        ):
            quiet, busy_before_s = _quiet()
            machine.pretouch(min(TOUCHED_LIMIT_BYTES, TOUCHED_BYTES + TOUCHED_PARTS * workload.memory_bytes))
            busy_s, began_s = cpu_busy_s(), time.monotonic()
            moved = session.move()
            ended_s = time.monotonic()
            time.sleep(AFTER_BUSY_S if workload.rate_mbs or workload.service != "workload" else AFTER_S)
            busy_s, over_s = cpu_busy_s() - busy_s, time.monotonic()
    whole = Window(began_s, over_s)
    metrics = seen(probe.traces, workload, quiet, Window(began_s, ended_s), whole)
    sent = meter.sent(quiet, whole, metrics.pop("answers_end_s"))
    cpu_s = max(0.0, busy_s - busy_before_s * (over_s - began_s) / QUIET_S)
    metrics |= {
        "total_ms": (ended_s - began_s) * 1000,
        "wire_bytes": sent.total,
        "wire_per_byte": sent.total / (workload.least_bytes + metrics["written_bytes"]),
        "stream_mb_per_s": sent.per_s / 1e6,
        "cpu_s": cpu_s,
        "cpu_s_per_gib": cpu_s / (workload.least_bytes / 2**30),
    }
    return metrics | moved.metrics | {f"phase {name}": length for name, length in moved.phases_ms.items()}


def seen(traces: list[Trace], workload: Workload, quiet: Window, move: Window, whole: Window) -> Metrics:
    """What the client's traces tell of a move. Raises BenchError if a flow did not get over it."""
    for trace, flow in zip(traces, workload.flows("container"), strict=True):
        if trace.error or not len(trace) or trace.came_ns[-1] / 1e9 < move.ended_s:
            raise BenchError(f"{flow} did not survive: {trace.error or 'no answer after the move'}")
    streams = [trace for trace, flow in zip(traces, workload.flows(""), strict=True) if not flow.startswith("udp")]
    first = streams[0]
    # With many connections the one that waited longest counts.
    worst = max(streams, key=lambda trace: trace.longest_gap_ms(whole))
    gap = worst.longest_gap(whole)
    assert gap is not None
    metrics = {
        "pause_ms": worst.longest_gap_ms(whole),
        "quiet_gap_ms": first.longest_gap_ms(quiet),
        "answers_end_s": gap.began_s,
        "written_bytes": first.written_bytes(Window(move.began_s, gap.began_s)),
        "p99_ms": first.latency_ms(move, 0.99),
        "quiet_p999_ms": first.latency_ms(quiet, 0.999),
        # Without the one that waited for the pause to end.
        "after_p999_ms": first.latency_ms(Window(gap.ended_s + AFTER_GAP_S, whole.ended_s), 0.999),
    }
    if len(traces) > len(streams):
        metrics["datagram_pause_ms"] = traces[-1].longest_gap_ms(whole)
    # Of a writer its pages count, the pause included; of a Redis what it answers until the pause, and after it.
    if workload.rate_mbs and (normal := first.pages_per_s(quiet)):
        metrics["throughput_percent"] = 100 * first.pages_per_s(move) / normal
        recovery_ms = first.recovery_ms(gap, first.pages_per_s, RECOVERED * normal)
    elif workload.service == "redis":
        normal = first.answers_per_s(quiet)
        metrics["throughput_percent"] = 100 * first.answers_per_s(Window(move.began_s, gap.began_s)) / normal
        recovery_ms = first.recovery_ms(gap, first.answers_per_s, REDIS_RECOVERED * normal)
    else:
        return metrics
    # Not within what was watched: that much at least.
    metrics["recovery_ms"] = (whole.ended_s - gap.ended_s) * 1000 if recovery_ms is None else recovery_ms
    return metrics


def _quiet() -> tuple[Window, float]:
    """A second without a move, and the processors' busy seconds in it."""
    busy_s, began_s = cpu_busy_s(), time.monotonic()
    time.sleep(QUIET_S)
    return Window(began_s, time.monotonic()), cpu_busy_s() - busy_s


def cpu_busy_s() -> float:
    """Processor time of the whole machine spent on anything so far; proc(5), in units of 1/100 s."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / 100
