"""Does this host have what moving a container needs beside the kernel: programs, disk, network, certificates, peers?"""

import datetime
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import grpc

from agent.config import Config
from agent.findings import Finding, ok, problem, warning
from agent.hosts import criu_version
from agent.peers import open_channel
from agent.runtime import environment, find_program
from blockdev import loop, pool, reflink, resize
from blockdev.errors import BlockError
from blockdev.volume import SUFFIX
from migrator import certificates, pageless, status
from migrator.certificates import Role
from migrator.errors import ExecutionError, MigratorError
from migrator.units import format_size
from migrator.v1 import host_pb2, host_pb2_grpc

CRIU_NEEDED = (4, 2)
# On a busy or an emulated host the smallest program may take seconds.
PROGRAM_S = 15.0
PEER_S = 5.0
EXPIRY_WARNING = datetime.timedelta(days=30)
LITTLE_DISK_BYTES = 2 << 30
SETUP = "run scripts/setup"


def criu() -> Finding:
    version = criu_version()
    if not version:
        return problem("criu", "no CRIU that starts was found", SETUP)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < CRIU_NEEDED:
        return problem("criu", f"CRIU {version} is too old: 4.2 or newer is needed", SETUP)
    return ok("criu", f"CRIU {version}, {find_program('criu')}")


def criu_check() -> Finding:
    try:
        done = _run(find_program("criu"), "check")
    except ExecutionError as error:
        return problem("criu.check", str(error), SETUP)
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip().splitlines()
        return problem(
            "criu.check", f"criu check: {'; '.join(words[-3:])}", "see `criu check` for what the kernel lacks"
        )
    return ok("criu.check", "criu check finds everything it needs")


def pageless_dump() -> Finding:
    """Whether CRIU's dump can be kept from copying memory while a container stands still."""
    subject = "criu.dump"
    try:
        with tempfile.TemporaryDirectory(prefix="migrator-doctor-") as folder:
            pageless.probe(find_program("criu"), environment(), Path(folder))
    except MigratorError as error:
        return warning(subject, f"CRIU dumps all memory while a container stands still: {error}", SETUP)
    return ok(subject, "CRIU dumps without memory, which is sent before")


def program(name: str, *, needed_for: str = "") -> Finding:
    """`needed_for` is set for one that most of the agent's work does without."""
    missing = warning if needed_for else problem
    try:
        path = find_program(name)
    except ExecutionError:
        return missing(name, f"{name} is not installed{needed_for and f': needed to {needed_for}'}", SETUP)
    try:
        done = _run(path, "--version")
    except ExecutionError as error:
        return missing(name, str(error), "see what this host is busy with, and try again")
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        return missing(name, f"{path} does not start: {' '.join(lines[-1:])}", SETUP)
    return ok(name, lines[0])


def nftables() -> Finding:
    try:
        done = _run(find_program("nft"), "list", "tables")
    except ExecutionError as error:
        return problem("nftables", str(error), SETUP)
    if done.returncode != 0:
        return problem("nftables", f"nft list tables: {done.stderr.strip()}", "run a kernel with CONFIG_NF_TABLES_INET")
    return ok("nftables", "nft works")


def disk(config: Config) -> list[Finding]:
    """Clones and loop devices where volumes are, or would be."""
    folder = config.state_dir
    while not folder.exists():
        folder = folder.parent
    if os.path.ismount(config.state_dir / pool.FOLDER):
        folder = config.state_dir / pool.FOLDER
    return [_reflink(folder), _loop(folder), _attached(folder), _growth(), _room(folder)]


def _reflink(folder: Path) -> Finding:
    if reflink.supported(folder):
        return ok("disk.reflink", f"{folder} can clone files")
    if "\txfs\n" in Path("/proc/filesystems").read_text() and shutil.which("mkfs.xfs"):
        return ok("disk.reflink", f"{folder} cannot clone files; the agent makes a pool with XFS in it")
    return problem("disk.reflink", f"{folder} cannot clone files, and there is no XFS for a pool", "install xfsprogs")


def _loop(folder: Path) -> Finding:
    subject = "disk.direct_io"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as image:
            image.truncate(1 << 20)
            device = loop.attach(Path(image.name))
            try:
                direct = device.direct_io
            finally:
                device.detach()
    except (OSError, BlockError) as error:
        return problem(subject, f"no loop device on {folder}: {error}", "modprobe loop, and see losetup -l")
    if not direct:
        return problem(
            subject, f"loop devices on {folder} go through the page cache", "keep state_dir on XFS, ext4 or btrfs"
        )
    return ok(subject, f"loop devices on {folder} do direct I/O")


def _growth() -> Finding:
    subject = "disk.growth"
    if resize.may_grow_mounted("ext4"):
        return ok(subject, "volumes can grow while their containers run")
    return warning(
        subject,
        "without CAP_SYS_RESOURCE, volumes with ext4 grow only while their containers are stopped",
        "let the agent have CAP_SYS_RESOURCE, or use xfs for volumes that have to grow",
    )


