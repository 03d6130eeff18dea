"""`migrator image …`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from migrator.cli import output
from migrator.cli.base import Group, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import IMAGE
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
@FILESYSTEM
@click.argument("name", type=IMAGE)
@click.argument("file", type=click.Path(path_type=Path))
def import_(name: str, file: Path, fs: str) -> None:
    """Unpack a root file system tarball (plain, gzip or zstd) that is on the agent's host.

    \b
    migrator image import alpine alpine-minirootfs.tar.gz
    """
    # Made absolute here: the agent has another working directory.
    request = image_pb2.ImportImageRequest(name=name, path=str(Path.cwd() / file), filesystem=fs)
    with agent() as channel:
        _finish(ImageServiceStub(channel).ImportImage(request))


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
