"""What an emulated machine of the benchmark starts from: Debian 13's kernel, and an initial file system of our own."""

import lzma
import shutil
from pathlib import Path

from benchkit.errors import CannotRunError
from benchkit.native import Programs, compile_program
from labkit import foreign
from labkit.hosts import LabError

CACHE = Path("/var/cache/migrator-bench")
SUITE = "trixie"
MODULES = ("net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net")


def kernel() -> Path:
    return next((CACHE / "kernel/boot").glob("vmlinuz-*"))


def install() -> None:
    """QEMU and the kernel, where they are not there. Raises CannotRunError with apt's last words."""
    try:
        foreign.install_qemu()
        if (CACHE / "complete").exists():
            return
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        with foreign.suite(SUITE, CACHE / "apt") as packages:
            newest = packages.depends("linux-image-cloud-amd64")[0]
            packages.unpack(CACHE / "kernel", newest, alone=True)
    except LabError as error:
        raise CannotRunError(str(error)) from error
    (CACHE / "complete").touch()


def initial_file_system(programs: Programs) -> Path:
    """A cpio archive of the guest's first program, the workload and the modules for its network."""
    folder = programs.workload.parent
    first = folder / "guest_init"
    compile_program("guest_init.c", first, "-static")
    files = {"init": first.read_bytes(), "bin/workload": programs.workload.read_bytes()}
    tree = next((CACHE / "kernel/usr/lib/modules").iterdir()) / "kernel"
    for number, name in enumerate(MODULES):
        files[f"modules/{number}"] = lzma.decompress((tree / f"{name}.ko.xz").read_bytes())
    archive = b"".join(
        [
            *(_entry(name, 0o040755) for name in ("bin", "modules", "dev", "data")),
            *(_entry(name, 0o100755, content) for name, content in files.items()),
            _entry("TRAILER!!!", 0),
        ]
    )
    at = folder / "guest.cpio"
    at.write_bytes(archive)
    return at


def _entry(name: str, mode: int, content: bytes = b"") -> bytes:
    """Of the "new ASCII" format, which the kernel reads: Documentation/driver-api/early-userspace/buffer-format."""
    encoded = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
