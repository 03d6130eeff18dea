"""Containers as they are: list, inspect, start, stop and the like."""

import signal
import sys
from collections.abc import Callable, Sequence

import click
import grpc

from migrator.cli import output
from migrator.cli.amounts import DURATION_MS
from migrator.cli.base import Command, settings
from migrator.cli.connection import READ_S, WORK_S, agent, is_lost
from migrator.cli.names import CONTAINER
from migrator.errors import InvalidArgument
from migrator.status import from_rpc
from migrator.units import format_size
from migrator.v1 import container_pb2
from migrator.v1.container_pb2_grpc import ContainerServiceStub

names_argument = click.argument("names", nargs=-1, required=True, type=CONTAINER, metavar="NAME...")


@click.command(cls=Command)
@click.option("-a", "--all", "everything", is_flag=True, hidden=True, help="All containers, which is the default.")
def ps(everything: bool) -> None:
    """List the containers of the host, running or not.

    One that is "paused, no room" goes on by itself when the pool has room again. One that is "stopped, lost" has ended
    with its host, or without anybody having seen how: what was in its memory is gone, its disk is as it was. One that
    "pulls from" a host was moved with --on-no-converge postcopy, and is lost if that host is.

    With -o json: a list of objects with name, state, host, image, ip, memory_bytes, disk_bytes, pid, started,
    exit_code, migration, pause_reason, pulls_from, missing_bytes and lost (when it was found so; until an operator
    starts it).
    """
    with agent() as channel:
        listed = ContainerServiceStub(channel).ListContainers(container_pb2.ListContainersRequest(), timeout=READ_S)
    found = [output.container_object(container) for container in listed.containers]
    if settings().json:
        output.write_json(found)
        return
    rows = [
        [
            str(item["name"]),
            _state(item),
            str(item["image"]),
            str(item["ip"] or "-"),
            format_size(container.memory_bytes),
            format_size(container.disk_bytes),
            str(item["pid"] or "-"),
            str(item["started"] or "-"),
        ]
        for item, container in zip(found, listed.containers, strict=True)
    ]
    output.write_table(["NAME", "STATE", "IMAGE", "IP", "MEMORY", "DISK", "PID", "STARTED"], rows)


def _state(item: dict[str, object]) -> str:
    if item["migration"]:
        return f"{item['state']}, migrating"
    if item["pulls_from"]:
        return f"{item['state']}, pulls from {item['pulls_from']}"
    if item["pause_reason"] == "NO_SPACE":
        return f"{item['state']}, no room"
    if item["state"] == "stopped" and item["exit_code"] is not None:
        return f"stopped ({item['exit_code']})"
    if item["state"] == "stopped" and item["lost"]:
        return "stopped, lost"
    return str(item["state"])


@click.command(cls=Command)
@click.argument("name", type=CONTAINER)
def inspect(name: str) -> None:
    """Show everything about one container; -o json has the field names of the API."""
    with agent() as channel:
        answer = ContainerServiceStub(channel).GetContainer(
            container_pb2.GetContainerRequest(name=name), timeout=READ_S
        )
    found = output.to_object(answer.container)
    if settings().json:
        output.write_json(found)
    else:
        output.write_fields(found)


@click.command(cls=Command)
@names_argument
def start(names: Sequence[str]) -> int:
    """Start containers that were created or have stopped.

    \b
    migrator start ct101 ct102
    """
    return _each(
        names,
        lambda stub, name: (
            stub.StartContainer(container_pb2.StartContainerRequest(name=name), timeout=WORK_S).container
        ),
    )


@click.command(cls=Command)
@click.option("-t", "--timeout", type=DURATION_MS, default="10s", show_default=True, help="Until SIGKILL.")
@names_argument
def stop(names: Sequence[str], timeout: int) -> int:
    """Stop containers: SIGTERM, and SIGKILL to what is left after the timeout.

    \b
    migrator stop -t 30s ct101
    """

    def call(stub: ContainerServiceStub, name: str) -> object:
        # 0 means the agent's default in the API; here it means at once.
        request = container_pb2.StopContainerRequest(name=name, timeout_ms=max(timeout, 1))
        return stub.StopContainer(request, timeout=timeout / 1000 + WORK_S).container

    return _each(names, call)


@click.command(cls=Command)
@click.option("-s", "--signal", "signal_name", default="KILL", show_default=True, help="Name or number.")
@names_argument
def kill(names: Sequence[str], signal_name: str) -> int:
    """Send one signal to the first process of containers.

    \b
    migrator kill -s HUP ct101
    """
    number = signal_number(signal_name)
    return _each(
        names,
        lambda stub, name: stub.KillContainer(
            container_pb2.KillContainerRequest(name=name, signal=number), timeout=READ_S
        ),
    )


@click.command(cls=Command)
@click.option("-f", "--force", is_flag=True, help="Also one that runs: it is killed.")
@names_argument
def rm(names: Sequence[str], force: bool) -> int:
    """Delete containers with their volumes, logs and addresses."""
    return _each(
        names,
        lambda stub, name: stub.DeleteContainer(
            container_pb2.DeleteContainerRequest(name=name, force=force), timeout=WORK_S
        ),
    )


@click.command(cls=Command)
@names_argument
def pause(names: Sequence[str]) -> int:
    """Stop the clock of containers: their processes stay where they are."""
    return _each(
        names,
        lambda stub, name: (
            stub.PauseContainer(container_pb2.PauseContainerRequest(name=name), timeout=READ_S).container
        ),
    )


@click.command(cls=Command)
@names_argument
def resume(names: Sequence[str]) -> int:
    """Let paused containers run again."""
    return _each(
        names,
        lambda stub, name: (
            stub.ResumeContainer(container_pb2.ResumeContainerRequest(name=name), timeout=READ_S).container
        ),
    )


def signal_number(name: str) -> int:
    """Number of TERM, SIGTERM, sigterm or 15. Raises InvalidArgument."""
    if name.isdigit() and 1 <= int(name) <= 64:
        return int(name)
    try:
        return int(signal.Signals["SIG" + name.upper().removeprefix("SIG")])
    except KeyError:
        raise InvalidArgument(f"{name!r} is not a signal") from None


def _each(names: Sequence[str], call: Callable[[ContainerServiceStub, str], object]) -> int:
    """Do the same to every name, also after one has failed; the first failure gives the exit code."""
    results: list[dict[str, object]] = []
    exit_code = 0
    with agent() as channel:
        stub = ContainerServiceStub(channel)
        for name in dict.fromkeys(names):
            try:
                answer = call(stub, name)
            except grpc.RpcError as error:
                if is_lost(error) and not results:
                    raise
                failure = from_rpc(error)
                print(f"migrator: {failure}", file=sys.stderr)
                results.append(
                    {"name": name, "error": output.error_object(failure.reason, str(failure), int(failure.exit_code))}
                )
                exit_code = exit_code or int(failure.exit_code)
                continue
            if isinstance(answer, container_pb2.Container):
                results.append(output.container_object(answer))
            else:
                results.append({"name": name})
            if not settings().json:
                print(name, flush=True)
    if settings().json:
        output.write_json(results)
    return exit_code
