"""QEMU 10 and a kernel for its guest, from Debian 13's packages, unpacked into a folder: the system stays as it is."""

import lzma
import os
import shutil
import subprocess
from pathlib import Path

from benchkit.errors import CannotRunError
from benchkit.hosts import last_words, must
from benchkit.native import Programs, compile_program

CACHE = Path("/var/cache/migrator-bench")
SUITE = "trixie"
MODULES = ("net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net")
SOURCES = """\
Types: deb
URIs: {mirror}
Suites: {suite}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
SETTINGS = """\
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{folder}/etc";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
APT::Sandbox::User "root";
"""
APT_S = 300.0


def command() -> list[str]:
    """The emulator, once `install` has been there."""
    root = CACHE / "qemu"
    libraries = next((root / "usr/lib").glob("*-linux-gnu"))
    loader = next((root / "usr/lib64").glob("ld-linux-*"))
    program = [str(loader), "--library-path", str(libraries), str(root / "usr/bin/qemu-system-x86_64")]
    return [*program, "-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")]


def kernel() -> Path:
    return next((CACHE / "kernel/boot").glob("vmlinuz-*"))


def install() -> None:
    """Download and unpack what is not there. Raises CannotRunError with apt's last words."""
    if (CACHE / "complete").exists():
        return
    shutil.rmtree(CACHE, ignore_errors=True)
    apt = CACHE / "apt"
    for name in ("state/lists/partial", "cache/archives/partial", "etc"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "etc/debian.sources").write_text(SOURCES.format(mirror=_mirror(), suite=SUITE))
    (apt / "apt.conf").write_text(SETTINGS.format(folder=apt))
    _apt("update")
    download = ("install", "--yes", "--no-install-recommends", "--download-only")
    _apt(*download, "qemu-system-x86")
    for package in (apt / "cache/archives").glob("*.deb"):
        must(["dpkg-deb", "--extract", str(package), str(CACHE / "qemu")])
        package.unlink()
    depends = _apt_cache("depends", "linux-image-cloud-amd64").split("Depends: ")
    _apt("download", depends[1].split()[0], folder=apt / "cache")
    for package in (apt / "cache").glob("linux-image-*.deb"):
        must(["dpkg-deb", "--extract", str(package), str(CACHE / "kernel")])
    shutil.rmtree(apt)
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


def _mirror() -> str:
    """The one that this system trusts already; only the suite is another."""
    listing = must(["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Identifier: Packages"])
    for line in listing.splitlines():
        label, _, address = line.partition("|")
        if label == "Debian":
            return address
    raise CannotRunError("apt knows no Debian mirror")


def _apt(*words: str, folder: Path | None = None) -> None:
    environment = {**os.environ, "APT_CONFIG": str(CACHE / "apt/apt.conf")}
    done = subprocess.run(
        ["apt-get", "-qq", *words], env=environment, cwd=folder, capture_output=True, text=True, check=False,
        timeout=APT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise CannotRunError(f"apt-get {words[0]} of Debian's {SUITE}: {last_words(done.stderr)}")


def _apt_cache(*words: str) -> str:
    environment = {**os.environ, "APT_CONFIG": str(CACHE / "apt/apt.conf")}
    return subprocess.run(
        ["apt-cache", *words], env=environment, capture_output=True, text=True, check=True, timeout=APT_S
    ).stdout
