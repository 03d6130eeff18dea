"""The compiled programs: what runs in the containers, and the client that measures them."""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchkit.errors import BenchError

SOURCES = Path(__file__).resolve().parent / "native"


@dataclass(frozen=True)
class Programs:
    """Where they are. `tarball` is a root file system that consists of the workload alone."""

    workload: Path
    probe: Path
    tarball: Path


def build(folder: Path) -> Programs:
    """Compile into `folder`. Raises BenchError with the compiler's words."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = Programs(folder / "workload", folder / "probe", folder / "workload.tar")
    # Static: its container has no C library.
    compile_program("workload.c", programs.workload, "-static", "-pthread")
    compile_program("probe.c", programs.probe)
    with tarfile.open(programs.tarball, "w") as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run", "data"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(programs.workload, "bin/workload")
    return programs


def compile_program(source: str, target: Path, *options: str) -> None:
    """Compile one of the sources. Raises BenchError with the compiler's words."""
    command = ["gcc", "-O2", "-Wall", "-Wextra", *options, "-o", str(target), str(SOURCES / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{source} does not compile: {done.stderr.strip()}")
