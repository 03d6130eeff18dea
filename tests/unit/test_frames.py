"""Frames that announce and ask: built right, and recognised in whatever a wire carries."""

import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st

from migrator import frames

MAC = frames.mac_bytes("02:00:00:00:00:07")
macs = st.binary(min_size=6, max_size=6)
ipv4 = st.ip_addresses(v=4)
ipv6 = st.ip_addresses(v=6)


def solicitation(target: bytes) -> bytes:
    message = struct.pack("!BBHI16s", 135, 0, 0, 0, target)
    header = struct.pack("!IHBB16s16s", 6 << 28, len(message), 58, 255, bytes(16), bytes(16))
    return frames.ethernet(b"\x33\x33\xff" + target[13:], b"\x02" + bytes(5), 0x86DD, header + message)


@given(macs, ipv4, ipv4)
def test_arp_reads_as_written(mac: bytes, sender: ipaddress.IPv4Address, target: ipaddress.IPv4Address) -> None:
    packet = frames.Arp(frames.ARP_REPLY, mac, sender.packed, MAC, target.packed)
    frame = frames.arp(packet)
    assert len(frame) == frames.MIN_FRAME_BYTES
    assert frames.parse_arp(frame) == packet


@given(st.binary(max_size=200))
def test_parsers_take_anything(data: bytes) -> None:
    for head in (b"", bytes(12) + b"\x08\x06", bytes(12) + b"\x86\xdd", b"\xff" * 12 + b"\x08\x06\0\x01\x08\0\x06\x04"):
        frames.parse_arp(head + data)
        frames.solicited_address(head + data)
        frames.is_for(head + data, {MAC}, {bytes(4)})


@given(macs, ipv6)
def test_neighbour_advertisement_has_a_valid_checksum(mac: bytes, address: ipaddress.IPv6Address) -> None:
    frame = frames.neighbour_advertisement(mac, str(ipaddress.IPv6Address(int(address))))
    packet = frame[14:]
    (length,) = struct.unpack_from("!H", packet, 4)
    message = packet[40 : 40 + length]
    assert message[0] == 136
    assert message[8:24] == address.packed
    assert message[26:32] == mac
    pseudo_header = packet[8:40] + struct.pack("!II", length, 58)
    assert frames.internet_checksum(pseudo_header + message) == 0


def test_announcements_cover_every_address_in_both_arp_forms() -> None:
    sent = frames.announcements(MAC, ["10.0.0.5", "fd00::5"])
    arps = [packet for frame in sent if (packet := frames.parse_arp(frame))]
    assert [packet.operation for packet in arps] == [frames.ARP_REQUEST, frames.ARP_REPLY]
    assert all(packet.sender_ip == packet.target_ip == bytes([10, 0, 0, 5]) for packet in arps)
    assert all(frame[6:12] == MAC for frame in sent)
    assert len(sent) == 4


def test_what_is_for_a_container() -> None:
    ips = {ipaddress.ip_address(address).packed for address in ("10.0.0.5", "fd00::5")}
    other = b"\x02\0\0\0\0\x09"
    assert frames.is_for(MAC + other + b"\x08\0" + bytes(46), {MAC}, ips)
    assert not frames.is_for(other + MAC + b"\x08\0" + bytes(46), {MAC}, ips)
    assert frames.is_for(frames.arp_probe(other, "10.0.0.5"), {MAC}, ips)
    assert not frames.is_for(frames.arp_probe(other, "10.0.0.6"), {MAC}, ips)
    assert not frames.is_for(frames.arp_probe(MAC, "10.0.0.5"), {MAC}, ips)
    assert frames.is_for(solicitation(ipaddress.ip_address("fd00::5").packed), {MAC}, ips)
    assert not frames.is_for(solicitation(ipaddress.ip_address("fd00::6").packed), {MAC}, ips)
    assert not frames.is_for(b"\xff" * 6 + other + b"\x08\0" + bytes(46), {MAC}, ips)
