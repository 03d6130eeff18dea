"""The switch of a lab and the outside client on it: two network namespaces of this machine."""

import subprocess

from labkit.hosts import ip


def make(switch: str, client: str, client_address: str) -> None:
    """Raises LabError, CalledProcessError."""
    for name in (switch, client):
        subprocess.run(["ip", "netns", "add", name], check=True)
        settle_addresses_at_once(["nsenter", f"--net=/run/netns/{name}"])
    ip(
        f"""\
link add switch address 02:77:00:00:00:fe type bridge mcast_snooping 0 stp_state 0 forward_delay 0
link set switch addrgenmode none up
link add client type veth peer name eth0 address 02:77:00:00:00:01 netns {client}
link set client addrgenmode none master switch up
""",
        switch,
    )
    ip(
        f"""\
link set lo up
address add {client_address}/16 dev eth0
address add fd77::1/64 dev eth0
link set eth0 up
""",
        client,
    )


def settle_addresses_at_once(enter: list[str]) -> None:
    """Duplicate address detection would keep an IPv6 address unusable for its first second."""
    subprocess.run([*enter, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0"], check=True)
