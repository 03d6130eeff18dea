"""Interfaces, published ports and the address pool: what is taken, what is refused, and with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Addresses, mac_for
from agent.publish import ruleset
from migrator.errors import InvalidArgument, Precondition
from migrator.network import (
    Interface,
    Neighbour,
    PublishedPort,
    check_unique,
    parse_address,
    parse_mac,
    parse_published,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", PublishedPort(8080, 80)),
        ("53:5353/udp", PublishedPort(53, 5353, "udp")),
        ("127.0.0.1:80:8080", PublishedPort(80, 8080, "tcp", "127.0.0.1")),
        ("[fd00::1]:80:8080/tcp", PublishedPort(80, 8080, "tcp", "fd00::1")),
    ],
)
def test_published_ports_are_read(text: str, expected: PublishedPort) -> None:
    assert parse_published(text) == expected
    assert parse_published(str(expected)) == expected


@pytest.mark.parametrize("text", ["80", "0:80", "80:65536", "80:80/sctp", "x:80:80", "::1:80:80", "80:80:80:80", ""])
def test_other_ports_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_published(text)


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1", "10.0.0.0/24", "10.0.0.255/24", "0.0.0.0/8", "224.0.0.1/4", "::1/128", "fe80::1%eth0/64", "x/8"],
)
def test_addresses_that_no_container_can_have(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)


@pytest.mark.parametrize("text", ["", "02:00", "01:00:00:00:00:01", "00:00:00:00:00:00", "02:00:00:00:00:zz"])
def test_macs_that_no_interface_can_have(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_mac(text)


@pytest.mark.parametrize(
    "wrong",
    [{"name": "lo"}, {"name": "a/b"}, {"name": "x" * 16}, {"mac": "02-00-00-00-00-01"}, {"ipv4": ("fd00::1/64",)},
     {"gateway6": "10.0.0.1"}, {"bridge": ""}],
)  # fmt: skip
def test_wrong_interfaces(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Interface(**({"name": "eth0", "mac": "02:00:00:00:00:01", "bridge": "br0"} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [("a/b", "10.0.0.1"), ("eth0", "10.0.0"), ("eth0", "10.0.0.1", "0:1:2"), ("eth0", "fd00::1", "FE:00:00:00:00:01")],
)
def test_wrong_neighbours(wrong: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument):
        Neighbour(*wrong, *["02:00:00:00:00:01"][len(wrong) - 2 :])


def test_interfaces_of_one_container_differ() -> None:
    one = Interface("eth0", "02:00:00:00:00:01", "br0", ipv4=("10.0.0.1/24",))
    with pytest.raises(InvalidArgument, match="given twice"):
        check_unique([one, Interface("eth1", "02:00:00:00:00:02", "br1", ipv4=("10.0.0.1/16",))])


@given(st.sets(st.integers(2, 20), max_size=19))
def test_pool_gives_the_lowest_free_address(taken: set[int]) -> None:
    pool = Addresses("10.9.0.0/16", "10.9.0.2", "10.9.0.20")
    free = sorted(set(range(2, 21)) - taken)
    used = [f"10.9.0.{number}/16" for number in taken]
    if free:
        assert pool.allocate(used) == f"10.9.0.{free[0]}/16"
    else:
        with pytest.raises(Precondition):
            pool.allocate(used)


@given(st.text(max_size=20), st.text(max_size=15))
def test_macs_from_names_are_stable_and_avoid_taken_ones(container: str, interface: str) -> None:
    mac = mac_for(container, interface)
    assert parse_mac(mac) == mac == mac_for(container, interface)
    assert mac_for(container, interface, {mac}) != mac


def test_nothing_of_a_name_reaches_nft_unchecked() -> None:
    with pytest.raises(InvalidArgument):
        ruleset('x"; flush ruleset', "10.0.0.1", [PublishedPort(80, 80)])
