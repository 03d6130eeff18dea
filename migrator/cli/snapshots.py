"""`migrator snapshot …`: a container's disk as it was."""

from collections.abc import Sequence

import click

from migrator.cli import output
from migrator.cli.base import Group, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import CONTAINER, SNAPSHOT
from migrator.units import format_duration, format_size
from migrator.v1 import snapshot_pb2 as pb
from migrator.v1.snapshot_pb2_grpc import SnapshotServiceStub

# Of a volume with a million extents.
TAKE_S = 600.0


@click.group("snapshot", cls=Group)
def group() -> None:
    """A container's disk as it was at one moment, to go back to."""


@group.command("create")
@click.argument("container", type=CONTAINER)
@click.argument("name", required=False, type=SNAPSHOT)
def create(container: str, name: str | None) -> None:
    """Take a snapshot of all volumes of a container, which may run meanwhile. Without a name it gets the time for one.

    \b
    migrator snapshot create ct101 before-upgrade

    Takes no room until something is written. The file systems are frozen for a moment, so that their files are as after
    a sync; what the container's programs have only in memory is not in it.

    With -o json: an object as in `snapshot ls`, with freeze_ms, for how long writes stood still.
    """
    with agent() as channel:
        request = pb.CreateSnapshotRequest(container=container, name=name or "")
        answer = SnapshotServiceStub(channel).CreateSnapshot(request, timeout=TAKE_S)
    if settings().json:
        output.write_json(_object(answer.snapshot) | {"freeze_ms": round(answer.freeze_ms, 3)})
    elif answer.freeze_ms:
        print(f"{answer.snapshot.name} (writes stood still for {format_duration(answer.freeze_ms)})")
    else:
        print(answer.snapshot.name)


@group.command("ls")
@click.argument("container", type=CONTAINER)
def ls(container: str) -> None:
    """List the snapshots of a container as a tree. `*` marks where the container is now.

    With -o json: a list of objects with container, name, parent, created, current, size_bytes and allocated_bytes (also
    what is shared with the container and with other snapshots).
    """
    with agent() as channel:
        request = pb.ListSnapshotsRequest(container=container)
        found = SnapshotServiceStub(channel).ListSnapshots(request, timeout=READ_S).snapshots
    if settings().json:
        output.write_json([_object(snapshot) for snapshot in found])
        return
    depths = {"": -1}
    rows = []
    for snapshot in found:
        depth = depths[snapshot.name] = depths.get(snapshot.parent, -1) + 1
        rows.append(
            [
                "  " * depth + snapshot.name,
                "*" if snapshot.is_current else "",
                output.iso(snapshot.create_time) or "-",
                format_size(sum(volume.size_bytes for volume in snapshot.volumes)),
                format_size(sum(volume.allocated_bytes for volume in snapshot.volumes)),
            ]
        )
    output.write_table(["NAME", "NOW", "TAKEN", "SIZE", "DISK"], rows)


@group.command("rollback")
@click.option("-f", "--force", is_flag=True, help="Stop it first if it runs, and start it again.")
@click.argument("container", type=CONTAINER)
@click.argument("name", type=SNAPSHOT)
def rollback(container: str, name: str, force: bool) -> None:
    """Set the volumes of a stopped container back to a snapshot.

    \b
    migrator snapshot rollback ct101 before-upgrade --force

    What was written since the last snapshot is lost: take another one before, if it may be wanted. All snapshots stay.
    """
    with agent() as channel:
        request = pb.RollbackSnapshotRequest(container=container, name=name, force=force)
        answer = SnapshotServiceStub(channel).RollbackSnapshot(request, timeout=TAKE_S)
    if settings().json:
        output.write_json(_object(answer.snapshot))
    else:
        print(name)


@group.command("rm")
@click.argument("container", type=CONTAINER)
@click.argument("names", nargs=-1, required=True, type=SNAPSHOT, metavar="NAME...")
def rm(container: str, names: Sequence[str]) -> None:
    """Delete snapshots, in any order: the others and the container keep what they share with them."""
    with agent() as channel:
        for name in dict.fromkeys(names):
            request = pb.DeleteSnapshotRequest(container=container, name=name)
            SnapshotServiceStub(channel).DeleteSnapshot(request, timeout=TAKE_S)
            if not settings().json:
                print(name, flush=True)
    if settings().json:
        output.write_json([{"container": container, "name": name} for name in dict.fromkeys(names)])


def _object(snapshot: pb.Snapshot) -> dict[str, object]:
    return {
        "container": snapshot.container,
        "name": snapshot.name,
        "parent": snapshot.parent or None,
        "created": output.iso(snapshot.create_time),
        "current": snapshot.is_current,
        "size_bytes": sum(volume.size_bytes for volume in snapshot.volumes),
        "allocated_bytes": sum(volume.allocated_bytes for volume in snapshot.volumes),
    }
