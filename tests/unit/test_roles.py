"""The table of roles covers the API, and gives each role what it should have."""

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2

from agent import auth
from agent.auth import Caller
from migrator.certificates import Role
from migrator.errors import PermissionDenied
from migrator.v1 import container_pb2, host_pb2, image_pb2, migration_pb2, peer_pb2, snapshot_pb2, volume_pb2

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (container_pb2, host_pb2, image_pb2, migration_pb2, peer_pb2, snapshot_pb2, volume_pb2, health_pb2)
)


def methods() -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    ]


def test_every_method_has_its_roles_and_nothing_else_is_there() -> None:
    assert {method for method in auth.ROLES if "reflection" not in method} == set(methods())


@pytest.mark.parametrize("method", [method for method in methods() if "migrator.v1" in method])
def test_roles_follow_from_the_method(method: str) -> None:
    service, _, verb = method.rpartition("/")
    if service.endswith("PeerService"):
        expected = {Role.PEER}
    else:
        expected = {Role.OPERATOR}
        if verb.startswith(("Get", "List", "Watch", "ReadLog")):
            expected.add(Role.VIEWER)
        if verb == "GetHost":
            expected.add(Role.PEER)
    assert auth.ROLES[method] == expected


def test_everything_that_changes_something_is_audited() -> None:
    reading = ("Get", "List", "Watch", "ReadLog", "Diagnose", "Examine", "Queue", "Check", "ServerReflection")
    for method in auth.ROLES:
        assert (method in auth.READING) == method.rpartition("/")[2].startswith(reading)


def test_unknown_methods_are_for_nobody() -> None:
    for role in Role:
        with pytest.raises(PermissionDenied):
            auth.check(Caller("x", role), "/migrator.v1.ContainerService/Steal")


class Call:
    """As much of a call's context as says who calls."""

    def __init__(self, peer: str, **properties: list[bytes]) -> None:
        self._peer = peer
        self._properties = properties

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._properties


def tls(**changes: list[bytes]) -> Call:
    properties = {
        "transport_security_type": [b"ssl"],
        "ssl_tls_version": [b"TLSv1.3"],
        "x509_common_name": [b"host-b"],
        "peer_dns": [b"host-b"],
        "peer_uri": [b"migrator:role:peer"],
    }
    return Call("ipv4:10.0.0.1:1", **(properties | changes))


def context(call: Call) -> grpc.ServicerContext:
    return call  # type: ignore[return-value]


def test_who_calls() -> None:
    assert auth.caller(context(Call("unix:"))) == auth.LOCAL
    assert auth.caller(context(tls())) == Caller("host-b", Role.PEER)
    assert auth.caller_host(context(tls())) == "host-b"


@pytest.mark.parametrize(
    "call",
    [
        Call("ipv4:10.0.0.1:1"),
        tls(ssl_tls_version=[b"TLSv1.2"]),
        tls(peer_uri=[]),
        tls(peer_uri=[b"migrator:role:root"]),
        tls(peer_dns=[b"host-c"]),
        tls(x509_common_name=[]),
    ],
)
def test_who_is_refused(call: Call) -> None:
    with pytest.raises(PermissionDenied):
        auth.caller(context(call))


@pytest.mark.parametrize("call", [Call("unix:"), tls(peer_uri=[b"migrator:role:operator"])])
def test_only_a_peer_is_a_host(call: Call) -> None:
    with pytest.raises(PermissionDenied):
        auth.caller_host(context(call))
