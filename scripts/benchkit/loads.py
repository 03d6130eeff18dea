"""What else the client machine does to a workload: fill it before, and load it during the move."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from benchkit.contenders.base import Bench
from benchkit.errors import BenchError
from benchkit.hosts import execute, last_words
from benchkit.workloads import Workload

# Values that do not compress would have to be sent by the client; Redis makes these itself.
REDIS_VALUE_BYTES = 4096
PGBENCH_SCALE = 20
READY_S = 60.0


@contextmanager
def running(bench: Bench, workload: Workload, address: str) -> Iterator[None]:
    """Fill the service, and load it for the length of the block."""
    if workload.service == "redis":
        keys = workload.memory_bytes // (REDIS_VALUE_BYTES + 64)
        _client(bench, "redis-cli", "-h", address, "debug", "populate", str(keys), "key", str(REDIS_VALUE_BYTES))
        if not workload.full_load:
            yield
            return
        command = ["redis-benchmark", "-h", address, "-t", "set", "-r", str(keys), "-d", "1024", "-c", "8", "-l", "-q"]
        with _load(bench, command):
            yield
    elif workload.service == "postgres":
        user = ["-h", address, "-U", "postgres"]
        _client(bench, "pgbench", *user, "-i", "-q", "-s", str(PGBENCH_SCALE), "postgres")
        with _load(bench, ["pgbench", *user, "-n", "-c", "4", "-T", "600", "postgres"]):
            yield
    else:
        yield


def _client(bench: Bench, *command: str) -> None:
    done = execute(bench.lab.at_client(*command), READY_S)
    if done.returncode != 0:
        raise BenchError(f"{command[0]}: {last_words(done.stderr)}")


@contextmanager
def _load(bench: Bench, command: list[str]) -> Iterator[None]:
    process = bench.lab.popen(
        "client", *command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    survived = False
    try:
        yield
        survived = process.poll() is None
    finally:
        process.kill()
        _, said = process.communicate()
    # pgbench goes on with the other clients when a transaction of one has failed.
    if not survived or "error:" in said:
        raise BenchError(f"{command[0]} did not survive: {last_words(said)}")
