"""ImageService: the host's images over gRPC. A caller who leaves ends the making of an image."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc

from agent import tarball, template
from agent.images import Image, Images
from agent.tarball import Cancel
from migrator.errors import MigratorError
from migrator.v1 import image_pb2 as pb
from migrator.v1 import image_pb2_grpc

DEFAULT_SUITE = "bookworm"
DEFAULT_FILESYSTEM = "ext4"
# A caller who hears nothing for longer wonders; it also shows us that it is still there.
SILENCE_S = 10.0

_Response = TypeVar("_Response", pb.BuildImageResponse, pb.ImportImageResponse)
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
        kind = request.filesystem or DEFAULT_FILESYSTEM

        def work(report: Callable[[str], None], cancel: Cancel) -> Image:
            with self._images.reserved(request.name, kind):
                source = tarball.recognise(Path(request.path))
                return self._images.add(request.name, kind, source.path.name, source, report=report, cancel=cancel)

        yield from _streamed(work, pb.ImportImageResponse, context)

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
    """What is done, line by line, and at last the image. The work has a thread, which is waited for at the end."""
    cancel = Cancel()
    said: queue.SimpleQueue[str | Image | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            said.put(work(said.put, cancel))
        except Exception as error:
            said.put(error)

    thread = threading.Thread(target=run, name="image", daemon=True)
    if not context.add_callback(cancel.cancel):
        raise MigratorError("the caller has gone")
    thread.start()
    try:
        while True:
            try:
                item = said.get(timeout=SILENCE_S)
            except queue.Empty:
                yield response()
                continue
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Image):
                yield response(image=describe(item))
                return
            yield response(progress=item)
    finally:
        cancel.cancel()
        thread.join()
