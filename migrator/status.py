"""Errors across gRPC, both ways: the error tree as a status with google.rpc.ErrorInfo, and back.

ErrorInfo carries the stable reason, the domain "migrator", and the command line's exit code in its metadata.
"""

import contextlib

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from migrator import errors
from migrator.errors import Exit, MigratorError

DOMAIN = "migrator"
EXIT_CODE = "exit_code"

_CODES: tuple[tuple[type[MigratorError], int], ...] = (
    (errors.InvalidArgument, code_pb2.INVALID_ARGUMENT),
    (errors.NotFound, code_pb2.NOT_FOUND),
    (errors.AlreadyExists, code_pb2.ALREADY_EXISTS),
    (errors.Precondition, code_pb2.FAILED_PRECONDITION),
    (errors.Busy, code_pb2.ABORTED),
    (errors.Unreachable, code_pb2.UNAVAILABLE),
    (errors.PermissionDenied, code_pb2.PERMISSION_DENIED),
    (errors.NotConverged, code_pb2.ABORTED),
    (errors.RolledBack, code_pb2.ABORTED),
    (errors.Uncertain, code_pb2.UNKNOWN),
    (errors.Cancelled, code_pb2.CANCELLED),
    (errors.TimedOut, code_pb2.DEADLINE_EXCEEDED),
    (errors.ExecutionError, code_pb2.INTERNAL),
    (errors.PeerError, code_pb2.INTERNAL),
)

# For a reason that this version does not know, and for answers that gRPC itself made.
_TYPES: dict[grpc.StatusCode, type[MigratorError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgument,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Precondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Precondition,
    grpc.StatusCode.UNIMPLEMENTED: errors.Precondition,
    grpc.StatusCode.ABORTED: errors.Busy,
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unreachable,
    grpc.StatusCode.CANCELLED: errors.Unreachable,
}
_BY_REASON: dict[str, type[MigratorError]] = {kind.reason: kind for kind, _ in _CODES}


def to_status(error: MigratorError) -> status_pb2.Status:
    """The status that a server answers with."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), code_pb2.INTERNAL)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={EXIT_CODE: str(int(error.exit_code)), "type": _base_reason(error)}
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=code, message=str(error), details=[detail])


def from_rpc(error: grpc.RpcError, host: str = "") -> MigratorError:
    """What a failed call means. `host` names the agent that was asked, for the message."""
    whose = f"the agent of {host}" if host else "the agent"
    if not isinstance(error, grpc.Call):
        return errors.Unreachable(f"{whose} was not reached: {error}")
    info = _error_info(error)
    message = error.details() or f"{whose} gave no reason"
    if info is None:
        return _without_info(error.code(), message, whose)
    kind = _BY_REASON.get(info.metadata.get("type", "")) or _TYPES.get(error.code(), MigratorError)
    made = kind(message, reason=info.reason or None)
    # An exit code of a newer version is not known here: then the type's own is right.
    with contextlib.suppress(ValueError):
        made.exit_code = Exit(int(info.metadata.get(EXIT_CODE, "")))
    return made


def _base_reason(error: MigratorError) -> str:
    return next((kind.reason for kind, _ in _CODES if isinstance(error, kind)), MigratorError.reason)


def _error_info(error: grpc.Call) -> error_details_pb2.ErrorInfo | None:
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        return None  # the details contradict the status: only the status counts
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None


def _without_info(code: grpc.StatusCode, message: str, whose: str) -> MigratorError:
    """gRPC itself answered, or the connection did."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Unreachable(f"{whose} has not answered in time; what was asked for may still happen there")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Precondition(f"{whose} does not know this call: is it an older version? ({message})")
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unreachable(f"{whose} cannot be reached: {_connection_hint(message)} ({message})")
    if code is grpc.StatusCode.CANCELLED:
        return errors.Unreachable(f"the call to {whose} was broken off ({message})")
    return _TYPES.get(code, MigratorError)(f"{whose}: {message}")


def _connection_hint(message: str) -> str:
    lowered = message.lower()
    if any(word in lowered for word in ("ssl", "tls", "handshake", "certificate", "name verification", "peer name")):
        return "the certificates do not fit; see `migrator doctor` for those of this host, and compare both hosts' CA"
    if "no such file" in lowered or "connection refused" in lowered:
        return "is migrator-agent running there?"
    # A server refuses a certificate under TLS 1.3 after the handshake has ended for the client.
    if "socket closed" in lowered or "connection reset" in lowered or "broken pipe" in lowered:
        return "it closed the connection: is it stopping, or does it not accept this host's certificate?"
    return "is the host up, and migrator-agent running there?"
