"""A failed call as the error it stands for, with its stable reason and exit code."""

import grpc

from migrator import errors
from migrator.errors import Exit, MigratorError

DETAILS = "grpc-status-details-bin"
BY_CODE: dict[grpc.StatusCode, type[MigratorError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Precondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Precondition,
    grpc.StatusCode.ABORTED: errors.Busy,
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unreachable,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
}


def from_rpc(error: grpc.RpcError) -> MigratorError:
    """The tree's own error for a failed call."""
    if not isinstance(error, grpc.Call):
        return MigratorError(str(error))
    code, message = error.code(), error.details() or "the agent gave no reason"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = "the agent did not answer in time; the operation may still go on there"
    made = BY_CODE.get(code, MigratorError)(message)
    _take_details(made, error)
    return made


def is_lost(error: grpc.RpcError) -> bool:
    """Whether the connection failed, rather than the call."""
    return isinstance(error, grpc.Call) and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _take_details(made: MigratorError, error: grpc.Call) -> None:
    from google.rpc import error_details_pb2, status_pb2

    for key, value in error.trailing_metadata() or ():
        if key != DETAILS or not isinstance(value, bytes):
            continue
        for packed in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.ErrorInfo()
            if packed.Is(info.DESCRIPTOR):
                packed.Unpack(info)
                made.reason = info.reason or made.reason
                if info.metadata.get("exit_code", "").isdigit():
                    made.exit_code = Exit(int(info.metadata["exit_code"]))
