"""`migrator image …`."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from migrator.cli import output, transfer
from migrator.cli.base import Group, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import IMAGE
from migrator.cli.settings import endpoint
from migrator.errors import Exit, Unreachable
from migrator.units import format_size
from migrator.v1 import image_pb2
from migrator.v1.image_pb2_grpc import ImageServiceStub

FILESYSTEM = click.option("--fs", type=click.Choice(["ext4", "xfs", "btrfs"]), default="ext4", show_default=True)


@click.group("image", cls=Group)
def group() -> None:
    """Images that containers are made from."""


@group.command("build")
@click.option("--suite", default="bookworm", show_default=True, help="Debian suite.")
@click.option("--include", "packages", multiple=True, metavar="PACKAGE,...", help="Packages beside the base system.")
@FILESYSTEM
@click.option("--refresh", is_flag=True, help="Fetch the packages again, not from the cache.")
@click.argument("name", type=IMAGE)
def build(name: str, suite: str, packages: Sequence[str], fs: str, refresh: bool) -> None:
    """Build an OS template from Debian packages.

    \b
    migrator image build redis --suite bookworm --include redis-server
    """
    chosen = [package.strip() for item in packages for package in item.split(",") if package.strip()]
    request = image_pb2.BuildImageRequest(name=name, suite=suite, packages=chosen, filesystem=fs, refresh=refresh)
    with agent() as channel:
        _finish(ImageServiceStub(channel).BuildImage(request))


@group.command("import")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["tarball", "raw", "qcow2", "ploop"]),
    help="What the file is. Recognised if not given, but for raw.",
)
@click.option(
    "--fs",
    type=click.Choice(["ext4", "xfs", "btrfs"]),
    help="File system of the image.  [default: ext4 for a tarball, that of the disk for a disk]",
)
@click.option("--snapshot", metavar="GUID", help="Of a ploop folder: this snapshot and not the newest state.")
@click.option(
    "--partition", type=click.IntRange(0, 128), help="Of a disk: where the root file system is; 0 is the whole disk."
)
@click.option("--keep-identity", is_flag=True, help="Leave machine id, host name and SSH host keys as they are.")
@click.argument("name", type=IMAGE)
@click.argument("path", type=click.Path(path_type=Path))
def import_(
    name: str,
    path: Path,
    kind: str | None,
    fs: str | None,
    snapshot: str | None,
    partition: int | None,
    keep_identity: bool,
) -> None:
    """Make an image of a root file system tarball or of a disk.

    PATH is a tarball (plain, gzip or zstd), a qcow2 file, a ploop folder with DiskDescriptor.xml, or with --format raw
    a disk byte by byte. It may be partitioned. The agent of this machine reads it where it is; to another one (--host)
    it is sent.

    \b
    migrator image import alpine alpine-minirootfs.tar.gz
    migrator image import web1 /vz/private/101/root.hdd --keep-identity
    migrator image import debian debian-12-genericcloud-amd64.qcow2
    """
    # Made absolute here: the agent has another working directory.
    request = image_pb2.ImportImageRequest(
        name=name,
        path=str(Path.cwd() / path),
        filesystem=fs or "",
        format=kind or "",
        snapshot=snapshot or "",
        partition=partition,
        keep_identity=keep_identity,
    )
    is_remote = endpoint(settings()).socket is None
    with agent() as channel:
        stub = ImageServiceStub(channel)
        if is_remote:
            files = transfer.files_of(path.parent if path.name == "DiskDescriptor.xml" else path)
            _finish(stub.UploadImage(_upload(request, files)))
        else:
            _finish(stub.ImportImage(request))


def _upload(start: image_pb2.ImportImageRequest, files: Sequence[Path]) -> Iterator[image_pb2.UploadImageRequest]:
    Request = image_pb2.UploadImageRequest
    yield Request(start=start)
    for path in files:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            yield Request(file=image_pb2.UploadedFile(name=path.name, size_bytes=size_bytes))
            for offset, data in transfer.pieces(file.fileno(), size_bytes):
                yield Request(piece=image_pb2.UploadedPiece(offset=offset, data=data))


@group.command("ls")
def ls() -> None:
    """List the images of the host."""
    with agent() as channel:
        images = ImageServiceStub(channel).ListImages(image_pb2.ListImagesRequest(), timeout=READ_S).images
    if settings().json:
        output.write_json([output.to_object(image) for image in images])
        return
    rows = [
        [
            image.name,
            format_size(image.size_bytes),
            format_size(image.allocated_bytes),
            image.filesystem,
            output.iso(image.create_time) or "-",
            image.origin,
        ]
        for image in images
    ]
    output.write_table(["NAME", "SIZE", "ALLOCATED", "FS", "CREATED", "ORIGIN"], rows)


@group.command("inspect")
@click.argument("name", type=IMAGE)
def inspect(name: str) -> None:
    """Show everything about one image."""
    with agent() as channel:
        answer = ImageServiceStub(channel).GetImage(image_pb2.GetImageRequest(name=name), timeout=READ_S)
    found = output.to_object(answer.image)
    if settings().json:
        output.write_json(found)
    else:
        output.write_fields(found)


@group.command("rm")
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="NAME...")
def rm(names: Sequence[str]) -> None:
    """Delete images. Containers that were made from them are not touched."""
    with agent() as channel:
        stub = ImageServiceStub(channel)
        for name in names:
            stub.DeleteImage(image_pb2.DeleteImageRequest(name=name), timeout=READ_S)
            if not settings().json:
                print(name)
    if settings().json:
        output.write_json([{"name": name} for name in names])


def _finish(responses: Iterator[Any]) -> None:
    """Progress to standard error as it comes; the image at the end to standard output."""
    made: image_pb2.Image | None = None
    try:
        for response in responses:
            if response.progress:
                print(output.printable(response.progress.rstrip("\n")), file=sys.stderr, flush=True)
            if response.HasField("image"):
                made = response.image
    except KeyboardInterrupt:
        responses.cancel()  # type: ignore[attr-defined]
        print("migrator: interrupted; the image was not made", file=sys.stderr)
        raise SystemExit(int(Exit.CANCELLED)) from None
    if made is None:
        raise Unreachable("the connection ended before the image was done; see `migrator image ls`")
    if settings().json:
        output.write_json(output.to_object(made))
    else:
        print(made.name)
