"""The power of a machine: on, and off without a word.

The machine's disk has a write cache that a power cut empties, as real ones have: nbdkit keeps what is written in memory
of its own and writes it to the disk's file when the machine flushes.
"""

import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from labkit import foreign
from labkit.hosts import LabError, wait_for
from vmkit import accelerator, network
from vmkit.machines import Machine, running

MEMORY_MIB = 2560
ARGUMENTS = "root=/dev/vda ro console=ttyS0 net.ifnames=0 nokaslr mitigations=off"
NBDKIT_S, END_S = 10.0, 10.0
# Generous: on a busy machine an emulator that takes what others leave gets little.
BOOT_S = 900.0
# The emulators take what nobody else on this machine wants.
IDLE = ("chrt", "--idle", "0", "nice", "-n", "19")


def on(machine: Machine, cpu: str = "") -> None:
    """Start the machine from its disk as it is, with the processor `cpu` unless with that of all. Raises LabError."""
    if machine.pid():
        raise LabError(f"{machine.name} is running already", 2)
    disk = _start_disk(machine)
    port = network.plug(machine)
    kernel = machine.folder / "kernel"
    words = [
        *IDLE, *foreign.qemu(), *accelerator.options(cpu), "-machine", "pc", "-nodefaults", "-display", "none",
        "-m", str(MEMORY_MIB), "-smp", "1", "-no-user-config", "-name", machine.name,
        "-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initrd"), "-append", ARGUMENTS,
        "-chardev", f"file,id=console,path={machine.console},append=on", "-serial", "chardev:console",
        "-drive", f"file=nbd+unix:///?socket={disk},format=raw,if=virtio,cache=none,discard=unmap",
        "-netdev", f"tap,id=switch,fd={port}",
        "-device", f"virtio-net-pci,netdev=switch,mac=02:77:02:00:00:{machine.index:02x}",
        "-netdev", "user,id=out", "-device", f"virtio-net-pci,netdev=out,mac=02:77:03:00:00:{machine.index:02x}",
        "-device", "virtio-rng-pci", "-rtc", "base=utc,clock=host",
        "-qmp", f"unix:{machine.folder}/monitor,server=on,wait=off", "-pidfile", str(machine.folder / "qemu.pid"),
    ]  # fmt: skip
    log = machine.folder / "qemu.log"
    try:
        with log.open("w") as said:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, pass_fds=[port],
                cwd="/",
            )  # fmt: skip
    finally:
        os.close(port)
    (machine.folder / "qemu.pid").write_text(str(process.pid))
    time.sleep(0.5)
    if process.poll() is not None:
        raise LabError(f"QEMU of {machine.name} ended at once: {log.read_text().strip()}")


def cut(machine: Machine) -> None:
    """As if the plug were pulled: what the machine has not flushed is lost. Nothing if it has no power."""
    # The disk first: QEMU's end would have it flushed by the closing of the connection.
    for name, word in (("nbdkit.pid", b"nbdkit"), ("qemu.pid", b"qemu-system")):
        if pid := running(machine.folder / name, word):
            os.kill(pid, signal.SIGKILL)
            wait_for(f"{name} of {machine.name} did not end", END_S, partial(_ended, pid))
        (machine.folder / name).unlink(missing_ok=True)


def _ended(pid: int) -> bool:
    try:
        # As a child of this process it is a zombie until somebody asks.
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return True
    except ChildProcessError:
        pass
    return not Path(f"/proc/{pid}").exists()


def _start_disk(machine: Machine) -> Path:
    if shutil.which("nbdkit") is None:
        raise LabError("nbdkit is missing: scripts/vmlab up installs it")
    address, pid_file = machine.folder / "disk", machine.folder / "nbdkit.pid"
    if pid := running(pid_file, b"nbdkit"):  # the machine has ended by itself: all of it was flushed
        os.kill(pid, signal.SIGTERM)
        wait_for(f"nbdkit of {machine.name} did not end", END_S, partial(_ended, pid))
    address.unlink(missing_ok=True)
    pid_file.unlink(missing_ok=True)
    serve = [
        "nbdkit", "--unix", str(address), "--pidfile", str(pid_file), "--filter=cache", "file", str(machine.disk),
        "cache=writeback", "cache-min-block-size=4096",
    ]  # fmt: skip
    subprocess.run([*IDLE, *serve], check=True)
    wait_for(f"nbdkit of {machine.name} did not start", NBDKIT_S, pid_file.exists)
    return address


def wait_until_it_answers(machine: Machine, seconds: float = BOOT_S) -> None:
    """Until a command can be run there. Raises LabError with the console's last words."""

    def answers() -> bool:
        if not machine.pid():
            raise LabError(f"{machine.name} has ended")
        probe = subprocess.run(machine.inside("true"), stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return probe.returncode == 0

    try:
        wait_for(f"{machine.name} did not answer", seconds, answers)
    except LabError as error:
        tail = "\n".join(machine.console.read_text(errors="replace").splitlines()[-20:])
        raise LabError(f"{error}; the end of {machine.console}:\n{tail}") from None
