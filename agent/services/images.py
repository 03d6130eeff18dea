"""ImageService: the host's images over gRPC. A caller who leaves ends the making of an image."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc

from agent import disk_images, tarball, template, uploads
from agent.disk_images import DiskSource
from agent.images import Image, Images
from agent.services.work import streamed
from agent.tarball import Cancel
from blockdev.formats import descriptor
from migrator.errors import InvalidArgument
from migrator.v1 import image_pb2 as pb
from migrator.v1 import image_pb2_grpc

DEFAULT_SUITE = "bookworm"
DEFAULT_FILESYSTEM = "ext4"

_Response = TypeVar("_Response", pb.BuildImageResponse, pb.ImportImageResponse, pb.UploadImageResponse)
Work = Callable[[Callable[[str], None], Cancel], Image]


class ImageService(image_pb2_grpc.ImageServiceServicer):
    """See proto/migrator/v1/image.proto."""

    def __init__(self, images: Images, cache: Path) -> None:
        self._images = images
        self._cache = cache

    def BuildImage(
        self, request: pb.BuildImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.BuildImageResponse]:
        suite, kind = request.suite or DEFAULT_SUITE, request.filesystem or DEFAULT_FILESYSTEM
        packages = list(request.packages)
        template.check(suite, packages)

        def work(report: Callable[[str], None], cancel: Cancel) -> Image:
            with self._images.reserved(request.name, kind):
                source = template.build(self._cache, suite, packages, report, cancel, refresh=request.refresh)
                origin = " ".join([f"Debian {suite}", *sorted(packages)])
                return self._images.add(request.name, kind, origin, source, report=report, cancel=cancel)

        yield from _streamed(work, pb.BuildImageResponse, context)

    def ImportImage(
        self, request: pb.ImportImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ImportImageResponse]:
        def work(report: Callable[[str], None], cancel: Cancel) -> Image:
            with self._images.reserved(request.name, request.filesystem or DEFAULT_FILESYSTEM):
                path = Path(request.path)
                return self._add(request, path, path.name, report, cancel)

        yield from _streamed(work, pb.ImportImageResponse, context)

    def UploadImage(
        self, request_iterator: Iterator[pb.UploadImageRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.UploadImageResponse]:
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgument("the first message of an upload has to be its start", reason="BAD_UPLOAD")
        request = first.start

        def work(report: Callable[[str], None], cancel: Cancel) -> Image:
            with (
                self._images.reserved(request.name, request.filesystem or DEFAULT_FILESYSTEM),
                self._images.staging() as folder,
            ):
                files = uploads.receive(request_iterator, folder, self._images.check_room, report, cancel)
                named = [path for path in files if path.name == descriptor.FILE]
                if not named and len(files) > 1:
                    raise InvalidArgument(
                        f"{len(files)} files were sent, and none is {descriptor.FILE}", reason="BAD_UPLOAD"
                    )
                return self._add(request, (named or files)[0], Path(request.path).name, report, cancel)

        yield from _streamed(work, pb.UploadImageResponse, context)

    def _add(
        self,
        request: pb.ImportImageRequest,
        path: Path,
        origin: str,
        report: Callable[[str], None],
        cancel: Cancel,
    ) -> Image:
        """What is at the path, in the format that the request names or that is recognised."""
        kind = disk_images.recognise(path, request.format)
        partition = request.partition if request.HasField("partition") else None
        if kind != disk_images.TARBALL:
            disk = DiskSource(path, kind, request.snapshot, partition)
            return self._images.add_disk(
                request.name,
                request.filesystem,
                origin,
                disk,
                keep_identity=request.keep_identity,
                report=report,
                cancel=cancel,
            )
        if request.snapshot or partition is not None or request.keep_identity:
            raise InvalidArgument("a snapshot, a partition and an identity to keep are of disk images, not of tarballs")
        filesystem = request.filesystem or DEFAULT_FILESYSTEM
        source = tarball.recognise(path)
        return self._images.add(request.name, filesystem, origin, source, report=report, cancel=cancel)

    def GetImage(self, request: pb.GetImageRequest, context: grpc.ServicerContext) -> pb.GetImageResponse:
        return pb.GetImageResponse(image=describe(self._images.get(request.name)))

    def ListImages(self, request: pb.ListImagesRequest, context: grpc.ServicerContext) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=[describe(image) for image in self._images.all()])

    def DeleteImage(self, request: pb.DeleteImageRequest, context: grpc.ServicerContext) -> pb.DeleteImageResponse:
        self._images.delete(request.name)
        return pb.DeleteImageResponse()


def describe(image: Image) -> pb.Image:
    """An image as clients see it."""
    message = pb.Image(
        name=image.name,
        size_bytes=image.size_bytes,
        allocated_bytes=image.allocated_bytes,
        filesystem=image.filesystem,
        origin=image.origin,
    )
    message.create_time.FromMilliseconds(image.create_time_ms)
    return message


def _streamed(work: Work, response: type[_Response], context: grpc.ServicerContext) -> Iterator[_Response]:
    """What is done, line by line, and at last the image; an empty one now and then in between."""
    for item in streamed("image", work, context):
        if isinstance(item, Image):
            yield response(image=describe(item))
        else:
            yield response(progress=item)
