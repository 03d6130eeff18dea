"""QEMU: live migration of a virtual machine that runs the same workload, emulated: there may be no KVM for it."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchkit.contenders import emulator
from benchkit.contenders.base import Bench, Moved, Session
from benchkit.errors import BenchError
from benchkit.hosts import DESTINATION, SOURCE, last_words
from benchkit.workloads import Workload
from labkit import foreign
from labkit.hosts import host_named

ADDRESS, MAC = "10.77.2.62", "02:77:03:00:00:02"
RUN = "/run/bench-qemu"
TAP = "vbenchvm"
STREAM_PORT = 7995
# What a guest needs beside the workload's memory, with its kernel and its initial file system.
GUEST_MIB = 160
LARGEST_MIB = 1024
START_S, MOVE_S = 20.0, 180.0
FAST_BYTES_PER_S = 100 << 30


class Monitor:
    """QEMU's monitor (QMP) of one host."""

    def __init__(self, host: str) -> None:
        path = f"/proc/{host_named(host).init_pid()}/root{RUN}/monitor"
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise BenchError(f"QEMU did not start at {host}") from None
                time.sleep(0.05)
        self._socket.settimeout(START_S)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer. Raises BenchError if it is an error."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        for line in self._lines:
            message = json.loads(line)
            if "error" in message:
                raise BenchError(f"QEMU: {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
        raise BenchError("QEMU has ended")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass
class _Session:
    source: Monitor
    address: str = ADDRESS

    def move(self) -> Moved:
        self.source.ask("migrate-set-parameters", **{"max-bandwidth": FAST_BYTES_PER_S})
        self.source.ask("migrate", uri=f"tcp:{host_named(DESTINATION).address}:{STREAM_PORT}")
        deadline = time.monotonic() + MOVE_S
        while (told := self.source.ask("query-migrate"))["status"] != "completed":
            if told["status"] in ("failed", "cancelled"):
                raise BenchError(f"QEMU: migration {told['status']}: {told.get('error-desc', 'no word')}")
            if time.monotonic() > deadline:
                raise BenchError(f"QEMU's migration did not end within {MOVE_S:g} s")
            time.sleep(0.01)
        return Moved({"total": float(told["total-time"]), "downtime": float(told["downtime"])})


class Qemu:
    """Only idle pause and stream speed can be compared: the guest's own speed is that of an emulator."""

    name = "QEMU (emulated)"
    note = (
        "live migration by pre-copy between two QEMU 10 with software emulation, the workload as the guest's only"
        " program; no limit on bandwidth, else the defaults. Only idle workloads: whatever the guest does itself is"
        " some 15 times slower than on a processor that can virtualise"
    )

    def check(self, bench: Bench) -> None:
        emulator.install()
        emulator.initial_file_system(bench.programs)

    def takes(self, workload: Workload) -> str:
        plain = workload == Workload(workload.name, memory_mib=workload.memory_mib)
        return "" if plain and workload.memory_mib <= LARGEST_MIB else "an emulated guest is too slow for it"

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        with ExitStack() as stack:
            for host in (DESTINATION, SOURCE):
                stack.callback(bench.lab.run, host, "sh", "-c", f"ip link del {TAP}; rm -rf {RUN}")
                bench.lab.run(host, "sh", "-c", f"ip link del {TAP}; rm -rf {RUN}")
                make = f"mkdir -p {RUN}; ip tuntap add {TAP} mode tap; ip link set {TAP} master br0 up"
                bench.lab.ok(host, "sh", "-c", make)
                stack.enter_context(self._started(bench, host, workload))
            waiting = Monitor(DESTINATION)
            stack.callback(waiting.close)
            source = Monitor(SOURCE)
            stack.callback(source.close)
            yield _Session(source)

    @contextmanager
    def _started(self, bench: Bench, host: str, workload: Workload) -> Iterator[None]:
        options = " ".join(workload.command()[1:])
        kernel = f"quiet nokaslr mitigations=off panic=-1 bench_address={ADDRESS} -- {options}"
        incoming = ["-incoming", f"tcp:0.0.0.0:{STREAM_PORT}"] if host == DESTINATION else []
        words = [
            *foreign.qemu(), "-machine", "pc", "-accel", "tcg", "-cpu", "Nehalem", "-nodefaults",
            "-m", str(workload.memory_mib + GUEST_MIB), "-display", "none",
            "-kernel", str(emulator.kernel()), "-initrd", str(bench.programs.workload.parent / "guest.cpio"),
            "-append", kernel, "-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=net,mac={MAC}", "-qmp", f"unix:{RUN}/monitor,server=on,wait=off",
            *incoming,
        ]  # fmt: skip
        log = bench.folder / f"qemu-{host}.log"
        with log.open("w") as said:
            process = bench.lab.popen(host, *words, stdout=said, stderr=said, start_new_session=True)
        try:
            time.sleep(0.3)
            if process.poll() is not None:
                raise BenchError(f"QEMU at {host}: {last_words(log.read_text())}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
