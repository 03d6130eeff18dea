"""A container that another host announces: everything about it that can be judged before anything is made of it."""

import os
from pathlib import Path

from agent import arriving_snapshots
from agent.assembly import interfaces, ports
from agent.config import Config
from agent.specs import check_arrival
from migrator import wire
from migrator.errors import InvalidArgument, Precondition
from migrator.network import check_unique
from migrator.v1 import container_pb2, peer_pb2

# Those that a container is moved in.
STATES = frozenset(
    {
        container_pb2.CONTAINER_STATE_CREATED,
        container_pb2.CONTAINER_STATE_RUNNING,
        container_pb2.CONTAINER_STATE_PAUSED,
        container_pb2.CONTAINER_STATE_STOPPED,
    }
)
# Of each of these in one container.
MOST_INTERFACES, MOST_PORTS, MOST_BINDS = 64, 1024, 256
STREAMS = 3
LONGEST_STREAM_NAME = 128


def check(config: Config, request: peer_pb2.PrepareRequest) -> None:
    """Raises InvalidArgument, Precondition."""
    check_container(config, request.container, request.spec)
    wire.check_migration(request.migration)
    if request.state not in STATES:
        raise InvalidArgument(f"a container in state {request.state} cannot arrive")
    if request.memory_bytes < 0:
        raise InvalidArgument(f"{request.memory_bytes} bytes of memory")
    wire.check_time(request.create_time_ms, "create_time_ms")
    wire.check_time(request.start_time_ms, "start_time_ms")
    if len(request.stdio) > STREAMS or any(len(name) > LONGEST_STREAM_NAME for name in request.stdio):
        raise InvalidArgument(f"{request.container} comes with {len(request.stdio)} streams that cannot be its own")
    arriving_snapshots.check(request)


def check_container(config: Config, name: str, spec: container_pb2.ContainerSpec) -> None:
    """Raises InvalidArgument for what `agent.specs.complete` would not have made, Precondition for a bind mount."""
    for what, found, most in (
        ("interfaces", len(spec.interfaces), MOST_INTERFACES),
        ("ports", len(spec.ports), MOST_PORTS),
        ("bind mounts", len(spec.binds), MOST_BINDS),
    ):
        if found > most:
            raise InvalidArgument(f"{found} {what} are too many: {most} are possible")
    check_arrival(name, spec)
    check_unique(interfaces(spec))
    ports(spec)
    for bind in spec.binds:
        _check_bind(config, name, bind)


def _check_bind(config: Config, name: str, bind: container_pb2.BindMount) -> None:
    """The operator's word is asked for at the source; a stranger's container shall not see what the agent keeps."""
    if not bind.shared:
        raise Precondition(f"bind mount {bind.source} of {name} is not marked as shared", reason="BIND_MOUNT")
    source = Path(os.path.realpath(bind.source))
    for own in (config.state_dir, config.run_dir, config.tls.key.parent):
        if source == own or source in own.parents or own in source.parents:
            raise Precondition(
                f"bind mount {bind.source} of {name} holds what the agent of {config.host} keeps in {own}: "
                "such a container does not move",
                reason="BIND_MOUNT",
            )
