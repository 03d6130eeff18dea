"""An agent without containers: the real services over a real gRPC server, with its state in memory."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from migrator.v1 import (
    container_pb2,
    container_pb2_grpc,
    host_pb2,
    host_pb2_grpc,
    image_pb2,
    image_pb2_grpc,
    migration_pb2,
    migration_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    volume_pb2,
    volume_pb2_grpc,
)

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED


def fail(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, message: str) -> NoReturn:
    """End the call as the agent does, with ErrorInfo in the details."""
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="migrator"))
    status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)
    raise AssertionError("abort returned")


class Containers(container_pb2_grpc.ContainerServiceServicer):
    def __init__(self) -> None:
        self.by_name: dict[str, container_pb2.Container] = {}
        self.resizes: list[tuple[int, int]] = []

    def _get(self, name: str, context: grpc.ServicerContext) -> container_pb2.Container:
        if name not in self.by_name:
            fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"there is no container {name} here")
        return self.by_name[name]

    def CreateContainer(self, request, context):
        if request.name in self.by_name:
            fail(context, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS", f"container {request.name} exists")
        made = container_pb2.Container(
            name=request.name, spec=request.spec, host="host-a", state=container_pb2.CONTAINER_STATE_CREATED
        )
        self.by_name[request.name] = made
        return container_pb2.CreateContainerResponse(container=made)

    def GetContainer(self, request, context):
        return container_pb2.GetContainerResponse(container=self._get(request.name, context))

    def ListContainers(self, request, context):
        return container_pb2.ListContainersResponse(containers=self.by_name.values())

    def DeleteContainer(self, request, context):
        found = self._get(request.name, context)
        if found.state == RUNNING and not request.force:
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE", f"container {request.name} runs")
        del self.by_name[request.name]
        return container_pb2.DeleteContainerResponse()

    def StartContainer(self, request, context):
        found = self._get(request.name, context)
        found.state, found.pid = RUNNING, 4711
        found.start_time.FromMilliseconds(1_790_000_000_123)
        return container_pb2.StartContainerResponse(container=found)

    def StopContainer(self, request, context):
        found = self._get(request.name, context)
        found.state, found.pid, found.exit_code = STOPPED, 0, 143
        return container_pb2.StopContainerResponse(container=found)

    def KillContainer(self, request, context):
        self._get(request.name, context).exit_code = 128 + request.signal
        return container_pb2.KillContainerResponse()

    def Exec(self, requests, context):
        """`cat` gives its input back, `exit N` ends with N, `size` tells each terminal size, `args` its command."""
        start = next(requests).start
        self._get(start.name, context)
        Response = container_pb2.ExecResponse
        match list(start.command):
            case ["cat"]:
                for request in requests:
                    if request.input_end:
                        break
                    yield Response(output=request.input)
                yield Response(exit_code=0)
            case ["exit", code]:
                yield Response(error_output=b"ending\n")
                yield Response(exit_code=int(code))
            case ["size"]:
                yield Response(output=f"{start.rows}x{start.columns}\n".encode())
                for request in requests:
                    if request.HasField("resize"):
                        yield Response(output=f"{request.resize.rows}x{request.resize.columns}\n".encode())
                        break
                yield Response(exit_code=0)
            case _:
                yield Response(output="\n".join(start.command).encode())
                yield Response(exit_code=0)

    def ReadLog(self, request, context):
        self._get(request.name, context)
        lines = [b"one\n", b"two\n", b"three\n"]
        for number, text in enumerate(lines[-request.tail :] if request.tail else lines):
            response = container_pb2.ReadLogResponse(text=text, is_error_output=text == b"two\n")
            response.time.FromSeconds(1_790_000_000 + number)
            yield response
        if request.follow:
            while context.is_active():
                threading.Event().wait(0.02)


class Images(image_pb2_grpc.ImageServiceServicer):
    def __init__(self) -> None:
        self.imports: list[image_pb2.ImportImageRequest] = []
        self.uploads: dict[str, bytes] = {}

    def ImportImage(self, request, context):
        self.imports.append(request)
        yield image_pb2.ImportImageResponse(progress="copying ext4")
        yield image_pb2.ImportImageResponse(image=image_pb2.Image(name=request.name, size_bytes=1 << 30))

    def UploadImage(self, requests, context):
        start = next(requests).start
        self.imports.append(start)
        for request in requests:
            if request.HasField("file"):
                name = request.file.name
                self.uploads[name] = bytes(request.file.size_bytes)
            else:
                at, data = request.piece.offset, request.piece.data
                self.uploads[name] = self.uploads[name][:at] + data + self.uploads[name][at + len(data) :]
        yield image_pb2.UploadImageResponse(image=image_pb2.Image(name=start.name, size_bytes=1 << 30))

    def BuildImage(self, request, context):
        yield image_pb2.BuildImageResponse(progress=f"fetching {' '.join(request.packages)}")
        yield image_pb2.BuildImageResponse(image=image_pb2.Image(name=request.name, size_bytes=1 << 30))

    def ListImages(self, request, context):
        return image_pb2.ListImagesResponse(images=[image_pb2.Image(name="redis", size_bytes=1 << 30)])


class Volumes(volume_pb2_grpc.VolumeServiceServicer):
    """Exports of `broken` fail in the middle; those of `evil` name a file outside of their folder."""

    def ListVolumes(self, request, context):
        volume = volume_pb2.ContainerVolume(
            container="ct101", mount_point="/", size_bytes=1 << 30, allocated_bytes=1 << 20, filesystem="ext4"
        )
        return volume_pb2.ListVolumesResponse(volumes=[volume])

    def ResizeVolume(self, request, context):
        if request.container == "full":
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NO_SPACE", "no room: remove images")
        volume = volume_pb2.ContainerVolume(
            container=request.container, mount_point=request.mount_point, size_bytes=request.size_bytes
        )
        return volume_pb2.ResizeVolumeResponse(volume=volume)

    def ExportVolume(self, request, context):
        Response = volume_pb2.ExportVolumeResponse
        yield Response(progress=f"converting to {request.format}")
        name = "../evil" if request.container == "evil" else "root.hds"
        yield Response(file=volume_pb2.ExportedFile(name=name, size_bytes=3 << 20))
        yield Response(piece=volume_pb2.ExportedPiece(offset=1 << 20, data=b"x" * 100))
        if request.container == "broken":
            fail(context, grpc.StatusCode.INTERNAL, "EXECUTION_FAILED", "qemu-img failed")
        if request.format == "ploop":
            yield Response(file=volume_pb2.ExportedFile(name="DiskDescriptor.xml", size_bytes=3))
            yield Response(piece=volume_pb2.ExportedPiece(offset=0, data=b"xml"))

    def CheckVolume(self, request, context):
        yield volume_pb2.CheckVolumeResponse(progress=f"checking {request.container}")
        for volume in self._checked(request, repaired=False):
            yield volume_pb2.CheckVolumeResponse(volume=volume)

    def RepairVolume(self, request, context):
        for volume in self._checked(request, repaired=True):
            yield volume_pb2.RepairVolumeResponse(volume=volume)

    def _checked(self, request, *, repaired: bool) -> Iterator[volume_pb2.CheckedVolume]:
        """`broken` is damaged at /data, and can be repaired there."""
        for point in [request.mount_point] if request.mount_point else ["/", "/data"]:
            is_bad = request.container == "broken" and point == "/data"
            yield volume_pb2.CheckedVolume(
                container=request.container,
                mount_point=point,
                filesystem="ext4",
                problem="wrong count" if is_bad else "",
                repaired=is_bad and repaired,
            )


class Hosts(host_pb2_grpc.HostServiceServicer):
    def ListHosts(self, request, context):
        away = host_pb2.Host(name="host-b", address="10.0.0.2:7443", error="connection refused")
        return host_pb2.ListHostsResponse(hosts=[host_pb2.Host(name="host-a", reachable=True), away])

    def Diagnose(self, request, context):
        finding = host_pb2.Finding(
            subject="criu", severity=host_pb2.SEVERITY_PROBLEM, message="too old", remedy="run scripts/setup"
        )
        return host_pb2.DiagnoseResponse(findings=[finding])


class Snapshots(snapshot_pb2_grpc.SnapshotServiceServicer):
    """A container that runs: a rollback needs `force`. Each snapshot is the child of the last one."""

    def __init__(self) -> None:
        self.taken: list[snapshot_pb2.Snapshot] = []

    def CreateSnapshot(self, request, context):
        if any(snapshot.name == request.name for snapshot in self.taken):
            fail(context, grpc.StatusCode.ALREADY_EXISTS, "SNAPSHOT_EXISTS", f"there is a snapshot {request.name}")
        made = snapshot_pb2.Snapshot(container=request.container, name=request.name or "20261121-100000")
        made.parent = self.taken[-1].name if self.taken else ""
        made.volumes.add(mount_point="/", size_bytes=2 << 30, allocated_bytes=160 << 20)
        made.create_time.FromMilliseconds(1_790_000_000_123)
        self.taken.append(made)
        self._go_to(made)
        return snapshot_pb2.CreateSnapshotResponse(snapshot=made, freeze_ms=12.3456)

    def ListSnapshots(self, request, context):
        return snapshot_pb2.ListSnapshotsResponse(snapshots=self.taken)

    def RollbackSnapshot(self, request, context):
        if not request.force:
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "RUNNING", "it runs: stop it first, or use --force")
        self._go_to(self._get(request.name, context))
        return snapshot_pb2.RollbackSnapshotResponse(snapshot=self._get(request.name, context))

    def DeleteSnapshot(self, request, context):
        self.taken.remove(self._get(request.name, context))
        return snapshot_pb2.DeleteSnapshotResponse()

    def _get(self, name: str, context: grpc.ServicerContext) -> snapshot_pb2.Snapshot:
        for snapshot in self.taken:
            if snapshot.name == name:
                return snapshot
        fail(context, grpc.StatusCode.NOT_FOUND, "SNAPSHOT_NOT_FOUND", f"there is no snapshot {name}")

    def _go_to(self, wanted: snapshot_pb2.Snapshot) -> None:
        for snapshot in self.taken:
            snapshot.is_current = snapshot is wanted


class Migrations(migration_pb2_grpc.MigrationServiceServicer):
    """A migration goes to its end by itself, except where the destination's name says otherwise.

    `slow` waits in precopy to be cancelled, `late` waits in handover and answers a cancellation with COMMITTED,
    `full` is refused by preflight, `nowhere` is not known, `lost` is uncertain. The handover of a container `stuck`
    waits for host-b, which is silent; that of `alive` for one that answers.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, migration_pb2.Migration] = {}
        self.snapshots = migration_pb2.SNAPSHOT_HANDLING_UNSPECIFIED
        self.on_waiting: Callable[[], None] = lambda: None
        self._cancelled = threading.Event()
        self.resolved: list[migration_pb2.ResolveHandoverRequest] = []

    def GetHandover(self, request, context):
        if request.container not in ("stuck", "alive"):
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_RESOLVE", "nothing waits")
        found = migration_pb2.Handover(
            container=request.container,
            migration="m1",
            epoch=7,
            side="HANDOVER_SIDE_SOURCE",
            host="host-a",
            peer="host-b",
        )
        found.since_time.FromMilliseconds(1_790_000_000_123)
        found.heard_time.FromMilliseconds(1_790_000_060_123)
        found.heard = "it is ready"
        found.peer_answers = request.container == "alive"
        found.answer = "it is ready" if found.peer_answers else "no route to host"
        return migration_pb2.GetHandoverResponse(handover=found)

    def ResolveHandover(self, request, context):
        self.resolved.append(request)
        return migration_pb2.ResolveHandoverResponse()

    def CreateMigration(self, request, context):
        if request.destination == "nowhere":
            fail(context, grpc.StatusCode.NOT_FOUND, "HOST_UNKNOWN", "there is no host nowhere in [peers]")
        self.snapshots = request.snapshots
        made = migration_pb2.Migration(
            name="m1", container=request.container, source="host-a", destination=request.destination
        )
        self.by_name["m1"] = made
        return migration_pb2.CreateMigrationResponse(migration=made)

    def GetMigration(self, request, context):
        return migration_pb2.GetMigrationResponse(migration=self.by_name[request.name])

    def ListMigrations(self, request, context):
        return migration_pb2.ListMigrationsResponse(migrations=self.by_name.values())

    def CancelMigration(self, request, context):
        self._cancelled.set()
        if self.by_name[request.name].destination == "late":
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "COMMITTED", "it was handed over")
        return migration_pb2.CancelMigrationResponse()

    def WatchMigration(self, request, context) -> Iterator[migration_pb2.WatchMigrationResponse]:
        found = self.by_name[request.name]
        for name in ("preflight", "precopy", "handover"):
            phase = found.phases.add(name=name, start_ms=10.0)
            yield migration_pb2.WatchMigrationResponse(migration=found)
            waits = {"slow": "precopy", "late": "handover", "gone": "precopy"}.get(found.destination)
            if waits == name:
                self.on_waiting()
                while not self._cancelled.wait(0.05):
                    if not context.is_active():
                        return
                if found.destination == "slow":
                    self._end(found, migration_pb2.OUTCOME_CANCELLED, "host-a", "CANCELLED", "cancelled", 130)
                    break
            phase.duration_ms = 12.5
            if found.destination == "full":
                self._end(found, migration_pb2.OUTCOME_REFUSED, "host-a", "NO_SPACE", "no room at full", 3)
                break
        else:
            if found.destination == "lost":
                self._end(found, migration_pb2.OUTCOME_UNCERTAIN, "", "UNCERTAIN", "no answer", 7)
            else:
                found.downtime_ms, found.bytes.memory = 143.25, 23 << 20
                self._end(found, migration_pb2.OUTCOME_MIGRATED, found.destination)
        yield migration_pb2.WatchMigrationResponse(migration=found)

    def _end(self, found, outcome, where: str, *failure: str | int) -> None:
        found.outcome, found.where_running = outcome, where
        if failure:
            found.reason, found.error, found.exit_code = failure
        found.total_ms = 1234.5


class FakeAgent:
    """Serves on a UNIX socket until it is closed."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.containers = Containers()
        self.images = Images()
        self.snapshots = Snapshots()
        self.migrations = Migrations()
        self._server = self._serve()

    def _serve(self) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(8))
        container_pb2_grpc.add_ContainerServiceServicer_to_server(self.containers, server)
        image_pb2_grpc.add_ImageServiceServicer_to_server(self.images, server)
        volume_pb2_grpc.add_VolumeServiceServicer_to_server(Volumes(), server)
        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(self.snapshots, server)
        host_pb2_grpc.add_HostServiceServicer_to_server(Hosts(), server)
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(self.migrations, server)
        server.add_insecure_port(f"unix:{self.socket}")
        server.start()
        return server

    def close(self) -> None:
        self._server.stop(None).wait(5)

    def start_again(self) -> None:
        self._server = self._serve()
