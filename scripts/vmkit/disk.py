"""A machine's own disk: a copy of the image, with what makes it this machine, and the project's files beside it."""

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmkit.image import copy_project
from vmkit.machines import CLIENT_ADDRESS, Machine

# Root file systems that `migrator image build` has made on this machine already.
TARBALLS = Path("/var/cache/migrator")
NAME_SERVER = "10.0.2.3"  # QEMU's, which asks this machine's

NETWORK = {
    "10-br0.netdev": "[NetDev]\nName=br0\nKind=bridge\nMACAddress={mac}\n",
    "10-br0.network": (
        "[Match]\nName=br0\n[Network]\nAddress={address}/16\nAddress={address6}/64\nIPv6AcceptRA=no\n"
        "ConfigureWithoutCarrier=yes\nIPv6DuplicateAddressDetection=0\n[Link]\nRequiredForOnline=no\n"
    ),
    "20-switch.network": (
        "[Match]\nMACAddress=02:77:02:00:00:{index:02x}\n[Network]\nBridge=br0\nLinkLocalAddressing=no\n"
        "[Link]\nRequiredForOnline=no\n"
    ),
    "30-out.network": (
        "[Match]\nMACAddress=02:77:03:00:00:{index:02x}\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"
    ),
}


def make(machine: Machine, image: Path, machines: Sequence[Machine]) -> None:
    """The machine's folder: its disk, its kernel."""
    machine.folder.mkdir(parents=True)
    (machine.folder / "kernel").mkdir()
    for name in ("vmlinuz", "initrd"):
        shutil.copy(image / name, machine.folder / "kernel" / name)
    copy = ["cp", "--sparse=always", "--reflink=auto", str(image / "disk.raw"), str(machine.disk)]
    subprocess.run(copy, check=True)
    with _mounted(machine.disk) as root:
        _personalise(root, machine, machines)
        copy_project(root / "opt/migrator")
        kept = root / TARBALLS.relative_to("/")
        kept.mkdir(parents=True, exist_ok=True)
        for tarball in TARBALLS.glob("*.tar.zst"):
            shutil.copy(tarball, kept)


def _personalise(root: Path, machine: Machine, machines: Sequence[Machine]) -> None:
    etc = root / "etc"
    (etc / "hostname").write_text(f"{machine.name}\n")
    # Each host is known by its own name as the address that others know it by.
    names = [("127.0.0.1", "localhost"), (CLIENT_ADDRESS, "client"), *((peer.address, peer.name) for peer in machines)]
    (etc / "hosts").write_text("".join(f"{address}\t{name}\n" for address, name in names))
    (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
    for name, text in NETWORK.items():
        (etc / "systemd/network" / name).write_text(
            text.format(mac=machine.mac, address=machine.address, address6=machine.address6, index=machine.index)
        )


@contextmanager
def _mounted(disk: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="migrator-vmlab-") as folder:
        subprocess.run(["mount", "-o", "loop", str(disk), folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)
