"""Holding a container's traffic while it runs nowhere: frames are kept and replayed, not dropped.

A dropped segment costs its sender a retransmission timeout of 200 ms and more, which would be the whole pause. So a TAP
on the destination's bridge takes the container's place while it is on its way:

    open     a TAP per interface on the bridge, its port disabled; nothing is seen or said
    take     the ports forward, the TAPs announce MACs and addresses, and what arrives is kept in order
    replay   with the container's links on the bridge (not learning yet): what is held goes out in order on the
             host's ends of its veth pairs, then the bridge's entry moves there in one step, and the TAPs go away
    close    undoes it without a replay

Until the bridge's entry moves, all frames for the container come to the TAP, so none that is held is overtaken; one
that the bridge had already on its way to the TAP when the entry moved is still read and passed on.

Frames keep their virtio_net_hdr (linux/virtio_net.h): a sender on the same machine leaves checksums and segmentation to
a device that never comes, and the header lets the container's own stack take such frames as they are.
"""

import ipaddress
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from migrator import frames
from migrator.network import Interface, NetworkError, network_errors
from migrator.rtnetlink import (
    PORT_LEARNING,
    PORT_STATE,
    PORT_UNICAST_FLOOD,
    STATE_DISABLED,
    STATE_FORWARDING,
    RouteSocket,
)
from migrator.tap import VNET_HEADER, Tap
from migrator.waiting import readable

LIMIT_BYTES = 64 << 20
ANNOUNCE_AFTER_S = (0.001, 0.003, 0.01, 0.03, 0.1)
"""What the container still had under way may draw its MAC back; never later, when the move may have been given up."""

_STRAGGLERS_S = 0.05
_CATCH_UP_S = 0.2
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15


