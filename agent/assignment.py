"""What a new container's network leaves open, filled in from the host's configuration (`containers.Addresses`)."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from agent import publish
from agent.addresses import Addresses, mac_for
from agent.config import Config, Network
from agent.network import is_own, probe_ipv4
from migrator.errors import InvalidArgument, Precondition
from migrator.network import Interface, PublishedPort, check_interface_name, parse_address, parse_mac
from migrator.v1 import container_pb2
from migrator.v1.container_pb2 import ContainerSpec

AUTO = {"auto": 0, "auto4": 4, "auto6": 6}


class Assignment:
    """Names, bridges, MACs, addresses and gateways. A container that arrives is complete and only checked."""

    def __init__(self, config: Config) -> None:
        self._host = config.host
        self._network = config.network
        self._pools = _pools(config.network)

    def assign(self, container: str, spec: ContainerSpec, others: Sequence[ContainerSpec]) -> None:
        """Complete `spec` in place. `others`: the specs of the host's other containers.

        Raises InvalidArgument, Precondition (ADDRESS_IN_USE, NO_FREE_ADDRESS).
        """
        taken = {_bare(address) for other in others for item in other.interfaces for address in item.addresses}
        macs = {item.mac for other in others for item in other.interfaces}
        for number, interface in enumerate(spec.interfaces):
            is_new = not interface.mac
            interface.name = check_interface_name(interface.name or f"eth{number}")
            interface.bridge = check_interface_name(interface.bridge or self._network.bridge)
            interface.mac = parse_mac(interface.mac or mac_for(container, interface.name, macs, salt=self._host))
            if interface.mac in macs:
                raise Precondition(
                    f"MAC {interface.mac} belongs to another container of this host", reason="ADDRESS_IN_USE"
                )
            macs.add(interface.mac)
            self._assign_addresses(interface, taken, is_new=is_new)
            if is_new:
                _check_gateways(interface)
            if number == 0 and is_new and interface.bridge == self._network.bridge:
                self._assign_gateways(interface)

    def _assign_addresses(self, interface: container_pb2.Interface, taken: set[str], *, is_new: bool) -> None:
        for index, address in enumerate(interface.addresses):
            if address in AUTO:
                interface.addresses[index] = self._allocate(interface, AUTO[address], taken)
            else:
                interface.addresses[index] = parse_address(address)
                bare = _bare(address)
                holder = "another container of this host" if bare in taken else ""
                # One that arrives has its address at the source still.
                if not holder and is_new:
                    holder = _holder(interface, bare)
                if holder:
                    raise Precondition(
                        f"address {bare} is in use by {holder}: choose another one", reason="ADDRESS_IN_USE"
                    )
            taken.add(_bare(interface.addresses[index]))

    def _allocate(self, interface: container_pb2.Interface, version: int, taken: set[str]) -> str:
        """The lowest free address that nobody answers for: containers take theirs along when they move."""
        version = version or self._next_version(interface)
        pool = self._pools.get(version)
        if pool is None:
            raise InvalidArgument(
                f"this host hands out no IPv{version} addresses: give one, or set network.ipv{version}_pool"
            )
        busy = set(taken)
        while True:
            address = pool.allocate(busy)
            if not _holder(interface, _bare(address)):
                return address
            busy.add(_bare(address))

    def _next_version(self, interface: container_pb2.Interface) -> int:
        """auto is IPv4 first, then IPv6, as far as the host has pools."""
        given = {_version(address) for address in interface.addresses if address not in AUTO}
        left = [version for version in (4, 6) if version in self._pools and version not in given]
        return left[0] if left else 4

    def _assign_gateways(self, interface: container_pb2.Interface) -> None:
        for version, field, gateway in (
            (4, "gateway4", self._network.ipv4_gateway),
            (6, "gateway6", self._network.ipv6_gateway),
        ):
            networks = [ipaddress.ip_interface(a).network for a in interface.addresses if _version(a) == version]
            if gateway and not getattr(interface, field) and any(ipaddress.ip_address(gateway) in n for n in networks):
                setattr(interface, field, gateway)


def _check_gateways(interface: container_pb2.Interface) -> None:
    """The kernel takes no route by a gateway that no address of the interface reaches."""
    networks = [ipaddress.ip_interface(address).network for address in interface.addresses]
    for gateway in (interface.gateway4, interface.gateway6):
        if not gateway or (":" in gateway and ipaddress.ip_address(gateway).is_link_local):
            continue
        if not any(ipaddress.ip_address(gateway) in network for network in networks):
            raise InvalidArgument(
                f"gateway {gateway} is in no network of {interface.name}'s addresses ({', '.join(interface.addresses)})"
            )


class Publisher:
    """`assembly.Publisher`: ports go to the container's first IPv4 address, or its first one at all."""

    def publish(self, container: str, interfaces: Sequence[Interface], ports: Sequence[PublishedPort]) -> None:
        """Forward the ports; replaces what was published for the container before."""
        addresses = [address for interface in interfaces for address in interface.addresses]
        if ports and not addresses:
            raise Precondition(f"{container} has no address that its ports could be forwarded to", reason="NO_ADDRESS")
        addresses.sort(key=lambda address: ":" in address)
        publish.publish(container, addresses[0] if addresses else "", ports)

    def unpublish(self, container: str) -> None:
        """Stop forwarding; repeatable."""
        publish.unpublish(container)


def _pools(network: Network) -> dict[int, Addresses]:
    pools = {}
    for version, pool, prefix, gateway in (
        (4, network.ipv4_pool, network.ipv4_prefix, network.ipv4_gateway),
        (6, network.ipv6_pool, network.ipv6_prefix, network.ipv6_gateway),
    ):
        if not pool:
            continue
        share = ipaddress.ip_network(pool)
        whole = share.supernet(new_prefix=prefix)
        # Neither the first nor the last one of a share: where the share is the whole network they are no host's.
        first, last = share[0 if share.num_addresses < 4 else 1], share[-1 if share.num_addresses < 4 else -2]
        if gateway and ipaddress.ip_address(gateway) == first and share.num_addresses > 4:
            first = share[2]
        pools[version] = Addresses(str(whole), str(first), str(last))
    return pools


def _holder(interface: container_pb2.Interface, address: str) -> str:
    """This host, or who answers for an IPv4 address on the bridge's network; empty if nobody does."""
    if is_own(address):
        return "this host itself"
    if ":" in address or not Path("/sys/class/net", interface.bridge, "bridge").is_dir():
        return ""
    mac = probe_ipv4(interface.bridge, address)
    return f"{mac} on {interface.bridge}" if mac else ""


def _bare(address: str) -> str:
    return address.partition("/")[0]


def _version(address: str) -> int:
    return 6 if ":" in address else 4
