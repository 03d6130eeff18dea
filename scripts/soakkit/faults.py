"""Faults for agents of the lab, and what has to be true after each."""

import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from labkit.hosts import STATE, SWITCH
from soakkit import workload
from tests.lab.lab_kit import HOSTS, Lab, eventually

FAULTS = "/run/faults"
STRIKE_S = 60.0
SETTLE_S = 90.0
CUT_S = (0.5, 8.0)
# What is left of the link's rate.
SLOW = "rate 20mbit burst 64k latency 400ms"
SOURCE = (
    "prepare", "piece", "precopy", "freeze", "dump", "final", "ready", "released", "owner", "finish", "journal.release",
    "journal.abort", "journal.hear", "journal.finish",
)  # fmt: skip
DESTINATION = (
    "prepare", "piece", "send", "sync", "hold", "mount", "restoring", "restore", "ready", "released", "owner", "run",
    "settle", "journal.ready", "journal.own", "journal.refuse", "journal.finish",
)  # fmt: skip
ACTIONS = (
    "kill", "kill", "kill:criu", "kill:fill", "kill:guard", "kill:runc", "kill:restorer", "kill:stand-in", "io",
    "full", "fail", "delay", "cut", "slow",
)  # fmt: skip
# The end of a container, and not of its move: all that is left of it then is its disk.
DEADLY = {
    (f"destination.{point}", f"kill:{program}")
    for point in ("released", "journal.own", "owner", "run", "settle", "journal.finish")
    for program in ("criu", "runc", "restorer", "stand-in")
}


@dataclass
class Fault:
    """At the source or the destination of a move; `struck` is whether the move has come by its point."""

    point: str
    action: str
    times: int
    cut_s: float
    struck: bool = False

    @classmethod
    def random(cls, chance: random.Random) -> "Fault":
        while True:
            end = chance.choice(["source", "destination"])
            point = f"{end}.{chance.choice(SOURCE if end == 'source' else DESTINATION)}"
            made = cls(point, chance.choice(ACTIONS), chance.choice([1, 1, 2]), chance.uniform(*CUT_S))
            if (made.point, made.action) not in DEADLY:
                return made

    @property
    def is_of_the_link(self) -> bool:
        return self.action in ("cut", "slow")

    @property
    def line(self) -> str:
        """For migrator/faults.py."""
        if self.is_of_the_link:
            return f"{self.point} hang\n"
        return f"{self.point} {self.action} {self.times}\n"

    def __str__(self) -> str:
        how = f"{self.cut_s:.1f} s" if self.is_of_the_link else f"x{self.times}"
        return f"{self.action} at {self.point} ({how})"


class Trouble:
    """The faults of the two agents and their links."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def move(self, source: str, fault: Fault) -> str:
        """One move with a fault; where the container is afterwards. AssertionError if anything is not as it should."""
        destination = next(host for host in HOSTS if host != source)
        host = source if fault.point.startswith("source") else destination
        self._file(host).write_text(fault.line)
        with self._lab.background(source, "migrate", workload.NAME, destination, "-o", "json") as migrate:
            deadline = time.monotonic() + STRIKE_S
            while not (fault.struck or migrate.poll() is not None) and time.monotonic() < deadline:
                fault.struck = self._has_struck(host)
                if not self._agent_runs(host):
                    break
                time.sleep(0.01)
            if fault.struck and fault.is_of_the_link:
                self._trouble_link(fault, destination, host)
            if fault.action == "kill" and fault.struck:
                eventually("the agent died", lambda: not self._agent_runs(host), 10)
                self._file(host).unlink(missing_ok=True)
            self._mend()
            migrate.wait(STRIKE_S)
            fault.struck = fault.struck or self._has_struck(host)
        for each in HOSTS:
            self._file(each).unlink(missing_ok=True)
            self._file(each, ".reached").unlink(missing_ok=True)
        self._mend()
        return self._settled()

    def _trouble_link(self, fault: Fault, cut: str, host: str) -> None:
        """The destination's link, so that clients reach the source all the time."""
        shape = ["tc", "-n", SWITCH, "qdisc"]
        if fault.action == "cut":
            self._lab.lab("cut", cut)
        else:
            subprocess.run([*shape, "add", "dev", cut, "root", "tbf", *SLOW.split()], check=True)
        self._file(host).unlink(missing_ok=True)
        time.sleep(fault.cut_s)
        if fault.action == "cut":
            self._lab.lab("heal", cut)
        else:
            subprocess.run([*shape, "del", "dev", cut, "root"], check=True)

    def _file(self, host: str, suffix: str = "") -> Path:
        init = int((STATE / host / "init.pid").read_text())
        return Path(f"/proc/{init}/root{FAULTS}{suffix}")

    def _has_struck(self, host: str) -> bool:
        return self._file(host, ".reached").exists()

    def _agent_runs(self, host: str) -> bool:
        return any(row["name"] == host and row["agent"] == "running" for row in self._lab.status())

    def _mend(self) -> None:
        for host in HOSTS:
            if not self._agent_runs(host):
                self._lab.lab("start", host)

    def _settled(self) -> str:
        """Where it runs: at one host, with nothing of it at the other, without anybody's help."""

        def one_place() -> bool:
            rows = [row for host in HOSTS if (row := self._lab.ps(host).get(workload.NAME))]
            return [row["state"] for row in rows] == ["running"] and not rows[0]["migration"]

        eventually("the container runs at exactly one host", one_place, SETTLE_S)
        (where,) = self._lab.where(workload.NAME)
        other = next(host for host in HOSTS if host != where)
        left = self._lab.clean(other, 30)
        assert not left, f"left behind at {other}: {left}"
        return where
