"""Does this kernel do what moving a container needs? Each probe is a small real try that leaves nothing behind."""

import ctypes
import fcntl
import mmap
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
from migrator.errors import ExecutionError

# userfaultfd(2): the number is the architecture's.
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_UFFD_FEATURE_WP_ASYNC = 1 << 15
# _IOWR('f', 16, struct pm_scan_arg) of linux/fs.h, Linux 6.7
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_WRITTEN = 1 << 1
_TCP_REPAIR, _TCP_REPAIR_OFF = 19, 0
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SOFT_DIRTY = 1 << 55
_PAGE = mmap.PAGESIZE

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


def userfaultfd() -> Finding:
    subject = "kernel.userfaultfd"
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        return warning(subject, f"not known for {platform.machine()}", "use x86_64 or aarch64")
    descriptor = _libc.syscall(number, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if descriptor < 0:
        return warning(subject, f"userfaultfd: {os.strerror(ctypes.get_errno())}", _NEWER)
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, _UFFD_FEATURE_WP_ASYNC, 0))
    except OSError as error:
        return warning(subject, f"no asynchronous write protection: {error.strerror}", _NEWER)
    finally:
        os.close(descriptor)
    return ok(subject, "works, with asynchronous write protection")


def pagemap_scan() -> Finding:
    subject = "kernel.pagemap_scan"
    with mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        start = _address(memory)
        request = struct.pack("=12Q", 96, 0, start, start + _PAGE, 0, 0, 0, 0, 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            try:
                fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request)
            except OSError as error:
                return warning(subject, f"PAGEMAP_SCAN: {error.strerror}", _NEWER)
    return ok(subject, "works")


def soft_dirty() -> Finding:
    """Only needed where write protection does not work."""
    with mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(_address(memory) // _PAGE * 8)
            (entry,) = struct.unpack("=Q", pagemap.read(8))
    there = "there as well" if entry & _SOFT_DIRTY else "not in this kernel; write protection does the same"
    return ok("kernel.soft_dirty", there)


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
    userfaultfd,
    pagemap_scan,
    soft_dirty,
    time_namespaces,
    tcp_repair,
    write_tracker,
    tap,
)


def _address(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    try:
        return ctypes.addressof(view)
    finally:
        del view
