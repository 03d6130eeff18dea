"""What the peers that checkpoint, copy and restore share: an address at both hosts, and the two ends of a move."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchkit.contenders import peer_end
from benchkit.contenders.base import MAC, Bench, Moved
from benchkit.contenders.peer_end import Plan
from benchkit.errors import BenchError
from benchkit.hosts import DESTINATION, SOURCE, Lab, last_words

ADDRESS = "10.77.2.60"
NETNS, LINK = "bench", "vbench"
# Of each host's own tmpfs.
RUN = "/run/bench"
IMAGES, WORK = f"{RUN}/images", f"{RUN}/work"
MOVE_S = 300.0
PIPE_MAX_SIZE = Path("/proc/sys/fs/pipe-max-size")

CONNECT = [["ip", "link", "set", LINK, "master", "br0"]]


@contextmanager
def networks(lab: Lab) -> Iterator[None]:
    """A network namespace with the same MAC and address at both hosts; connected at the source alone."""
    try:
        for host in (SOURCE, DESTINATION):
            remove_network(lab, host)
            script = f"""\
                set -e
                mkdir -p {RUN}
                ip netns add {NETNS}
                ip link add {LINK} type veth peer name eth0 address {MAC} netns {NETNS}
                ip link set {LINK} up
                ip -n {NETNS} link set lo up
                ip -n {NETNS} address add {ADDRESS}/16 dev eth0
                ip -n {NETNS} link set eth0 up
            """
            lab.ok(host, "sh", "-c", script)
        lab.ok(SOURCE, *CONNECT[0])
        yield
    finally:
        for host in (SOURCE, DESTINATION):
            remove_network(lab, host)


def remove_network(lab: Lab, host: str) -> None:
    lab.run(host, "sh", "-c", f"ip netns del {NETNS}; ip link del {LINK}; rm -rf {RUN}")


@contextmanager
def wide_pipes() -> Iterator[None]:
    """Pipes of up to 4 MiB: without CAP_SYS_RESOURCE, CRIU's lazy pages need that and fail for want of it."""
    before = PIPE_MAX_SIZE.read_text()
    PIPE_MAX_SIZE.write_text(str(max(int(before), 4 << 20)))
    try:
        yield
    finally:
        PIPE_MAX_SIZE.write_text(before)


class Ends:
    """The programs at both hosts that make one move; ready as soon as this is."""

    def __init__(self, bench: Bench, source: Plan, destination: Plan) -> None:
        self._destination = self._start(bench, DESTINATION, destination)
        self._source = self._start(bench, SOURCE, source)

    def _start(self, bench: Bench, host: str, plan: Plan) -> "subprocess.Popen[str]":
        log = bench.folder / f"{host}.log"
        with log.open("w") as said:
            process = bench.lab.popen(
                host, "/usr/bin/python3", peer_end.__file__, json.dumps(asdict(plan)),
                stdin=subprocess.PIPE, stderr=said, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.communicate()
            raise BenchError(f"{host}: {last_words(log.read_text())}")
        return process

    def move(self, bench: Bench) -> Moved:
        """Raises BenchError with the last words of the end that failed."""
        told: dict[str, Any] = {}
        try:
            for host, process, text in ((SOURCE, self._source, "go\n"), (DESTINATION, self._destination, "")):
                try:
                    out, _ = process.communicate(text, timeout=MOVE_S)
                except subprocess.TimeoutExpired:
                    raise BenchError(f"{host} did not end its part within {MOVE_S:g} s") from None
                if process.returncode != 0:
                    raise BenchError(f"{host}: {last_words((bench.folder / f'{host}.log').read_text())}")
                told[host] = json.loads(out.splitlines()[-1])
        finally:
            self.close()
        phases = {f"source: {name}": length for name, length in told[SOURCE]["phases_ms"].items()}
        phases |= {f"destination: {name}": length for name, length in told[DESTINATION]["phases_ms"].items()}
        return Moved(phases)

    def close(self) -> None:
        """Whatever state they are in."""
        for process in (self._source, self._destination):
            if process.poll() is None:
                # With what it has started: a CRIU whose peer is gone may wait for ever, and hold the pipe open.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class EndsSession:
    """A session of a contender that is moved by its ends."""

    bench: Bench
    ends: Ends
    address: str

    def move(self) -> Moved:
        """There, or back."""
        return self.ends.move(self.bench)


def quiet(command: list[str]) -> list[str]:
    """The command without a word: what a runtime starts would inherit its output."""
    return ["sh", "-c", f"exec {shlex.join(command)} </dev/null >/dev/null 2>&1"]
