"""The switch that joins the machines, and the client beside them: two network namespaces of this machine."""

import ctypes
import fcntl
import os
import struct
import subprocess
import threading
from pathlib import Path

from labkit import switch
from labkit.hosts import LabError, ip
from vmkit.machines import CLIENT, CLIENT_ADDRESS, SWITCH, Machine

_CLONE_NEWNET = 0x40000000
# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def make() -> None:
    """The switch with its client. Raises LabError, CalledProcessError."""
    switch.make(SWITCH, CLIENT, CLIENT_ADDRESS)


def remove() -> None:
    """Right also if there is none."""
    for name in (SWITCH, CLIENT):
        if Path("/run/netns", name).exists():
            subprocess.run(["ip", "netns", "delete", name], check=True)


def plug(machine: Machine) -> int:
    """A port of the switch for the machine, with its name: a TAP's descriptor. The port goes with its last holder."""
    port = _tap(machine.name)
    ip(f"link set {machine.name} addrgenmode none master switch up\n", SWITCH)
    return port


def _tap(name: str) -> int:
    """Made inside the switch by a thread that ends there, since QEMU itself has to reach the world outside."""
    found: list[int | OSError] = []

    def make_there() -> None:
        try:
            found.append(_open_within(Path("/run/netns", SWITCH), name))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=make_there)
    thread.start()
    thread.join()
    result = found[0]
    if isinstance(result, OSError):
        raise LabError(f"make the TAP {name} in {SWITCH}: {result.strerror}")
    return result


def _open_within(namespace: Path, name: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open("rb") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return tap
