"""What machine this is, and which versions of everything: for the report's reader, and to tell benchmarks apart."""

import platform
import subprocess
from pathlib import Path

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
