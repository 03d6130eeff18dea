"""The channel to the agent, opened once for a command and closed with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from migrator.cli.base import settings
from migrator.cli.failures import from_rpc
from migrator.cli.settings import Endpoint, endpoint
from migrator.errors import Unreachable

# Seconds. Calls that only read; calls that wait for a container, whose own time limits are added.
READ_S = 30.0
WORK_S = 300.0
# An agent that is started again is found within a second, not after gRPC's own minutes of backing off.
OPTIONS = (
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
)


def open_channel(target: Endpoint) -> grpc.Channel:
    """A channel to this agent. Nothing is sent before the first call."""
    if target.socket:
        return grpc.insecure_channel(f"unix:{target.socket}", OPTIONS)
    try:
        credentials = grpc.ssl_channel_credentials(
            target.ca.read_bytes(), target.key.read_bytes(), target.cert.read_bytes()
        )
    except OSError as error:
        raise Unreachable(f"certificate files: {error}") from error
    return grpc.secure_channel(target.address, credentials, OPTIONS)


@contextmanager
def agent() -> Iterator[grpc.Channel]:
    """The agent that the options name. No connection is an Unreachable that says where and what to do."""
    target = endpoint(settings())
    with open_channel(target) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise explain(error, target) from error


def explain(error: grpc.RpcError, target: Endpoint) -> Exception:
    """The error to show for a failed call to this agent."""
    made = from_rpc(error)
    if type(made) is not Unreachable or made.reason != Unreachable.reason:
        return made
    if target.socket:
        hint = "is migrator-agent running, and may you use its socket?"
    else:
        hint = "is migrator-agent running there, and do the certificates belong together?"
    return Unreachable(f"the agent at {target} does not answer ({made}); {hint}")
