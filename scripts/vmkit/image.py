"""The disk that machines start from: a Debian with its cloud kernel, made from packages and kept in a cache.

The machine's own ways to the world go along: the mirrors and settings of its apt, pip's configuration, the certificate
authorities that were added to it. Two kinds: `bare` has nothing of the project; `ready` has been through scripts/setup
in a chroot, which an emulated machine would need many minutes for. Neither contains the project itself.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent import template
from labkit.hosts import CHECKOUT, LabError
from vmkit.machines import CACHE, KEY

# In the key of what is kept: changes with what is done to make it.
VERSION = 1
DISK_SIZE = "32G"
PACKAGES = (
    "ca-certificates", "dbus", "e2fsprogs", "initramfs-tools", "iproute2", "kmod", "less", "linux-image-cloud-amd64",
    "netbase", "openssh-client", "openssh-server", "procps", "systemd-sysv", "systemd-timesyncd", "udev", "zstd",
)  # fmt: skip
# What scripts/setup depends on.
SETUP = ("pyproject.toml", "requirements.lock", "scripts/setup", "scripts/setup-criu", "scripts/criu-shim.c")
AUTHORITIES = Path("/usr/local/share/ca-certificates")
PIP_CONFIGURATION = Path("/etc/pip.conf")

FSTAB = """\
/dev/vda / ext4 errors=remount-ro,noatime 0 1
"""


def ready_made(suite: str, *, bare: bool) -> Path:
    """A folder with `disk.raw`, `vmlinuz` and `initrd`, from the cache if it is there. Raises LabError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    CACHE.chmod(0o755)
    target = CACHE / f"{suite}-{'bare' if bare else 'ready'}-{_key(suite, bare=bare)}"
    with (CACHE / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_key()
        if not target.is_dir():
            print(f"vmlab: making a disk of Debian {suite}; the next lab takes it from {CACHE}", flush=True)
            for old in CACHE.glob(f"{target.name.rpartition('-')[0]}-*"):
                shutil.rmtree(old)
            _make(target, suite, bare=bare)
    return target


def _key(suite: str, *, bare: bool) -> str:
    parts = [str(VERSION), suite, *PACKAGES]
    if not bare:
        parts += [(CHECKOUT / name).read_text() for name in SETUP]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _make_key() -> None:
    """With which one gets into every machine, and from one to another."""
    if not KEY.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmlab", "-f", str(KEY)], check=True)


def _make(target: Path, suite: str, *, bare: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=CACHE) as folder:
        work = Path(folder)
        work.chmod(0o755)  # apt's own user must be able to enter it
        root, new = work / "root", work / "new"
        new.mkdir()
        _debootstrap(root, suite, work / "said.log")
        _configure(root)
        if not bare:
            _set_up(root, work / "said.log")
        for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
            shutil.copy(next((root / "boot").glob(pattern)), new / name)
        disk = new / "disk.raw"
        options = ["-q", "-F", "-L", "root", "-d", str(root), "-E", "root_owner=0:0"]
        _run(["mkfs.ext4", *options, str(disk), DISK_SIZE], work / "said.log")
        new.replace(target)


def _debootstrap(root: Path, suite: str, said: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise LabError("mmdebstrap is missing: run scripts/setup")
    settings = said.parent / "00host"
    settings.write_text(
        subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    )
    command = [
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in template.LEFT_OUT),
        f"--setup-hook=copy-in {settings} /etc/apt/apt.conf.d", suite, str(root), *template.sources(suite),
    ]  # fmt: skip
    _run(command, said)


def _configure(root: Path) -> None:
    etc = root / "etc"
    (etc / "fstab").write_text(FSTAB)
    (etc / "resolv.conf").unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", etc / "resolv.conf")  # that of the build; see disk.py for the machine's
    (root / "var/log/journal").mkdir(parents=True, exist_ok=True)
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy(KEY.with_suffix(".pub"), ssh / "authorized_keys")
    shutil.copy(KEY, ssh / "id_ed25519")
    (ssh / "config").write_text("Host *\n  StrictHostKeyChecking no\n  LogLevel ERROR\n")
    if AUTHORITIES.is_dir():
        shutil.copytree(AUTHORITIES, root / AUTHORITIES.relative_to("/"), dirs_exist_ok=True)
    if PIP_CONFIGURATION.exists():
        shutil.copy(PIP_CONFIGURATION, etc / "pip.conf")
    enable = ["systemctl", "--root", str(root), "-q", "enable", "systemd-networkd", "ssh", "serial-getty@ttyS0"]
    subprocess.run(enable, check=True)
    subprocess.run(["chroot", str(root), "update-ca-certificates"], capture_output=True, check=True)


def _set_up(root: Path, said: Path) -> None:
    """scripts/setup with the project where the README has it, which is then taken away; what it installed stays."""
    project = root / "opt/migrator"
    copy_project(project)
    with _within(root):
        _run(["chroot", str(root), "/opt/migrator/scripts/setup"], said, {**_clean_environment(), "RUNLEVEL": "1"})
    kept = project / ".venv"
    kept.rename(root / "opt/venv")
    shutil.rmtree(project)
    project.mkdir()
    (root / "opt/venv").rename(kept)


@contextmanager
def _within(root: Path) -> Iterator[None]:
    """What programs expect to be mounted. Services are not started."""
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    points = [(root / name, ["--rbind", "--make-rslave", f"/{name}"]) for name in ("dev", "sys")]
    points.append((root / "proc", ["-t", "proc", "proc"]))
    mounted: list[Path] = []
    try:
        for point, options in points:
            subprocess.run(["mount", *options, str(point)], check=True)
            mounted.append(point)
        yield
    finally:
        for point in reversed(mounted):
            subprocess.run(["umount", "--recursive", "--lazy", str(point)], check=True)
        policy.unlink()


def packed_project() -> bytes:
    """This checkout as it is, without what git ignores, as a tar archive."""
    git = ["git", "-c", f"safe.directory={CHECKOUT}"]
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=CHECKOUT, capture_output=True, check=True).stdout
    there = b"\0".join(name for name in names.split(b"\0") if name and (CHECKOUT / os.fsdecode(name)).exists())
    pack = ["tar", "--create", "--null", "--files-from=-"]
    return subprocess.run(pack, cwd=CHECKOUT, input=there, capture_output=True, check=True).stdout


def copy_project(target: Path) -> None:
    """`packed_project`, unpacked there."""
    target.mkdir(parents=True, exist_ok=True)
    unpack = ["tar", "--extract", "--no-same-owner", "--directory", str(target)]
    subprocess.run(unpack, input=packed_project(), check=True)


def _clean_environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name.startswith("PIP_") and not value.startswith("/opt")
    }
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**kept, "PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


def _run(command: list[str], said: Path, environment: dict[str, str] | None = None) -> None:
    with said.open("w") as log:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False,
            env=environment or _clean_environment(),
        ).returncode  # fmt: skip
    if code != 0:
        words = "\n".join(said.read_text(errors="replace").splitlines()[-20:])
        raise LabError(f"{' '.join(command[:2])} ended with code {code}:\n{words}")
