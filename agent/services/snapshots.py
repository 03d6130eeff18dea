"""SnapshotService: the snapshots of this host's containers."""

import grpc

from agent.snapshot_records import Snapshot
from agent.snapshots import Snapshots
from migrator.errors import Cancelled
from migrator.v1 import snapshot_pb2 as pb
from migrator.v1 import snapshot_pb2_grpc


class SnapshotService(snapshot_pb2_grpc.SnapshotServiceServicer):
    """See proto/migrator/v1/snapshot.proto."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.CreateSnapshotResponse:
        def check() -> None:
            if not context.is_active():
                raise Cancelled(f"the snapshot of {request.container} was not taken: the caller has left")

        snapshot, stood_still_s = self._snapshots.create(request.container, request.name, check)
        return pb.CreateSnapshotResponse(
            snapshot=self._describe(snapshot.container, snapshot.name), freeze_ms=stood_still_s * 1000
        )

    def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> pb.ListSnapshotsResponse:
        return pb.ListSnapshotsResponse(snapshots=self._all(request.container))

    def RollbackSnapshot(
        self, request: pb.RollbackSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.RollbackSnapshotResponse:
        snapshot = self._snapshots.rollback(request.container, request.name, force=request.force)
        return pb.RollbackSnapshotResponse(snapshot=self._describe(snapshot.container, snapshot.name))

    def DeleteSnapshot(
        self, request: pb.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSnapshotResponse:
        self._snapshots.delete(request.container, request.name)
        return pb.DeleteSnapshotResponse()

    def _describe(self, container: str, name: str) -> pb.Snapshot:
        return next(message for message in self._all(container) if message.name == name)

    def _all(self, container: str) -> list[pb.Snapshot]:
        found = self._snapshots.list(container)
        names = {snapshot.id: snapshot.name for snapshot in found}
        return [self._message(snapshot, names) for snapshot in found]

    def _message(self, snapshot: Snapshot, names: dict[str, str]) -> pb.Snapshot:
        message = pb.Snapshot(
            container=snapshot.container,
            name=snapshot.name,
            parent=names.get(snapshot.parent or "", ""),
            is_current=snapshot.is_current,
            volumes=snapshot.volumes,
        )
        message.create_time.FromMilliseconds(snapshot.create_time_ms)
        for volume, allocated_bytes in zip(message.volumes, self._snapshots.allocated_bytes(snapshot), strict=False):
            volume.allocated_bytes = allocated_bytes
        return message