class TrafficHold:
    """The frames of one container, one TAP per interface. Lives in the network namespace of the thread that opens it.

    `interfaces` are the container's; `name` makes the TAPs' names (`name` and a digit, 15 characters at most).
    `limit_bytes` bounds what is kept: past it the newest frames are dropped and counted. `failure` is the last error of
    a thread of its own or of one frame, for the log.
    """

    def __init__(self, name: str, interfaces: Sequence[Interface], limit_bytes: int = LIMIT_BYTES) -> None:
        self.frames_held = 0
        self.bytes_held = 0
        self.frames_dropped = 0
        self._limit_bytes = limit_bytes
        self._interfaces = tuple(interfaces)
        self._macs = [frozenset([frames.mac_bytes(interface.mac)]) for interface in interfaces]
        self._ips = [frozenset(_packed(interface.addresses)) for interface in interfaces]
        self._held: deque[tuple[int, bytes]] = deque()
        self._outputs: list[socket.socket] = []
        self._reader: threading.Thread | None = None
        self.failure: OSError | None = None
        with ExitStack() as undo, network_errors(f"preparing to hold the traffic of {name}"):
            self._route = undo.enter_context(RouteSocket())
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake)
            self._taps: list[Tap] = []
            for number, interface in enumerate(interfaces):
                tap = Tap(f"{name}{number}", interface.bridge)
                undo.callback(tap.close)
                self._taps.append(tap)
                self._route.set_port(tap.index, PORT_STATE, STATE_DISABLED)
            self._undo = undo.pop_all()

    def take(self) -> None:
        """Announce the container here and keep what arrives for it, from now on. Costs well under a millisecond."""
        if self._reader is not None:
            raise NetworkError("the container's traffic is held already")
        with network_errors("taking the container's traffic"):
            for tap in self._taps:
                while tap.read() is not None:
                    pass
                self._route.set_port(tap.index, PORT_STATE, STATE_FORWARDING)
            self._announce()
        self._reader = threading.Thread(target=self._read, name="traffic hold", daemon=True)
        self._reader.start()

    def replay(self, host_ends: Sequence[str]) -> int:
        """Send the held frames to the container and leave its traffic to it. Returns how many were sent.

        `host_ends` are the host's ends of its veth pairs, in the order of the interfaces, attached to the bridge with
        learning off. Call it when the container's sockets are back: what comes earlier is answered with a reset. What
        cannot be sent is dropped and counted, so that the container gets its traffic in any case.
        """
        if len(host_ends) != len(self._taps):
            raise NetworkError(f"{len(host_ends)} links for {len(self._taps)} interfaces: nothing was replayed")
        self._stop_reading()
        with network_errors("replaying the container's traffic"):
            indexes = [socket.if_nametoindex(name) for name in host_ends]
            for name in host_ends:
                self._outputs.append(self._undo.enter_context(_packet_socket(name)))
            sent = self._send_held()
            deadline = time.monotonic() + _CATCH_UP_S
            while self._collect(unicast_only=True) and time.monotonic() < deadline:
                sent += self._send_held()
            for index, macs in zip(indexes, self._macs, strict=True):
                for mac in macs:
                    self._route.move_mac(index, mac)
                self._route.set_port(index, PORT_LEARNING, 1)
                self._route.set_port(index, PORT_UNICAST_FLOOD, 1)
            self._collect(unicast_only=True)
            sent += self._send_held()
        self._reader = threading.Thread(target=self._pass_on_stragglers, name="traffic stragglers", daemon=True)
        self._reader.start()
        return sent

    def close(self) -> None:
        """Remove the TAPs and forget what is held; repeatable. After a replay waits up to 50 ms for stragglers."""
        self._stop_reading()
        self._held.clear()
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _announce(self) -> None:
        for tap, interface in zip(self._taps, self._interfaces, strict=True):
            for frame in frames.announcements(frames.mac_bytes(interface.mac), interface.addresses):
                tap.write(frame)

    def _read(self) -> None:
        """The reader thread: keep frames and repeat the announcement until woken."""
        started = time.monotonic()
        due = list(ANNOUNCE_AFTER_S)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for tap in self._taps:
            poll.register(tap.fileno(), select.POLLIN)
        try:
            while True:
                wait_ms = max(0, int((started + due[0] - time.monotonic()) * 1000) + 1) if due else None
                ready = {fd for fd, _ in poll.poll(wait_ms)}
                if self._wake in ready:
                    return
                if due and time.monotonic() >= started + due[0]:
                    due.pop(0)
                    self._announce()
                self._collect()
        except OSError as error:
            self.failure = error

    def _stop_reading(self) -> None:
        if self._reader is None:
            return
        os.eventfd_write(self._wake, 1)
        self._reader.join()
        self._reader = None
        os.eventfd_read(self._wake)

    def _collect(self, *, unicast_only: bool = False) -> int:
        """Keep what the TAPs have now, a bounded number of frames each. Returns how many were read."""
        count = 0
        for number, tap in enumerate(self._taps):
            macs, ips = self._macs[number], self._ips[number]
            for _ in range(256):
                data = tap.read()
                if data is None:
                    break
                count += 1
                header = data[len(VNET_HEADER) : len(VNET_HEADER) + 80]
                if frames.is_for(header, macs, () if unicast_only else ips):
                    self._keep(number, data)
        return count

    def _keep(self, number: int, data: bytes) -> None:
        if self.bytes_held + len(data) > self._limit_bytes:
            self.frames_dropped += 1
            return
        self._held.append((number, data))
        self.frames_held += 1
        self.bytes_held += len(data)

    def _send_held(self) -> int:
        sent = 0
        while self._held:
            number, data = self._held.popleft()
            self.bytes_held -= len(data)
            try:
                self._outputs[number].send(data)
                sent += 1
            except OSError as error:
                self.frames_dropped += 1
                self.failure = error
        return sent

    def _pass_on_stragglers(self) -> None:
        """A processor that looked up the bridge's entry just before it moved may still deliver to the TAP."""
        deadline = time.monotonic() + _STRAGGLERS_S
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                ready = readable([tap.fileno() for tap in self._taps], left_s)
                if ready and self._collect(unicast_only=True):
                    self._send_held()
        except OSError as error:
            self.failure = error


def _packet_socket(name: str) -> socket.socket:
    """A socket that sends whole frames, each behind its virtio_net_hdr, out of the interface."""
    output = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        output.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        output.bind((name, 0))
    except OSError as error:
        output.close()
        raise OSError(error.errno, f"opening a packet socket on {name}: {error.strerror}") from error
    return output


def _packed(addresses: Iterable[str]) -> list[bytes]:
    return [ipaddress.ip_address(address).packed for address in addresses]
