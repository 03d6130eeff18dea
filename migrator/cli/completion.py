"""Shell completion: the script for a shell, and the names that it offers."""

import click
from click.shell_completion import get_completion_class

from migrator.cli.base import Command, settings_of


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what makes a shell complete commands, options and names.

    \b
    migrator completion bash > /etc/bash_completion.d/migrator
    """
    from migrator.cli.main import load, main

    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"no completion for {shell}")
    print(made(main, {}, "migrator", "_MIGRATOR_COMPLETE").source())
    print(made(load("migrate"), {}, "migrate", "_MIGRATE_COMPLETE").source())


def names(kind: str, ctx: click.Context) -> list[str]:
    """Names of this kind that the agent has; none if it does not answer within a second."""
    import grpc

    from migrator.cli.connection import open_channel
    from migrator.cli.settings import endpoint, peer_names
    from migrator.errors import MigratorError
    from migrator.v1 import container_pb2, image_pb2, snapshot_pb2
    from migrator.v1.container_pb2_grpc import ContainerServiceStub
    from migrator.v1.image_pb2_grpc import ImageServiceStub
    from migrator.v1.snapshot_pb2_grpc import SnapshotServiceStub

    try:
        if kind == "host":
            return peer_names()
        with open_channel(endpoint(settings_of(ctx))) as channel:
            if kind == "container":
                containers = ContainerServiceStub(channel).ListContainers(
                    container_pb2.ListContainersRequest(), timeout=1
                )
                return [container.name for container in containers.containers]
            if kind == "snapshot":
                of = snapshot_pb2.ListSnapshotsRequest(container=ctx.params.get("container") or "")
                snapshots = SnapshotServiceStub(channel).ListSnapshots(of, timeout=1)
                return [snapshot.name for snapshot in snapshots.snapshots]
            images = ImageServiceStub(channel).ListImages(image_pb2.ListImagesRequest(), timeout=1)
            return [image.name for image in images.images]
    except (grpc.RpcError, MigratorError):
        return []
