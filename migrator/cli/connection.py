"""The channel to the agent, opened once for a command and closed with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from migrator import channel
from migrator.cli.base import settings
from migrator.cli.settings import Endpoint, endpoint
from migrator.errors import MigratorError
from migrator.status import from_rpc

# Seconds. Calls that only read; calls that wait for a container, whose own time limits are added.
READ_S = 30.0
WORK_S = 300.0


def open_channel(target: Endpoint) -> grpc.Channel:
    """A channel to this agent. Raises Unreachable for an unreadable certificate."""
    if target.socket is not None:
        return channel.connect_local(target.socket)
    return channel.connect(target.address, name=target.name, tls=target.tls)


@contextmanager
def agent() -> Iterator[grpc.Channel]:
    """The agent that the options name; a failed call leaves as the error that it means."""
    target = endpoint(settings())
    with open_channel(target) as opened:
        try:
            yield opened
        except grpc.RpcError as error:
            raise explain(error, target) from error


def explain(error: grpc.RpcError, target: Endpoint) -> MigratorError:
    """The error to show for a failed call to this agent."""
    return from_rpc(error, str(target))


def is_lost(error: grpc.RpcError) -> bool:
    """Whether the connection failed, rather than the call."""
    return isinstance(error, grpc.Call) and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