def _attached(folder: Path) -> Finding:
    """Of each volume in use, what the kernel really does."""
    subject = "disk.volumes"
    found = loop.find_all((folder / "volumes").glob(f"*{SUFFIX}"))
    for image, device in found:
        if not device.direct_io or device.block_bytes != loop.BLOCK_BYTES:
            how = f"blocks of {device.block_bytes} bytes" if device.direct_io else "no direct I/O"
            return problem(
                subject,
                f"{image.name} is attached to {device.path} with {how}: its writes are slow, and twice in memory",
                "keep state_dir on XFS, ext4 or btrfs, then stop and start the container",
            )
    return ok(subject, f"{len(found)} volumes in use, all with direct I/O and blocks of {loop.BLOCK_BYTES} bytes")


def _room(folder: Path) -> Finding:
    room = pool.room(folder)
    free = format_size(room.free_bytes)
    if room.free_bytes < 2 * room.reserve_bytes:
        return problem(
            "disk.room",
            f"{free} are free in {folder}: containers are paused below {format_size(room.reserve_bytes)}, and go on at"
            f" {format_size(2 * room.reserve_bytes)}",
            "remove images, snapshots or containers, or move some to another host",
        )
    if room.free_bytes < LITTLE_DISK_BYTES:
        return warning("disk.room", f"{free} are free in {folder}", "remove containers or images")
    return ok("disk.room", f"{free} are free in {folder}")


def bridge(config: Config) -> Finding:
    name = config.network.bridge
    folder = Path("/sys/class/net") / name
    if not (folder / "bridge").is_dir():
        return problem(
            "network.bridge", f"there is no bridge {name}", f"ip link add {name} type bridge, or set network.bridge"
        )
    # linux/netdevice.h: 3 is an address that was set; otherwise it follows the bridge's ports.
    if (folder / "addr_assign_type").read_text().strip() != "3":
        return warning(
            "network.bridge",
            f"the MAC of bridge {name} changes with its ports: clients lose a second when a container comes or goes",
            f"ip link set {name} address {(folder / 'address').read_text().strip()}",
        )
    return ok("network.bridge", f"bridge {name}")


def run_folder() -> Finding:
    """CRIU keeps what it has found out about the kernel in /run only if that is a tmpfs."""
    kinds = [line.split(" - ")[1].split(" ")[0] for line in _mountinfo() if line.split(" ")[4] == "/run"]
    if kinds[-1:] == ["tmpfs"]:
        return ok("run", "/run is a tmpfs")
    return warning("run", "/run is not a tmpfs: CRIU probes the kernel at each start", "mount a tmpfs at /run")


def tls(config: Config) -> list[Finding]:
    """The host's certificate, its key and its CA, as far as this host can see."""
    if not config.listen_address:
        return [
            warning("certificates", "no [listen] address: this host can only be used locally", "set listen.address")
        ]
    try:
        certificate, authority = certificates.load(config.tls.certificate), certificates.load(config.tls.ca)
        mode = stat.S_IMODE(config.tls.key.stat().st_mode)
    except MigratorError as error:
        return [
            problem("certificates", str(error), "migrator cert init DIR, then migrator cert issue DIR NAME --role peer")
        ]
    except OSError as error:
        return [
            problem("certificates", f"{config.tls.key}: {error.strerror}", "migrator cert issue DIR NAME --role peer")
        ]
    issue = f"migrator cert issue DIR {config.host} --role peer"
    found = []
    if not certificates.is_signed_by(certificate, authority):
        found.append(problem("certificates", f"{config.tls.certificate} is not signed by {config.tls.ca}", issue))
    if certificates.role_of(certificate) is not Role.PEER:
        found.append(problem("certificates", f"{config.tls.certificate} does not carry the role peer", issue))
    if config.host not in certificates.names_of(certificate):
        found.append(problem("certificates", f"{config.tls.certificate} is not for {config.host}", issue))
    now = datetime.datetime.now(datetime.UTC)
    for path, one in ((config.tls.certificate, certificate), (config.tls.ca, authority)):
        until = one.not_valid_after_utc
        if not one.not_valid_before_utc <= now <= until:
            found.append(
                problem("certificates", f"{path} is valid from {one.not_valid_before_utc} to {until} only", issue)
            )
        elif until - now < EXPIRY_WARNING:
            found.append(warning("certificates", f"{path} expires on {until:%Y-%m-%d}", f"{issue} --force"))
    if mode & 0o077:
        found.append(warning("certificates", f"others may read {config.tls.key}", f"chmod 600 {config.tls.key}"))
    return found or [ok("certificates", f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}")]


def peer(config: Config, name: str) -> Finding:
    subject = f"peer.{name}"
    try:
        with open_channel(config, name) as connection:
            stub = host_pb2_grpc.HostServiceStub(connection)
            host = stub.GetHost(host_pb2.GetHostRequest(), timeout=PEER_S).host
    except grpc.RpcError as error:
        return warning(subject, str(status.from_rpc(error, name)), f"start migrator-agent on {name}; see [peers]")
    except MigratorError as error:
        return warning(subject, str(error), "see [tls] and [peers]")
    if host.name != name:
        return problem(subject, f"the agent at {config.peers[name]} says that it is {host.name}", "see [peers]")
    mine = criu_version()
    if host.criu_version != mine:
        return warning(subject, f"CRIU {host.criu_version} there and {mine} here", "use the same version on all hosts")
    return ok(subject, f"answers, Linux {host.kernel}, CRIU {host.criu_version}")


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExecutionError(f"{' '.join(command)} has not ended within {PROGRAM_S:g} s") from error
    except OSError as error:
        raise ExecutionError(f"{command[0]}: {error}") from error


def _mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()
