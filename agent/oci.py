"""The OCI runtime configuration (config.json, opencontainers/runtime-spec 1.0.2) of a container, from its spec.

What CRIU has to carry inside the freeze is kept small: no tmpfs on /dev (runc makes the few device files in the root
file system itself), /dev/shm from outside, and no masked folders, since each would be a tmpfs of its own.
"""

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import seccomp
from agent.cgroup import CPU_PERIOD_US
from agent.rootfs import User
from migrator.errors import InvalidArgument
from migrator.v1.container_pb2 import ContainerSpec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OPEN_FILES = 1 << 20
DEFAULT_COMMAND = ("/sbin/init",)

DEFAULT_CAPABILITIES = frozenset({
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
})  # fmt: skip
CAPABILITIES = DEFAULT_CAPABILITIES | {
    "CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_BLOCK_SUSPEND", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_LEASE", "CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE",
    "CAP_NET_ADMIN", "CAP_NET_BROADCAST", "CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
}  # fmt: skip

# Files only. One that the kernel does not have is left out by runc.
MASKED_FILES = ("/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/timer_list")
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/proc/scsi", "/proc/acpi")

SHM = "/dev/shm"
_HIDDEN = ["nosuid", "noexec", "nodev"]
_MOUNTS = (
    ("/proc", "proc", _HIDDEN),
    ("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
    ("/dev/mqueue", "mqueue", _HIDDEN),
    ("/sys", "sysfs", [*_HIDDEN, "ro"]),
)


def capabilities(spec: ContainerSpec) -> set[str]:
    """The container's capabilities: the default ones, those added, without those dropped. ALL stands for every one."""
    result = set(DEFAULT_CAPABILITIES) | _named(spec.add_capabilities)
    return result - _named(spec.drop_capabilities)


def _named(names: Sequence[str]) -> set[str]:
    result: set[str] = set()
    for name in names:
        full = name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}"
        if full == "CAP_ALL":
            result |= CAPABILITIES
        elif full in CAPABILITIES:
            result.add(full)
        else:
            raise InvalidArgument(f"capability {name!r} is not known: see capabilities(7) for the names")
    return result


def environment(spec: ContainerSpec, hostname: str, user: User, extra: Sequence[str] = ()) -> list[str]:
    """NAME=value of a process in the container: defaults, then the spec's, then `extra`; the last one counts."""
    merged = {"PATH": PATH, "HOSTNAME": hostname, "HOME": user.home}
    for item in [*spec.environment, *extra]:
        name, equals, value = item.partition("=")
        if not name or not equals or "\0" in item:
            shown = repr(name) if equals else "without a name"
            raise InvalidArgument(f"environment variable {shown} is not given as NAME=value")
        merged[name] = value
    return [f"{name}={value}" for name, value in merged.items()]


def process(
    spec: ContainerSpec,
    hostname: str,
    user: User,
    *,
    command: Sequence[str] = (),
    extra_environment: Sequence[str] = (),
    working_directory: str = "",
    terminal: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A process of the container: the first one, or one to exec. `terminal` is (rows, columns) if it has one."""
    allowed = sorted(capabilities(spec))
    # A user that is not root starts without capabilities, but a set-user-ID program may get them.
    held = allowed if user.uid == 0 else []
    # Where the agent lacks CAP_SYS_RESOURCE, asking for more than it has itself would fail.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    result: dict[str, Any] = {
        "terminal": terminal is not None,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(command or spec.command or DEFAULT_COMMAND),
        "env": environment(spec, hostname, user, extra_environment),
        "cwd": working_directory or spec.working_directory or "/",
        "capabilities": {"bounding": allowed, "effective": held, "permitted": held},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": open_files, "soft": open_files}],
        "noNewPrivileges": False,
    }
    if terminal is not None:
        result["consoleSize"] = {"height": terminal[0], "width": terminal[1]}
        result["env"] = _with_default(result["env"], "TERM", "xterm")
    return result


def _with_default(environment: list[str], name: str, value: str) -> list[str]:
    return (
        environment if any(item.startswith(f"{name}=") for item in environment) else [*environment, f"{name}={value}"]
    )


def mounts(spec: ContainerSpec, shm: Path, volumes: Path) -> list[dict[str, Any]]:
    """What is mounted in the container beside its root; `volumes` holds the mount points `1`, `2` … on the host."""
    result: list[dict[str, Any]] = [
        {"destination": target, "type": kind, "source": kind, "options": list(options)}
        for target, kind, options in _MOUNTS
    ]
    result.append(_bind(shm, SHM, "rw", *_HIDDEN))
    for index, volume in enumerate(spec.volumes):
        if index:
            result.append(_bind(volumes / str(index), volume.mount_point, "rw"))
    result += [_bind(Path(b.source), b.target, "ro" if b.read_only else "rw") for b in spec.binds]
    return result


def _bind(source: Path, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def resources(spec: ContainerSpec) -> dict[str, Any]:
    """Limits of the control group. No swap beyond the memory limit; devices as runc's default, nothing else."""
    result: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if spec.memory_limit_bytes:
        result["memory"] = {"limit": spec.memory_limit_bytes}
    if spec.cpu_millis:
        result["cpu"] = {"period": CPU_PERIOD_US, "quota": spec.cpu_millis * CPU_PERIOD_US // 1000}
    if spec.pids_limit:
        result["pids"] = {"limit": spec.pids_limit}
    return result


def config(
    name: str, spec: ContainerSpec, user: User, *, shm: Path, volumes: Path, cgroup: str, netns: Path
) -> dict[str, Any]:
    """config.json as a value. `cgroup` is the group's path below the hierarchies' roots."""
    hostname = spec.hostname or name
    linux: dict[str, Any] = {
        "cgroupsPath": cgroup,
        "namespaces": [
            {"type": "pid"},
            {"type": "mount"},
            {"type": "uts"},
            {"type": "ipc"},
            {"type": "network", "path": str(netns)},
        ],
        "resources": resources(spec),
        "maskedPaths": list(MASKED_FILES),
        "readonlyPaths": list(READ_ONLY),
        # Where the host's mounts are shared, as systemd makes them, the container's would be slaves of theirs, and CRIU
        # takes the masks for a part of the root.
        "rootfsPropagation": "rprivate",
    }
    if not spec.seccomp_unconfined:
        linux["seccomp"] = seccomp.profile(capabilities(spec))
    return {
        "ociVersion": "1.0.2",
        "process": process(spec, hostname, user),
        "root": {"path": "rootfs", "readonly": False},
        "hostname": hostname,
        "mounts": mounts(spec, shm, volumes),
        "linux": linux,
    }
