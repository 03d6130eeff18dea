"""`migrator resolve CT`: an operator's word for that of a host that is gone for good."""

import sys
import time

import click

from migrator.cli import output
from migrator.cli.base import Command, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import CONTAINER
from migrator.errors import Cancelled, InvalidArgument, Precondition
from migrator.units import format_duration
from migrator.v1 import migration_pb2
from migrator.v1.migration_pb2_grpc import MigrationServiceStub

SOURCE = migration_pb2.HANDOVER_SIDE_SOURCE


@click.command("resolve", cls=Command)
@click.option("--here", "keep", flag_value="here", help="The copy of the host that is asked counts, and runs.")
@click.option("--there", "keep", flag_value="there", help="The other host's copy counts; this one's is deleted.")
@click.option("--yes", is_flag=True, help="Do not ask whether it is meant.")
@click.argument("container", type=CONTAINER)
def command(*, container: str, keep: str | None, yes: bool) -> None:
    """Decide which copy of a container counts when the other host of its migration is gone for good.

    \b
    migrator resolve ct101            what is known of the other host; nothing is changed
    migrator resolve ct101 --here     ct101 runs at the host that is asked
    migrator resolve ct101 --there    the copy of the host that is asked is deleted

    A container that was released, and whose destination then fell silent, stays frozen, and one that was restored waits
    for its source: both hosts go on asking each other, and finish by themselves as soon as they hear from each other.
    Only where that will never be is there something to resolve. The other host cannot be asked, so nothing but your
    word keeps the container from running twice, or from being deleted twice: be sure of what the other host did, or
    keep it off the network.

    A host that answers after all is not overruled (exit code 3, PEER_ANSWERS), and where no handover waits nothing is
    done (exit code 3, NOTHING_TO_RESOLVE).

    With -o json: one object with container, migration, epoch, side (source or destination), host, peer, since,
    heard_time, heard, peer_answers, answer, risks {here, there}, and kept (here, there or null).
    """
    with agent() as channel:
        stub = MigrationServiceStub(channel)
        found = stub.GetHandover(migration_pb2.GetHandoverRequest(container=container), timeout=READ_S).handover
        if keep is not None:
            if found.peer_answers:
                raise Precondition(
                    f"{found.peer} answers ({found.answer}): there is nothing to resolve, the agents finish by "
                    "themselves",
                    reason="PEER_ANSWERS",
                )
            _confirm(found, keep, yes)
            stub.ResolveHandover(
                migration_pb2.ResolveHandoverRequest(
                    container=container, epoch=found.epoch, keep=f"KEEP_{keep.upper()}"
                ),
                timeout=READ_S,
            )
    if settings().json:
        output.write_json(handover_object(found, keep))
    elif keep is None:
        print("\n".join([*facts(found), *(f"--{side}: {text}" for side, text in risks(found).items())]))
    else:
        print(container)


def _confirm(found: migration_pb2.Handover, keep: str, yes: bool) -> None:
    """The warning, and the question, which is never asked without a terminal."""
    for line in (*facts(found), f"migrator resolve --{keep}: {risks(found)[keep]}"):
        print(line, file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidArgument(f"nothing was done: without a terminal, say --yes if --{keep} is meant")
    if not click.confirm(f"Is {found.peer} gone for good, and --{keep} what you want?", err=True):
        raise Cancelled(f"nothing was done; the handover of {found.container} still waits for {found.peer}")


def facts(found: migration_pb2.Handover) -> list[str]:
    """What is known, line by line."""
    if found.side == SOURCE:
        state = f"{found.host} has released it to {found.peer} and keeps its own copy frozen"
    else:
        state = f"{found.host} holds a complete copy from {found.peer} that has not run"
    lines = [f"{found.container}: {state} (migration {found.migration}, epoch {found.epoch})"]
    if found.HasField("since_time"):
        lines.append(f"  it waits since {output.iso(found.since_time)} ({_ago(found.since_time.ToMilliseconds())})")
    if found.HasField("heard_time"):
        when = f"{output.iso(found.heard_time)} ({_ago(found.heard_time.ToMilliseconds())})"
        lines.append(f"  {found.peer} was last heard {when}; it said: {found.heard}")
    lines.append(f"  {found.peer} now: {output.printable(found.answer)}")
    return lines


def risks(found: migration_pb2.Handover) -> dict[str, str]:
    """By option, what could go wrong."""
    name, host, peer = found.container, found.host, found.peer
    if found.side == SOURCE:
        return {
            "here": f"{name} runs on at {host} as it was at the freeze. If {peer} has taken it since it was last heard,"
            f" it runs there, too: two copies with one address, whose disks part from each other. If {peer} has not "
            f"taken it, it gives it up when it is back.",
            "there": f"the copy at {host} is deleted, memory and disk. If {peer} has not taken {name}, or has lost it, "
            "that was the last one.",
        }
    return {
        "here": f"{name} runs at {host} as it was at the freeze. If {peer} has not released it, it runs there, too, or"
        " will when that host is back: two copies with one address, whose disks part from each other.",
        "there": f"the copy at {host} is deleted, memory and disk. If {peer} has released {name} and lost its own copy,"
        " that was the last one.",
    }


def handover_object(found: migration_pb2.Handover, kept: str | None) -> dict[str, object]:
    """A handover as -o json shows it."""
    return {
        "container": found.container,
        "migration": found.migration,
        "epoch": found.epoch,
        "side": output.enum_name(migration_pb2.HandoverSide, found.side),
        "host": found.host,
        "peer": found.peer,
        "since": output.iso(found.since_time),
        "heard_time": output.iso(found.heard_time),
        "heard": found.heard or None,
        "peer_answers": found.peer_answers,
        "answer": found.answer,
        "risks": risks(found),
        "kept": kept,
    }


def _ago(time_ms: int) -> str:
    return f"{format_duration(max(0, round(time.time() - time_ms / 1000)) * 1000)} ago"
