"""Addresses for containers that were given none: from a pool for IPs, from the name for MACs. Pure."""

import hashlib
import ipaddress
from collections.abc import Collection

from migrator.errors import InvalidArgument, Precondition

_MAX_SEARCH = 1 << 20


class Addresses:
    """A pool: `network` is what an address's prefix says (10.77.0.0/16); automatic ones lie from `first` to `last`.

    Without `first` and `last`, everything in the network but its own and its broadcast address.
    """

    def __init__(self, network: str, first: str = "", last: str = "") -> None:
        try:
            self.network = ipaddress.ip_network(network)
            low = ipaddress.ip_address(first) if first else self.network[1]
            high = ipaddress.ip_address(last) if last else self.network[-2 if self.network.version == 4 else -1]
        except (ValueError, IndexError) as error:
            raise InvalidArgument(f"address pool {network} {first} {last}: {error}") from error
        if low not in self.network or high not in self.network or int(low) > int(high):
            raise InvalidArgument(f"address pool {low} to {high} is not a range within {self.network}")
        self._low, self._high = int(low), int(high)

    def allocate(self, taken: Collection[str]) -> str:
        """The lowest free address with its prefix length. `taken`: addresses in use, prefix lengths are ignored.

        Raises Precondition (NO_FREE_ADDRESS).
        """
        used = {int(ipaddress.ip_interface(address).ip) for address in taken}
        kind = ipaddress.IPv4Address if self.network.version == 4 else ipaddress.IPv6Address
        for number in range(self._low, min(self._high, self._low + _MAX_SEARCH) + 1):
            if number not in used:
                return f"{kind(number)}/{self.network.prefixlen}"
        raise Precondition(
            f"no address of {kind(self._low)} to {kind(self._high)} is free; give one, or make the pool larger",
            reason="NO_FREE_ADDRESS",
        )


def mac_for(container: str, interface: str, taken: Collection[str] = (), salt: str = "") -> str:
    """A locally administered unicast MAC that follows from the names (and a salt, where two networks share names)."""
    for attempt in range(1000):
        digest = hashlib.sha256(f"{salt}/{container}/{interface}/{attempt}".encode()).digest()
        mac = "02:" + digest[:5].hex(":")
        if mac not in taken:
            return mac
    raise Precondition("no free MAC address was found in 1,000 attempts", reason="NO_FREE_ADDRESS")
