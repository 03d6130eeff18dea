"""What machine this is, and which versions of everything: for the report's reader, and to tell benchmarks apart."""

import platform
import subprocess
from pathlib import Path

from benchkit.errors import BenchError
from labkit.hosts import CHECKOUT, PATH


def describe() -> dict[str, str]:
    """Names and values, for people."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    release = Path("/etc/os-release").read_text().split('PRETTY_NAME="')[1].split('"')[0]
    found = {
        "processors": f"{len(models)} x {models[0] if models else platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "system": release,
        "python": platform.python_version(),
        "migrator": said(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]),
    }
    for name, command in {
        "criu": ["criu", "--version"],
        "runc": ["runc", "--version"],
        "podman": ["podman", "--version"],
        "qemu": ["qemu-system-x86_64", "--version"],
    }.items():
        words = said(command).splitlines()
        if words:
            found[name] = words[0].removeprefix("Version: ").removeprefix(f"{name} version ")
    return found


def said(command: list[str]) -> str:
    """What a program says on standard output, or nothing if it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": PATH}).stdout.strip()
    except FileNotFoundError:
        return ""


def pretouch(want_bytes: int) -> None:
    """Write to so much memory once, as far as there is: what a hypervisor has to supply first takes some five times as
    long, and one that takes free memory back does so within seconds."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    size = min(want_bytes, free - (3 << 30))
    if size <= 0:
        return
    flags = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE"
    code = f"import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags={flags})"
    done = subprocess.run(["/usr/bin/python3", "-c", code, str(size)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"touching {size >> 20} MiB of memory: {done.stderr.strip()}")
