"""Programs from packages of another Debian suite, unpacked into a folder: the system itself stays as it is."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labkit.hosts import LabError

QEMU = Path("/var/cache/migrator-qemu")
# Debian 12's QEMU 7.2 corrupts the memory of an emulated guest.
QEMU_SUITE = "trixie"
APT_S = 300.0
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


@dataclass(frozen=True)
class Suite:
    """A private apt: sources, lists and an empty status, so that everything a package needs is fetched."""

    folder: Path

    def unpack(self, target: Path, *packages: str, alone: bool = False) -> None:
        """Into `target`, with all that they depend on unless `alone`. Raises LabError with apt's last words."""
        download = ["download"] if alone else ["install", "--yes", "--no-install-recommends", "--download-only"]
        self._apt("apt-get", "-qq", *download, *packages)
        for package in [*self.folder.glob("*.deb"), *(self.folder / "cache/archives").glob("*.deb")]:
            subprocess.run(["dpkg-deb", "--extract", str(package), str(target)], check=True)
            package.unlink()

    def depends(self, package: str) -> list[str]:
        """The names of the packages that it needs."""
        words = self._apt("apt-cache", "depends", package).split("Depends: ")
        return [word.split()[0] for word in words[1:]]

    def _apt(self, *command: str) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf")}
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=APT_S
        )
        if done.returncode != 0:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        return done.stdout


@contextmanager
def suite(name: str, folder: Path) -> Iterator[Suite]:
    """The packages of Debian's suite `name`, from the mirror that this system trusts. `folder` goes afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    for sub in ("state/lists/partial", "cache/archives/partial", "etc"):
        (folder / sub).mkdir(parents=True)
    try:
        (folder / "status").touch()
        (folder / "etc/debian.sources").write_text(SOURCES.format(mirror=_mirror(), suite=name))
        (folder / "apt.conf").write_text(SETTINGS.format(folder=folder))
        made = Suite(folder)
        made._apt("apt-get", "-qq", "update")
        yield made
    finally:
        shutil.rmtree(folder)


def _mirror() -> str:
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Identifier: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for line in listing.splitlines():
        label, _, address = line.partition("|")
        if label == "Debian":
            return address
    raise LabError("apt knows no Debian mirror: add a source, and run apt-get update")


def install_qemu() -> None:
    """QEMU 10, if it is not there. Raises LabError."""
    if (QEMU / "complete").exists():
        return
    shutil.rmtree(QEMU, ignore_errors=True)
    QEMU.mkdir(parents=True)
    with suite(QEMU_SUITE, QEMU / "apt") as packages:
        packages.unpack(QEMU, "qemu-system-x86")
    (QEMU / "complete").touch()


def qemu() -> list[str]:
    """The emulator's command, once `install_qemu` has been there."""
    libraries = next((QEMU / "usr/lib").glob("*-linux-gnu"))
    loader = next((QEMU / "usr/lib64").glob("ld-linux-*"))
    program = [str(loader), "--library-path", str(libraries), str(QEMU / "usr/bin/qemu-system-x86_64")]
    return [*program, "-L", str(QEMU / "usr/share/qemu"), "-L", str(QEMU / "usr/share/seabios")]
