"""VolumeService: the containers' volumes over gRPC."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import grpc

from agent.services.work import streamed
from agent.tarball import Cancel
from agent.volume_checks import Checked, VolumeChecks
from agent.volumes import ContainerVolume, ExportedFile, Volumes
from blockdev import extents, fiemap
from migrator.v1 import volume_pb2 as pb
from migrator.v1 import volume_pb2_grpc

PIECE_BYTES = 1 << 20
_ZEROS = bytes(PIECE_BYTES)


class VolumeService(volume_pb2_grpc.VolumeServiceServicer):
    """See proto/migrator/v1/volume.proto."""

    def __init__(self, volumes: Volumes, checks: VolumeChecks) -> None:
        self._volumes = volumes
        self._checks = checks

    def ListVolumes(self, request: pb.ListVolumesRequest, context: grpc.ServicerContext) -> pb.ListVolumesResponse:
        return pb.ListVolumesResponse(volumes=[describe(volume) for volume in self._volumes.all(request.container)])

    def ResizeVolume(self, request: pb.ResizeVolumeRequest, context: grpc.ServicerContext) -> pb.ResizeVolumeResponse:
        resized = self._volumes.resize(request.container, request.mount_point, request.size_bytes)
        return pb.ResizeVolumeResponse(volume=describe(resized))

    def ExportVolume(
        self, request: pb.ExportVolumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExportVolumeResponse]:
        made = _Export(self._volumes, request)
        try:
            for item in streamed("export", made.make, context):
                if isinstance(item, str):
                    yield pb.ExportVolumeResponse(progress=item)
                else:
                    for file in item:
                        yield from _sent(file)
        finally:
            made.close()

    def CheckVolume(
        self, request: pb.CheckVolumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckVolumeResponse]:
        work = partial(self._checks.check, request.container, request.mount_point)
        for item in _each(streamed("check", work, context)):
            if isinstance(item, str):
                yield pb.CheckVolumeResponse(progress=item)
            else:
                yield pb.CheckVolumeResponse(volume=item)

    def RepairVolume(
        self, request: pb.RepairVolumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.RepairVolumeResponse]:
        work = partial(self._checks.repair, request.container, request.mount_point)
        for item in _each(streamed("repair", work, context)):
            if isinstance(item, str):
                yield pb.RepairVolumeResponse(progress=item)
            else:
                yield pb.RepairVolumeResponse(volume=item)


def _each(items: Iterator[str | list[Checked]]) -> Iterator[str | pb.CheckedVolume]:
    """What is reported meanwhile, and then volume by volume."""
    for item in items:
        if isinstance(item, str):
            yield item
            continue
        for checked in item:
            yield pb.CheckedVolume(
                container=checked.container,
                mount_point=checked.mount_point,
                filesystem=checked.filesystem,
                problem=checked.problem,
                repaired=checked.repaired,
            )


class _Export:
    """An export made in one thread and sent by another."""

    def __init__(self, volumes: Volumes, request: pb.ExportVolumeRequest) -> None:
        self._volumes = volumes
        self._request = request
        self._resources = ExitStack()

    def make(self, report: Callable[[str], None], cancel: Cancel) -> list[ExportedFile]:
        request = self._request
        return self._resources.enter_context(
            self._volumes.export(
                request.container, request.mount_point, request.snapshot, request.format, report, cancel
            )
        )

    def close(self) -> None:
        self._resources.close()


def describe(volume: ContainerVolume) -> pb.ContainerVolume:
    """A volume as clients see it."""
    return pb.ContainerVolume(
        container=volume.container,
        mount_point=volume.mount_point,
        size_bytes=volume.size_bytes,
        allocated_bytes=volume.allocated_bytes,
        filesystem=volume.filesystem,
    )


def _sent(exported: ExportedFile) -> Iterator[pb.ExportVolumeResponse]:
    with exported.path.open("rb") as file:
        size_bytes = exported.path.stat().st_size
        yield pb.ExportVolumeResponse(file=pb.ExportedFile(name=exported.name, size_bytes=size_bytes))
        for piece in extents.pieces(fiemap.allocated(file.fileno(), size_bytes), PIECE_BYTES):
            data = os.pread(file.fileno(), piece.length, piece.start)
            if data != _ZEROS[: piece.length]:
                yield pb.ExportVolumeResponse(piece=pb.ExportedPiece(offset=piece.start, data=data))
