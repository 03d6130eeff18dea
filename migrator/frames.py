"""Ethernet frames that say or ask where an address is: built and recognised, nothing else.

ARP after RFC 826 and RFC 5227, neighbour discovery after RFC 4861, RARP as a switch's teacher.
Parsing takes whatever a wire may carry: a frame that is short or malformed is simply not recognised.
"""

import ipaddress
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

BROADCAST = b"\xff" * 6
HEADER_BYTES = 14
MIN_FRAME_BYTES = 60

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_RARP = 0x8035
ETHERTYPE_IPV6 = 0x86DD

ARP_REQUEST = 1
ARP_REPLY = 2
_RARP_REQUEST = 3

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_ICMPV6 = 58
_NEIGHBOUR_SOLICITATION = 135
_NEIGHBOUR_ADVERTISEMENT = 136
_NA_OVERRIDE = 0x20000000
_TARGET_LINK = 2
_ALL_NODES = ipaddress.IPv6Address("ff02::1").packed


@dataclass(frozen=True)
class Arp:
    """An ARP packet for IPv4 over Ethernet."""

    operation: int
    sender_mac: bytes
    sender_ip: bytes
    target_mac: bytes
    target_ip: bytes


def mac_bytes(mac: str) -> bytes:
    """`02:00:00:00:00:01` as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(mac: bytes) -> str:
    """Six bytes as `02:00:00:00:00:01`."""
    return mac.hex(":")


def ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame without its check sequence, padded to the shortest that Ethernet allows."""
    return (destination + source + struct.pack("!H", ethertype) + payload).ljust(MIN_FRAME_BYTES, b"\0")


def arp(packet: Arp, destination: bytes = BROADCAST) -> bytes:
    """The packet as a frame."""
    body = _ARP.pack(
        1, ETHERTYPE_IPV4, 6, 4, packet.operation,
        packet.sender_mac, packet.sender_ip, packet.target_mac, packet.target_ip,
    )  # fmt: skip
    return ethernet(destination, packet.sender_mac, ETHERTYPE_ARP, body)


def parse_arp(frame: bytes) -> Arp | None:
    """The ARP packet in the frame, if that is what it is."""
    if len(frame) < HEADER_BYTES + _ARP.size or frame[12:14] != b"\x08\x06":
        return None
    hardware, protocol, hardware_size, protocol_size, *fields = _ARP.unpack_from(frame, HEADER_BYTES)
    if (hardware, protocol, hardware_size, protocol_size) != (1, ETHERTYPE_IPV4, 6, 4):
        return None
    return Arp(*fields)


def arp_probe(mac: bytes, address: str) -> bytes:
    """Who has this address? Asked without claiming any address for the asker (RFC 5227, 2.1.1)."""
    return arp(Arp(ARP_REQUEST, mac, bytes(4), bytes(6), ipaddress.IPv4Address(address).packed))


def neighbour_advertisement(mac: bytes, address: str) -> bytes:
    """An unsolicited advertisement to all nodes, with the override flag, so that caches change (RFC 4861, 7.2.6)."""
    target = ipaddress.IPv6Address(address).packed
    message = struct.pack("!BBHI16sBB6s", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _NA_OVERRIDE, target, _TARGET_LINK, 1, mac)
    pseudo_header = target + _ALL_NODES + struct.pack("!II", len(message), _ICMPV6)
    checksum = internet_checksum(pseudo_header + message)
    message = message[:2] + struct.pack("!H", checksum) + message[4:]
    packet = _IPV6.pack(6 << 28, len(message), _ICMPV6, 255, target, _ALL_NODES) + message
    return ethernet(b"\x33\x33" + _ALL_NODES[12:], mac, ETHERTYPE_IPV6, packet)


def solicited_address(frame: bytes) -> bytes | None:
    """The IPv6 address (16 bytes) that a neighbour solicitation asks for, if the frame is one.

    Only without extension headers, as RFC 4861 lets a host send it; the checksum is left to the receiver.
    """
    if len(frame) < HEADER_BYTES + _IPV6.size + 24 or frame[12:14] != b"\x86\xdd":
        return None
    version, length, next_header, hops, _, _ = _IPV6.unpack_from(frame, HEADER_BYTES)
    message = HEADER_BYTES + _IPV6.size
    if version >> 28 != 6 or next_header != _ICMPV6 or hops != 255 or length < 24:
        return None
    if frame[message] != _NEIGHBOUR_SOLICITATION:
        return None
    return frame[message + 8 : message + 24]


def announcements(mac: bytes, addresses: Iterable[str]) -> list[bytes]:
    """Frames that teach switches and neighbours that `addresses` (no prefix lengths) are at `mac`, and `mac` is here.

    ARP goes out in both forms, as request and as reply: hosts differ in which one they believe.
    """
    frames = [ethernet(BROADCAST, mac, ETHERTYPE_RARP, _ARP.pack(
        1, ETHERTYPE_IPV4, 6, 4, _RARP_REQUEST, mac, bytes(4), mac, bytes(4)))]  # fmt: skip
    for address in addresses:
        ip = ipaddress.ip_address(address)
        if ip.version == 4:
            frames.append(arp(Arp(ARP_REQUEST, mac, ip.packed, bytes(6), ip.packed)))
            frames.append(arp(Arp(ARP_REPLY, mac, ip.packed, BROADCAST, ip.packed)))
        else:
            frames.append(neighbour_advertisement(mac, address))
    return frames


def is_for(frame: bytes, macs: Collection[bytes], ips: Collection[bytes]) -> bool:
    """Whether a container with these MACs and packed IP addresses has to see the frame."""
    destination = frame[:6]
    if destination in macs:
        return len(frame) >= HEADER_BYTES
    if not destination or not destination[0] & 1 or frame[6:12] in macs:
        return False
    request = parse_arp(frame)
    if request is not None:
        return request.operation == ARP_REQUEST and request.target_ip in ips
    return solicited_address(frame) in ips


def internet_checksum(data: bytes) -> int:
    """RFC 1071 over `data`, as it goes into a header."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
