"""Published ports: forwarded by the host, refused where they are taken, gone when unpublished."""

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from agent import namespaces
from agent.network import Networks
from agent.publish import publish, published, unpublish
from migrator.errors import Precondition
from migrator.network import Interface, PublishedPort

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

INTERFACE = Interface("eth0", "02:00:00:00:98:02", "br0", ipv4=("10.98.0.2/24",))


@pytest.fixture
def host() -> Iterator[tuple[str, str, str]]:
    """Names of a host with a bridge, a container on it, and a client behind another link with no route to it."""
    host, container, client = (f"mgp{os.getpid()}-{what}" for what in ("host", "ct", "client"))
    networks: Networks | None = None
    try:
        namespaces.create(host)
        namespaces.create(client)
        for line in (
            f"-n {host} link set lo up",
            f"-n {host} link add br0 address 02:00:00:00:98:00 type bridge",
            f"-n {host} link set br0 up",
            f"-n {host} addr add 10.98.0.1/24 dev br0",
            f"-n {host} link add up0 type veth peer name up0 netns {client}",
            f"-n {host} link set up0 up",
            f"-n {host} addr add 10.97.0.1/24 dev up0",
            f"-n {client} link set up0 up",
            f"-n {client} addr add 10.97.0.2/24 dev up0",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        networks = namespaces.inside(host, Networks)
        made = networks
        namespaces.inside(host, lambda: made.create(container, [INTERFACE], connected=True))
        yield host, container, client
    finally:
        if networks is not None:
            made = networks
            namespaces.inside(host, lambda: made.destroy(container))
            networks.close()
        namespaces.remove(host)
        namespaces.remove(client)


def test_port_is_forwarded_refused_and_unpublished(host: tuple[str, str, str]) -> None:
    host_space, container, client = host
    port = PublishedPort(8080, 80)

    def connect(space: str, address: str) -> bool:
        def attempt() -> bool:
            try:
                socket.create_connection((address, 8080), timeout=1.0).close()
            except OSError:
                return False
            return True

        return namespaces.inside(space, attempt)

    with namespaces.inside(container, lambda: socket.create_server(("10.98.0.2", 80))):
        namespaces.inside(host_space, lambda: publish(container, "10.98.0.2", [port]))
        assert connect(client, "10.97.0.1")
        assert connect(host_space, "10.98.0.1")
        with pytest.raises(Precondition, match=container) as refused:
            namespaces.inside(host_space, lambda: publish("other", "10.98.0.3", [port]))
        assert refused.value.reason == "PORT_IN_USE"
        for _ in range(2):
            namespaces.inside(host_space, lambda: unpublish(container))
        assert namespaces.inside(host_space, published) == {}
        assert not connect(client, "10.97.0.1")


def test_port_that_a_process_listens_on_is_refused(host: tuple[str, str, str]) -> None:
    host_space, container, _ = host
    with (
        namespaces.inside(host_space, lambda: socket.create_server(("127.0.0.1", 8080))),
        pytest.raises(Precondition, match="listens"),
    ):
        namespaces.inside(host_space, lambda: publish(container, "10.98.0.2", [PublishedPort(8080, 80)]))
