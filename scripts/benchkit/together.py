"""Several migrations at once: the longest pause among the containers, and how long all of them take."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchkit.contenders.base import Bench
from benchkit.contenders.ours import Ours
from benchkit.measure import AFTER_S, QUIET_S, Metrics
from benchkit.probe import Probe
from benchkit.results import OURS
from benchkit.tasks import Once
from benchkit.trace import Window
from benchkit.workloads import PORT, Workload

COUNTS = (1, 4, 8)
MEMORY_MIB = 64


class Together:
    """So many idle containers that move at the same time; ours alone: the others are moved by hand, one by one."""

    def __init__(self, count: int) -> None:
        self.name = f"together-{count}"
        self.contenders = [OURS]
        self._count = count

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        yield lambda _: self._once(bench)

    def _once(self, bench: Bench) -> Metrics:
        workload = Workload(self.name, memory_mib=MEMORY_MIB)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="migrator-bench-", dir="/dev/shm")))
            sessions = [stack.enter_context(Ours(number).session(bench, workload)) for number in range(self._count)]
            flows = [f"tcp:{session.address}:{PORT}" for session in sessions]
            with Probe(bench.programs.probe, folder, flows, enter=bench.lab.at_client()) as probe:
                time.sleep(QUIET_S)
                began_s = time.monotonic()
                with ThreadPoolExecutor(len(sessions)) as pool:
                    moves = [pool.submit(session.move) for session in sessions]
                    for move in moves:
                        move.result()
                ended_s = time.monotonic()
                time.sleep(AFTER_S)
        whole = Window(began_s, ended_s + AFTER_S)
        pauses = [trace.longest_gap_ms(whole) for trace in probe.traces]
        return {"pause_ms": max(pauses), "total_ms": (ended_s - began_s) * 1000}
