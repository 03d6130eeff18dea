"""`migrator volume …`."""

import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from migrator.cli import output
from migrator.cli.amounts import SIZE
from migrator.cli.base import Group, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import CONTAINER, check_name
from migrator.cli.transfer import Download
from migrator.errors import Exit, InvalidArgument
from migrator.units import format_size
from migrator.v1 import volume_pb2
from migrator.v1.volume_pb2_grpc import VolumeServiceStub

# Shrinking moves blocks and checks all of the file system.
RESIZE_S = 3600.0
REPORT_BYTES = 1 << 30


class _VolumeName(click.ParamType[tuple[str, str]]):
    """CT or CT:MOUNT as container and mount point; `alone` is the mount point of CT."""

    name = "volume"

    def __init__(self, alone: str) -> None:
        self._alone = alone

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        container, colon, mount_point = str(value).partition(":")
        try:
            check_name(container)
            if colon and not mount_point.startswith("/"):
                raise InvalidArgument(f"{mount_point!r} is not where a volume is mounted, such as /data")
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)
        return container, mount_point or self._alone

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return CONTAINER.shell_complete(ctx, param, incomplete)


VOLUME = _VolumeName("/")
VOLUMES = _VolumeName("")


@click.group("volume", cls=Group)
def group() -> None:
    """Disks of containers."""


@group.command("ls")
@click.argument("container", type=CONTAINER, required=False)
def ls(container: str | None) -> None:
    """List the volumes of all containers, or of one."""
    with agent() as channel:
        request = volume_pb2.ListVolumesRequest(container=container or "")
        volumes = VolumeServiceStub(channel).ListVolumes(request, timeout=READ_S).volumes
    if settings().json:
        output.write_json([output.to_object(volume) for volume in volumes])
        return
    rows = [
        [
            volume.container,
            volume.mount_point,
            format_size(volume.size_bytes),
            format_size(volume.allocated_bytes),
            volume.filesystem,
        ]
        for volume in volumes
    ]
    output.write_table(["CONTAINER", "MOUNT", "SIZE", "ALLOCATED", "FS"], rows)


@group.command("resize")
@click.argument("volume", type=VOLUME, metavar="CONTAINER[:MOUNT]")
@click.argument("size", type=SIZE)
def resize(volume: tuple[str, str], size: int) -> None:
    """Make a volume larger or smaller: the root volume, or that which is mounted at MOUNT.

    It grows while the container runs. It becomes smaller only while the container is stopped, and never with XFS.

    \b
    migrator volume resize ct101 20GiB
    migrator volume resize ct101:/data 100GiB
    """
    container, mount_point = volume
    request = volume_pb2.ResizeVolumeRequest(container=container, mount_point=mount_point, size_bytes=size)
    with agent() as channel:
        resized = VolumeServiceStub(channel).ResizeVolume(request, timeout=RESIZE_S).volume
    if settings().json:
        output.write_json(output.to_object(resized))
    else:
        print(f"{resized.container}:{resized.mount_point} has {format_size(resized.size_bytes)}")


@group.command("export")
@click.option("--format", "kind", type=click.Choice(["raw", "qcow2", "ploop"]), default="raw", show_default=True)
@click.option("--snapshot", metavar="NAME", help="As it was at this snapshot, also of a running container.")
@click.argument("volume", type=VOLUME, metavar="CONTAINER[:MOUNT]")
@click.argument("path", type=click.Path(path_type=Path))
def export(volume: tuple[str, str], path: Path, kind: str, snapshot: str | None) -> None:
    """Write a stopped container's volume to a file on this machine, or with ploop to a folder.

    A ploop folder has DiskDescriptor.xml and root.hds, of version 2, for the tools of OpenVZ and for qemu-img.

    \b
    migrator volume export ct101 ct101.qcow2 --format qcow2
    migrator volume export ct101:/data data.hdd --format ploop
    """
    container, mount_point = volume
    request = volume_pb2.ExportVolumeRequest(
        container=container, mount_point=mount_point, format=kind, snapshot=snapshot or ""
    )
    download = Download(path, is_folder=kind == "ploop")
    size_bytes = 0
    try:
        with agent() as channel:
            responses = VolumeServiceStub(channel).ExportVolume(request)
            try:
                for response in responses:
                    match response.WhichOneof("response"):
                        case "file":
                            download.begin(response.file.name, response.file.size_bytes)
                            size_bytes += response.file.size_bytes
                        case "piece":
                            before = download.written_bytes // REPORT_BYTES
                            download.write(response.piece.offset, response.piece.data)
                            if download.written_bytes // REPORT_BYTES != before:
                                print(
                                    f"{format_size(download.written_bytes)} have arrived", file=sys.stderr, flush=True
                                )
                        case _ if response.progress:
                            print(output.printable(response.progress), file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                responses.cancel()
                print("migrator: interrupted; nothing was exported", file=sys.stderr)
                raise SystemExit(int(Exit.CANCELLED)) from None
        download.finish()
    finally:
        download.discard()
    if settings().json:
        written = {"path": str(path), "format": kind, "size_bytes": size_bytes}
        output.write_json(written | {"written_bytes": download.written_bytes})
    else:
        print(path)


@group.command("check")
@click.option("--repair", is_flag=True, help="Repair what is damaged; the container has to be stopped.")
@click.argument("volume", type=VOLUMES, metavar="CONTAINER[:MOUNT]")
def check(volume: tuple[str, str], repair: bool) -> int:
    """Look whether the file systems of a container's volumes are whole, or of the one that is mounted at MOUNT.

    It looks at clones as of one moment: the container may run, and is not changed. A repair is made on a clone, too,
    which takes the volume's place if it is whole then; files that belong nowhere any more are in lost+found. What btrfs
    has damaged is not repaired. Exit code 3 if something is damaged and was not repaired.

    \b
    migrator volume check ct101
    migrator volume check ct101:/data --repair
    """
    container, mount_point = volume
    where = {"container": container, "mount_point": mount_point}
    checked: list[volume_pb2.CheckedVolume] = []
    with agent() as channel:
        stub = VolumeServiceStub(channel)
        responses = (
            stub.RepairVolume(volume_pb2.RepairVolumeRequest(**where))
            if repair
            else stub.CheckVolume(volume_pb2.CheckVolumeRequest(**where))
        )
        try:
            for response in responses:
                if response.WhichOneof("response") == "volume":
                    checked.append(response.volume)
                elif response.progress:
                    print(output.printable(response.progress), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            responses.cancel()
            print("migrator: interrupted; nothing was changed", file=sys.stderr)
            raise SystemExit(int(Exit.CANCELLED)) from None
    if settings().json:
        output.write_json([output.to_object(one) | {"state": _state(one)} for one in checked])
    else:
        rows = [[one.container, one.mount_point, one.filesystem, _state(one)] for one in checked]
        output.write_table(["CONTAINER", "MOUNT", "FS", "STATE"], rows)
        for one in checked:
            if one.problem:
                text = f"migrator: {one.container}:{one.mount_point}: {one.problem}"
                print(output.printable(text), file=sys.stderr)
    return int(Exit.PREFLIGHT if any(_state(one) == "damaged" for one in checked) else Exit.DONE)


def _state(checked: volume_pb2.CheckedVolume) -> str:
    if checked.repaired:
        return "repaired"
    return "damaged" if checked.problem else "whole"
