"""The rows of the report, under stable names, and how each follows from the runs. Pure functions of results."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchkit import ceilings
from benchkit.results import OURS, Results, Summary
from benchkit.tasks import OFF, ON
from benchkit.workloads import BUSY_WRITER, ONE_GIB_WRITER, WORKLOADS

GIB = 1 << 30
LEAST_SENT = 0.01
Ceiling = Callable[[dict[str, float]], float]


@dataclass(frozen=True)
class Found:
    """A row with its numbers; None where nothing was measured. `peers` has the median of each."""

    name: str
    title: str
    unit: str
    ours: float | None
    peers: dict[str, float]
    ratio: float | None
    runs: int
    failed: int
    ceiling: float | None
    higher_is_better: bool = False
    summary: Summary | None = None
    peers_failed: int = 0

    @property
    def best_peer(self) -> tuple[str, float] | None:
        if not self.peers:
            return None
        choose = max if self.higher_is_better else min
        name = choose(self.peers, key=lambda peer: self.peers[peer])
        return name, self.peers[name]

    @property
    def behind(self) -> bool:
        """Whether a peer is better."""
        if self.ours is None or self.best_peer is None:
            return False
        return self.ours < self.best_peer[1] if self.higher_is_better else self.ours > self.best_peer[1]

    def as_object(self) -> dict[str, object]:
        """As `-o json` has it."""
        peer = self.best_peer
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": rounded(self.ours),
            "peer": rounded(peer[1]) if peer else None,
            "peer_name": peer[0] if peer else None,
            "ratio": rounded(self.ratio),
            "runs": self.runs,
            "failed": self.failed,
            "ceiling": rounded(self.ceiling),
        }


class Row(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def tasks(self) -> Sequence[str]: ...

    def find(self, results: Results) -> Found: ...


def rounded(value: float | None) -> float | None:
    """To four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def divided(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


@dataclass(frozen=True)
class Plain:
    """A metric of one workload: ours, and the best of the peers."""

    name: str
    title: str
    unit: str
    task: str
    metric: str
    ceiling: Ceiling
    higher_is_better: bool = False

    @property
    def tasks(self) -> Sequence[str]:
        return [self.task]

    def find(self, results: Results) -> Found:
        ours, peers = _medians(results, self.task, self.metric)
        peer = (max if self.higher_is_better else min)(peers.values()) if peers else None
        values = results.values(self.task, OURS, self.metric)
        return Found(
            self.name, self.title, self.unit, ours, peers, divided(ours, peer), len(values),
            results.failed(self.task, OURS), _ceiling(results, self.ceiling), self.higher_is_better, Summary.of(values),
            _peers_failed(results, [self.task]),
        )  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How much more a metric is for a large workload than for a small one, for each of `units` between them.

    The ratio is that of our own two: large to small.
    """

    name: str
    title: str
    unit: str
    small: str
    large: str
    metric: str
    units: float
    ceiling: Ceiling

    @property
    def tasks(self) -> Sequence[str]:
        return [self.small, self.large]

    def find(self, results: Results) -> Found:
        small, peers_small = _medians(results, self.small, self.metric)
        large, peers_large = _medians(results, self.large, self.metric)
        peers = {
            name: (peers_large[name] - peers_small[name]) / self.units for name in peers_large if name in peers_small
        }
        ours = None if small is None or large is None else (large - small) / self.units
        pairs = zip(
            results.values(self.small, OURS, self.metric), results.values(self.large, OURS, self.metric), strict=False
        )
        values = [(after - before) / self.units for before, after in pairs]
        failed = sum(results.failed(task, OURS) for task in self.tasks)
        return Found(
            self.name, self.title, self.unit, ours, peers, divided(large, small), len(values), failed,
            _ceiling(results, self.ceiling), False, Summary.of(values), _peers_failed(results, self.tasks),
        )  # fmt: skip


@dataclass(frozen=True)
class Overhead:
    """Bytes on the wire for each that had to be moved, of a container that writes; the ratio is to our own idle one."""

    name: str = "bytes-overhead"
    title: str = "bytes sent for each byte of memory and each written until the pause, 1 GiB with 100 MB/s of writes"
    unit: str = "bytes/byte"
    task: str = ONE_GIB_WRITER
    idle: str = "idle-1g"

    @property
    def tasks(self) -> Sequence[str]:
        return [self.task, self.idle]

    def find(self, results: Results) -> Found:
        ours, sent = _medians(results, self.task, "wire_per_byte")
        # Not of those who share their memory with the destination and send nothing at all.
        peers = {name: value for name, value in sent.items() if value >= LEAST_SENT}
        idle = results.median(self.idle, OURS, "wire_per_byte")
        values = results.values(self.task, OURS, "wire_per_byte")
        return Found(
            self.name, self.title, self.unit, ours, peers, divided(ours, idle), len(values),
            results.failed(self.task, OURS), 1.0, False, Summary.of(values), _peers_failed(results, [self.task]),
        )  # fmt: skip


@dataclass(frozen=True)
class Trackers:
    """What tracking costs a program that only writes: of the memory and the disk tracker, the one that costs more.

    The ratio is tracked to untracked speed. There is no peer: nobody else can track here.
    """

    name: str = "tracker-overhead"
    title: str = "slower while tracked, a program that only writes (memory or disk, whichever is worse)"
    unit: str = "%"

    @property
    def tasks(self) -> Sequence[str]:
        return ["tracker-memory", "tracker-disk"]

    def find(self, results: Results) -> Found:
        pairs = {
            task: [
                on / off
                for on, off in zip(
                    results.values(task, ON, "per_s"), results.values(task, OFF, "per_s"), strict=False
                )
            ]
            for task in self.tasks
        }  # fmt: skip
        of_each = {task: statistics.median(found) for task, found in pairs.items() if found}
        worst = min(of_each, key=lambda task: of_each[task]) if of_each else ""
        ratio = of_each.get(worst)
        values = [100 * (1 - one) for one in pairs.get(worst, [])]
        failed = sum(results.failed(task, ON) for task in self.tasks)
        return Found(
            self.name, self.title, self.unit, None if ratio is None else 100 * (1 - ratio), {}, ratio, len(values),
            failed, 0.0, False, Summary.of(values),
        )  # fmt: skip


def _medians(results: Results, task: str, metric: str) -> tuple[float | None, dict[str, float]]:
    """Ours, and those of the peers that have any."""
    found = {name: results.median(task, name, metric) for name in results.contenders(task)}
    ours = found.pop(OURS, None)
    return ours, {name: value for name, value in found.items() if value is not None}


def _ceiling(results: Results, ceiling: Ceiling) -> float | None:
    of_machine = {
        name: value for name in ceilings.NAMES if (value := results.median("ceilings", "machine", name)) is not None
    }
    quiet = results.median("snapshot-100k-extents", OURS, "quiet_gap_ms")
    if quiet is not None:
        of_machine["quiet_gap_ms"] = quiet
    try:
        return ceiling(of_machine)
    except KeyError:
        return None


def _peers_failed(results: Results, tasks: Sequence[str]) -> int:
    return sum(results.failed(task, name) for task in tasks for name in results.contenders(task) if name != OURS)


def once_over_tcp(task: str) -> Ceiling:
    """In ms: the least that whoever stops and then copies needs."""
    return lambda machine: WORKLOADS[task].memory_bytes / machine["tcp"] * 1000


def _pause(name: str, title: str, task: str) -> Plain:
    return Plain(name, title, "ms", task, "pause_ms", once_over_tcp(task))


ROWS: list[Row] = [
    _pause("pause-idle-16m", "pause of an idle container of 16 MiB", "idle-16m"),
    _pause("pause-1g-100mbs", "pause of 1 GiB with 100 MB/s of writes to a quarter of it", ONE_GIB_WRITER),
    Difference(
        "pause-growth-256m-4g", "pause for each more GiB, 50 MB/s of writes to 256 MiB and to 4 GiB", "ms/GiB",
        "write-50mbs-256m", "write-50mbs-4g", "pause_ms", 3.75, lambda machine: GIB / machine["tcp"] * 1000,
    ),
    _pause("pause-redis-1g", "pause of a Redis with 1 GiB, 5,000 writes of 1 KiB each second", "redis-1g"),
    _pause("pause-postgres", "pause of a PostgreSQL under pgbench", "postgres"),
    Difference(
        "pause-disk-growth-1g-50g", "pause with a volume of 50 GiB more than with 1 GiB, 20 MB/s of writes", "ms",
        "disk-1g", "disk-50g", "pause_ms", 1.0, lambda machine: 49 * GIB / machine["disk"] * 1000,
    ),
    _pause("tree-256", "pause of a tree of 256 processes", "tree-256"),
    Plain(
        "stream-speed", "speed of the stream, 1 GiB; ours alone, and the ceiling, with TLS", "MB/s", "idle-1g",
        "stream_mb_per_s",
        lambda machine: machine["tls"] / 1e6, higher_is_better=True,
    ),
    Overhead(),
    Plain(
        "cpu-per-gib", "processor time at both ends for each GiB", "s/GiB", "idle-1g", "cpu_s_per_gib",
        lambda machine: machine["cpu_s_per_gib"],
    ),
    Plain(
        "throughput-during", "a page writer's speed during the move, 500 MB/s before it", "%", BUSY_WRITER,
        "throughput_percent", lambda _: 100.0, higher_is_better=True,
    ),
    Plain(
        "throughput-redis", "what a Redis with 1 GiB answers until the pause, of 5,000 writes each second", "%",
        "redis-1g", "throughput_percent", lambda _: 100.0, higher_is_better=True,
    ),
    Plain(
        "recovery", "from the first answer after the pause to 90 % of the speed before", "ms", BUSY_WRITER,
        "recovery_ms", lambda machine: WORKLOADS[BUSY_WRITER].memory_bytes / machine["memcpy"] * 1000,
    ),
    Trackers(),
    Plain(
        "snapshot-100k-extents", "longest wait of a program that syncs, snapshot of 100,000 extents", "ms",
        "snapshot-100k-extents", "pause_ms", lambda machine: machine["quiet_gap_ms"],
    ),
]  # fmt: skip
