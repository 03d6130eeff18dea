"""KVM where it really starts a stock kernel, which not every machine with a /dev/kvm does; else software emulation."""

import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from labkit import foreign
from vmkit.machines import CACHE

KVM = Path("/dev/kvm")
FOUND = CACHE / "accelerator.json"
TRY_S = 20.0
# Address space randomisation and mitigations cost an emulator time, and newer processors' instructions trip it.
PROCESSORS = {"tcg": "Nehalem", "kvm": "host"}


def options(cpu: str = "") -> list[str]:
    """QEMU's, with this processor unless with the usual one."""
    return ["-accel", name(), "-cpu", cpu or PROCESSORS[name()]]


def name() -> str:
    """kvm or tcg, as `find` has found it; MIGRATOR_VM_ACCELERATOR overrules it."""
    if wish := os.environ.get("MIGRATOR_VM_ACCELERATOR"):
        return wish
    try:
        return str(json.loads(FOUND.read_text())["accelerator"])
    except FileNotFoundError:
        return "tcg"


def find(kernel: Path) -> None:
    """Try it with a real kernel, once for each kernel of this machine's own."""
    here = platform.release()
    if FOUND.exists() and json.loads(FOUND.read_text())["release"] == here:
        return
    found = "kvm" if os.access(KVM, os.R_OK | os.W_OK) and _starts(kernel) else "tcg"
    FOUND.write_text(json.dumps({"release": here, "accelerator": found}))


def _starts(kernel: Path) -> bool:
    """Whether the kernel comes as far as complaining that it has no root."""
    with tempfile.NamedTemporaryFile() as console:
        command = [
            *foreign.qemu(), "-accel", "kvm", "-cpu", PROCESSORS["kvm"], "-machine", "pc", "-m", "512", "-nodefaults",
            "-display", "none", "-no-reboot", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1",
            "-serial", f"file:{console.name}",
        ]  # fmt: skip
        try:
            subprocess.run(command, capture_output=True, timeout=TRY_S, check=False)
        except subprocess.TimeoutExpired:
            return False
        return "Unable to mount root" in Path(console.name).read_text(errors="replace")
