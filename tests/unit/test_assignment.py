"""Addresses, MACs and gateways of new containers. No bridge of these names exists, so nobody is asked on a network."""

import tomllib

import pytest

from agent import config
from agent.assignment import Assignment
from agent.network import is_own
from migrator.errors import InvalidArgument, Precondition
from migrator.v1.container_pb2 import ContainerSpec, Interface

NETWORK = """
host = "host-a"
[network]
bridge = "no-such-bridge"
ipv4_pool = "10.77.11.0/30"
ipv4_prefix = 16
ipv4_gateway = "10.77.0.1"
ipv6_pool = "fd77::b:0/112"
ipv6_gateway = "fd77::1"
"""


@pytest.fixture
def assignment() -> Assignment:
    return Assignment(config.parse(tomllib.loads(NETWORK)))


def spec(*addresses: str, **fields: str) -> ContainerSpec:
    return ContainerSpec(interfaces=[Interface(addresses=addresses, **fields)])


def test_what_is_left_open_is_filled_in(assignment: Assignment) -> None:
    asked = spec("auto", "auto")
    assignment.assign("ct101", asked, [])
    (made,) = asked.interfaces
    assert (made.name, made.bridge) == ("eth0", "no-such-bridge")
    assert list(made.addresses) == ["10.77.11.1/16", "fd77::b:1/64"]
    assert (made.gateway4, made.gateway6) == ("10.77.0.1", "fd77::1")
    assert made.mac.startswith("02:")


def test_no_two_containers_get_the_same(assignment: Assignment) -> None:
    specs: list[ContainerSpec] = []
    for number in range(2):
        specs.append(spec("auto"))
        assignment.assign(f"ct{number}", specs[-1], specs[:-1])
    assert [one.interfaces[0].addresses[0] for one in specs] == ["10.77.11.1/16", "10.77.11.2/16"]
    assert specs[0].interfaces[0].mac != specs[1].interfaces[0].mac
    with pytest.raises(Precondition) as raised:
        assignment.assign("ct2", spec("auto"), specs)
    assert raised.value.reason == "NO_FREE_ADDRESS"


def test_what_is_given_is_kept_and_checked(assignment: Assignment) -> None:
    first = spec("10.77.2.101/16", name="net0", mac="02:00:0a:4d:02:65")
    assignment.assign("ct101", first, [])
    assert list(first.interfaces[0].addresses) == ["10.77.2.101/16"]
    for other in (spec("10.77.2.101/16"), spec(mac="02:00:0a:4d:02:65")):
        with pytest.raises(Precondition) as raised:
            assignment.assign("ct102", other, [first])
        assert raised.value.reason == "ADDRESS_IN_USE"


def test_an_address_of_the_host_is_in_use() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.7")


def test_a_complete_spec_stays_as_it_is(assignment: Assignment) -> None:
    asked = spec("auto")
    assignment.assign("ct101", asked, [])
    again = ContainerSpec.FromString(asked.SerializeToString())
    assignment.assign("ct101", again, [])
    assert again == asked


def test_a_gateway_outside_the_network_is_not_given(assignment: Assignment) -> None:
    asked = spec("192.0.2.7/24")
    assignment.assign("ct101", asked, [])
    assert asked.interfaces[0].gateway4 == ""


def test_a_gateway_has_to_be_in_reach(assignment: Assignment) -> None:
    for fields in ({"gateway4": "192.0.2.1"}, {"gateway6": "fd00::1"}):
        with pytest.raises(InvalidArgument, match="in no network of eth0"):
            assignment.assign("ct101", spec("10.77.2.101/16", "fd77::5/64", **fields), [])
    assignment.assign("ct101", spec("10.77.2.101/16", "fd77::5/64", gateway4="10.77.0.9", gateway6="fe80::1"), [])


@pytest.mark.parametrize("address", ["10.77.2.101", "nonsense", "10.0.0.0.1/8"])
def test_what_is_no_address(assignment: Assignment, address: str) -> None:
    with pytest.raises(InvalidArgument):
        assignment.assign("ct101", spec(address), [])


def test_without_a_pool_there_is_no_auto() -> None:
    bare = Assignment(config.parse({"host": "host-a"}))
    with pytest.raises(InvalidArgument, match="hands out no IPv4"):
        bare.assign("ct101", spec("auto"), [])
