"""A TAP device as a port of a bridge: frames in and out, each behind a virtio_net_hdr. Gone when its file closes."""

import errno
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from migrator.network import check_interface_name

VNET_HEADER = bytes(10)
"""An empty struct virtio_net_hdr: nothing is left to do for this frame."""

QUEUE_FRAMES = 10_000
"""Frames that the kernel keeps while no thread reads; enough for the interpreter's lock to be away for a while."""

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_TUN_F_CSUM = 0x01
_TUN_F_TSO4 = 0x02
_TUN_F_TSO6 = 0x04
_TUN_F_TSO_ECN = 0x08
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFMTU = 0x8921
_SIOCSIFMTU = 0x8922
_SIOCSIFHWADDR = 0x8924
_SIOCSIFTXQLEN = 0x8943
_SIOCBRADDIF = 0x89A2
_IFF_UP = 0x1
_IFF_RUNNING = 0x40
_ARPHRD_ETHER = 1
_CARRIER_TIMEOUT_S = 2.0
_READ_BYTES = 65536 + 4096

_HIGH_MAC = bytes.fromhex("fe0000")
"""A bridge without a MAC of its own takes its ports' lowest; this prefix never is it."""


class Tap:
    """A TAP that is up and attached to `bridge`, in the network namespace of the calling thread. Close it.

    Kernel >= 2.6.27 (IFF_VNET_HDR). Raises OSError.
    """

    def __init__(self, name: str, bridge: str) -> None:
        self.name = check_interface_name(name)
        self.bridge = check_interface_name(bridge)
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._set_up()
            self.index = socket.if_nametoindex(name)
        except BaseException:
            os.close(self._fd)
            raise

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self._fd

    def read(self) -> bytes | None:
        """The next frame behind its header, or None if there is none now."""
        try:
            return os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return None

    def write(self, frame: bytes) -> None:
        """Have a frame (without header) arrive at the bridge from this port."""
        try:
            os.write(self._fd, VNET_HEADER + frame)
        except OSError as error:
            raise OSError(error.errno, f"writing to TAP {self.name}: {error.strerror}") from error

    def close(self) -> None:
        """Remove the device; repeatable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set_up(self) -> None:
        request = struct.pack("16sH22x", self.name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        _ioctl(self._fd, _TUNSETIFF, request, f"making TAP {self.name}")
        fcntl.ioctl(self._fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            answer = self._interface(control, _SIOCGIFMTU, b"", f"reading the MTU of {self.bridge}", self.bridge)
            self._interface(control, _SIOCSIFMTU, answer[16:20], "setting the MTU")
            mac = _HIGH_MAC + os.urandom(3)
            self._interface(control, _SIOCSIFHWADDR, struct.pack("=H6s", _ARPHRD_ETHER, mac), "setting the MAC")
            self._interface(control, _SIOCSIFTXQLEN, struct.pack("=i", QUEUE_FRAMES), "setting the queue's length")
            quiet = Path(f"/proc/sys/net/ipv6/conf/{self.name}/disable_ipv6")
            if quiet.exists():
                quiet.write_text("1")
            self._interface(control, _SIOCSIFFLAGS, struct.pack("=H", _IFF_UP), "taking up")
            index = struct.pack("=i", socket.if_nametoindex(self.name))
            self._interface(control, _SIOCBRADDIF, index, f"attaching {self.name} to", self.bridge)
            self._wait_for_carrier(control)

    def _wait_for_carrier(self, control: socket.socket) -> None:
        """A bridge refuses to set a port's state before the link's watch work has run."""
        deadline = time.monotonic() + _CARRIER_TIMEOUT_S
        while not struct.unpack_from("=H", self._interface(control, _SIOCGIFFLAGS, b"", "reading flags"), 16)[0] & (
            _IFF_RUNNING
        ):
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"TAP {self.name} has no carrier after {_CARRIER_TIMEOUT_S} s")
            time.sleep(0.001)

    def _interface(self, control: socket.socket, call: int, data: bytes, doing: str, name: str = "") -> bytes:
        request = struct.pack("16s24s", (name or self.name).encode(), data)
        return _ioctl(control.fileno(), call, request, f"{doing} {name or self.name}")


def _ioctl(fd: int, call: int, request: bytes, doing: str) -> bytes:
    try:
        return fcntl.ioctl(fd, call, request)
    except OSError as error:
        raise OSError(error.errno, f"{doing}: {error.strerror}") from error
