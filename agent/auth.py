"""Who calls, and what they may do: the role comes from the certificate, what it opens from one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import grpc

from migrator.certificates import Role, role_from_uris
from migrator.errors import PermissionDenied

TLS_VERSION = b"TLSv1.3"

_OPERATOR = frozenset({Role.OPERATOR})
_READER = frozenset({Role.OPERATOR, Role.VIEWER})
_PEER = frozenset({Role.PEER})
_ANYONE = frozenset(Role)

# Every method of every service. What is not in here is allowed to nobody.
ROLES: dict[str, frozenset[Role]] = {
    "/migrator.v1.ContainerService/CreateContainer": _OPERATOR,
    "/migrator.v1.ContainerService/GetContainer": _READER,
    "/migrator.v1.ContainerService/ListContainers": _READER,
    "/migrator.v1.ContainerService/DeleteContainer": _OPERATOR,
    "/migrator.v1.ContainerService/StartContainer": _OPERATOR,
    "/migrator.v1.ContainerService/StopContainer": _OPERATOR,
    "/migrator.v1.ContainerService/KillContainer": _OPERATOR,
    "/migrator.v1.ContainerService/PauseContainer": _OPERATOR,
    "/migrator.v1.ContainerService/ResumeContainer": _OPERATOR,
    "/migrator.v1.ContainerService/Exec": _OPERATOR,
    "/migrator.v1.ContainerService/ReadLog": _READER,
    "/migrator.v1.ImageService/BuildImage": _OPERATOR,
    "/migrator.v1.ImageService/ImportImage": _OPERATOR,
    "/migrator.v1.ImageService/UploadImage": _OPERATOR,
    "/migrator.v1.ImageService/GetImage": _READER,
    "/migrator.v1.ImageService/ListImages": _READER,
    "/migrator.v1.ImageService/DeleteImage": _OPERATOR,
    "/migrator.v1.VolumeService/ListVolumes": _READER,
    "/migrator.v1.VolumeService/ResizeVolume": _OPERATOR,
    "/migrator.v1.VolumeService/ExportVolume": _OPERATOR,
    "/migrator.v1.VolumeService/CheckVolume": _OPERATOR,
    "/migrator.v1.VolumeService/RepairVolume": _OPERATOR,
    "/migrator.v1.HostService/GetHost": _ANYONE,
    "/migrator.v1.HostService/ListHosts": _READER,
    "/migrator.v1.HostService/Diagnose": _OPERATOR,
    "/migrator.v1.MigrationService/CreateMigration": _OPERATOR,
    "/migrator.v1.MigrationService/GetMigration": _READER,
    "/migrator.v1.MigrationService/ListMigrations": _READER,
    "/migrator.v1.MigrationService/CancelMigration": _OPERATOR,
    "/migrator.v1.MigrationService/WatchMigration": _READER,
    "/migrator.v1.MigrationService/GetHandover": _READER,
    "/migrator.v1.MigrationService/ResolveHandover": _OPERATOR,
    "/migrator.v1.SnapshotService/CreateSnapshot": _OPERATOR,
    "/migrator.v1.SnapshotService/ListSnapshots": _READER,
    "/migrator.v1.SnapshotService/RollbackSnapshot": _OPERATOR,
    "/migrator.v1.SnapshotService/DeleteSnapshot": _OPERATOR,
    "/migrator.v1.PeerService/Examine": _PEER,
    "/migrator.v1.PeerService/Queue": _PEER,
    "/migrator.v1.PeerService/Prepare": _PEER,
    "/migrator.v1.PeerService/Send": _PEER,
    "/migrator.v1.PeerService/DigestVolume": _PEER,
    "/migrator.v1.PeerService/KeepSnapshots": _PEER,
    "/migrator.v1.PeerService/HoldTraffic": _PEER,
    "/migrator.v1.PeerService/Restore": _PEER,
    "/migrator.v1.PeerService/Decide": _PEER,
    "/migrator.v1.PeerService/GetDecision": _PEER,
    "/migrator.v1.PeerService/GetArrival": _PEER,
    "/migrator.v1.PeerService/PullMemory": _PEER,
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/List": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READER,
}

# Those of the above that change nothing, or only a place in a line, and so leave no line in the audit log.
READING = frozenset(method for method, roles in ROLES.items() if roles & {Role.VIEWER}) | {
    "/migrator.v1.HostService/Diagnose",
    "/migrator.v1.VolumeService/CheckVolume",
    "/migrator.v1.PeerService/Examine",
    "/migrator.v1.PeerService/Queue",
    "/migrator.v1.PeerService/GetDecision",
    "/migrator.v1.PeerService/GetArrival",
}


@dataclass(frozen=True)
class Caller:
    """Who made a call: a name for people and logs, and the role."""

    name: str
    role: Role


LOCAL = Caller("local", Role.OPERATOR)


def caller(context: grpc.ServicerContext) -> Caller:
    """By the certificate, or `LOCAL` over the local socket. Raises PermissionDenied."""
    # grpc-stubs has the wrong type here: values are lists of bytes.
    properties = cast(Mapping[str, Sequence[bytes]], context.auth_context())
    if properties.get("transport_security_type") != [b"ssl"]:
        # Only the local socket is served without TLS, and who may open it the file system has decided.
        if context.peer().startswith("unix:"):
            return LOCAL
        raise PermissionDenied("the connection has no certificate")
    version = properties.get("ssl_tls_version", [b"an unknown version"])
    if version != [TLS_VERSION]:
        raise PermissionDenied(f"the connection is {version[0].decode()}: only TLS 1.3 is accepted")
    names = [name.decode("ascii", "replace") for name in properties.get("x509_common_name", ())]
    dns = [name.decode("ascii", "replace") for name in properties.get("peer_dns", ())]
    if len(names) != 1 or names[0] not in dns:
        raise PermissionDenied("the common name of the certificate is not among its DNS names: see `migrator cert`")
    role = role_from_uris([uri.decode("ascii", "replace") for uri in properties.get("peer_uri", ())])
    if role is None:
        raise PermissionDenied(f"the certificate of {names[0]} carries no role: make one with `migrator cert`")
    return Caller(names[0], role)


def caller_host(context: grpc.ServicerContext) -> str:
    """The name of the host whose agent calls. Raises PermissionDenied if it is not a peer."""
    who = caller(context)
    if who.role is not Role.PEER:
        raise PermissionDenied(f"{who.name} is {who.role}, not a peer")
    return who.name


def check(who: Caller, method: str) -> None:
    """Raises PermissionDenied if this caller may not call this method."""
    if who.role not in ROLES.get(method, frozenset()):
        allowed = ", ".join(sorted(ROLES.get(method, ()))) or "nobody"
        raise PermissionDenied(
            f"{who.name} has the role {who.role}; {method.rpartition('/')[2]} is for {allowed}: "
            "use a certificate with such a role, from `migrator cert issue`"
        )
