"""Does this kernel do what moving a container needs? Each probe is a small real try that leaves nothing behind."""

import ctypes
import fcntl
import os
import platform
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from agent.cgroup import Cgroup
from agent.findings import Finding, ok, problem, warning
from blockdev import tracker
from migrator import memory
from migrator.errors import ExecutionError

# userfaultfd(2): the number is the architecture's.
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_TCP_REPAIR, _TCP_REPAIR_OFF = 19, 0
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000

# Measured on an idle machine with an ordinary disk.
COMPARING_S_PER_GIB = 1

_NEWER = "run a kernel of 6.7 or newer with CONFIG_USERFAULTFD"
_libc = ctypes.CDLL(None, use_errno=True)


def version() -> Finding:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    if numbers < (5, 10):
        return problem("kernel.version", f"Linux {release} is too old", "run Linux 6.7 or newer (5.10 at the least)")
    if numbers < (6, 7):
        return warning(
            "kernel.version", f"Linux {release} has no asynchronous write protection", "run Linux 6.7 or newer"
        )
    return ok("kernel.version", f"Linux {release}")


def memory_tracker() -> Finding:
    """How writes to memory will be seen, and why so."""
    subject = "kernel.memory"
    method, why = memory.choose()
    if method == "none":
        return warning(subject, f"writes to memory cannot be tracked ({why}): all of it is sent in the freeze", _NEWER)
    return ok(subject, f"writes to memory are tracked by {method}: {why}")


def userfaultfd() -> Finding:
    """For the kernel's own accesses too, as CRIU's restore and the fill need it."""
    subject = "kernel.userfaultfd"
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        return problem(subject, f"not known for {platform.machine()}", "use x86_64 or aarch64")
    descriptor = _libc.syscall(number, os.O_CLOEXEC)
    if descriptor < 0:
        return problem(
            subject,
            f"userfaultfd: {os.strerror(ctypes.get_errno())}; no container can come here",
            "run the agent as root, on a kernel with CONFIG_USERFAULTFD",
        )
    os.close(descriptor)
    return ok(subject, "a container goes on here while its memory is mapped in behind it")


def time_namespaces() -> Finding:
    if Path("/proc/self/ns/time").exists():
        return ok("kernel.time_namespaces", "there")
    return warning(
        "kernel.time_namespaces",
        "not in this kernel: monotonic clocks jump when a container moves",
        "run a kernel with CONFIG_TIME_NS",
    )


def tcp_repair() -> Finding:
    subject = "kernel.tcp_repair"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF)
        except OSError as error:
            return problem(
                subject, f"TCP_REPAIR: {error.strerror}", "run as root, on a kernel with CONFIG_CHECKPOINT_RESTORE"
            )
    return ok(subject, "works")


def write_tracker() -> Finding:
    """Which of the write trackers will be used."""
    why = tracker.probe()
    if why is None:
        return ok("kernel.ebpf", "what is written to disks is tracked by eBPF")
    return warning(
        "kernel.ebpf",
        f"what is written to disks is found by comparing, since eBPF cannot track it ({why}): all data of a container's"
        f" volumes is read while it is frozen, some {COMPARING_S_PER_GIB:g} s for each GiB",
        "run the agent as root, on Linux 6.1 or newer with CONFIG_BPF_JIT, CONFIG_BPF_EVENTS and CONFIG_DEBUG_INFO_BTF",
    )


def tap() -> Finding:
    subject, name = "kernel.tun", f"doctor{os.getpid() % 1000000}"
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        finally:
            os.close(descriptor)
    except OSError as error:
        return problem(
            subject,
            f"no TAP can be made: {error.strerror}",
            "modprobe tun; traffic cannot be held during a move without it",
        )
    return ok(subject, "a TAP can be made")


def freezer(parent: str) -> Finding:
    subject = "cgroup"
    try:
        folder = Cgroup(f"/{parent}-doctor-{os.getpid()}").freezer
        folder.mkdir()
        kind = next((k for k, f in (("v1", "freezer.state"), ("v2", "cgroup.freeze")) if (folder / f).exists()), "")
        folder.rmdir()
    except (OSError, ExecutionError) as error:
        return problem(subject, f"no control group can be made: {error}", "mount cgroup2 at /sys/fs/cgroup")
    if not kind:
        return problem(
            subject, f"{folder.parent} has no freezer", "mount cgroup2 at /sys/fs/cgroup (Linux 5.2 or newer)"
        )
    return ok(subject, f"freezer of cgroup {kind}")


ALL: tuple[Callable[[], Finding], ...] = (
    version,
    memory_tracker,
    userfaultfd,
    time_namespaces,
    tcp_repair,
    write_tracker,
    tap,
)
