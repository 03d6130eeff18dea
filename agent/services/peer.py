"""PeerService: what the source of a migration asks of this host, and what a destination asks of this source.

Who asks is taken from the certificate: a message about somebody else's migration finds none.
"""

from collections.abc import Collection, Iterator, Mapping

import grpc

from agent.auth import caller_host
from agent.migrations import Migrations
from agent.neighbours import NEIGHBOURS_MAX
from migrator.arrivals import Arrivals
from migrator.errors import InvalidArgument, PeerError, PermissionDenied
from migrator.handover import Stage
from migrator.network import Neighbour
from migrator.ports import ArrivalHost
from migrator.v1 import peer_pb2, peer_pb2_grpc

STAGES = {
    Stage.PREPARED: peer_pb2.ARRIVAL_STAGE_PREPARED,
    Stage.READY: peer_pb2.ARRIVAL_STAGE_READY,
    Stage.OWNER: peer_pb2.ARRIVAL_STAGE_OWNER,
    Stage.REFUSED: peer_pb2.ARRIVAL_STAGE_REFUSED,
}


class PeerService(peer_pb2_grpc.PeerServiceServicer):
    """See proto/migrator/v1/peer.proto."""

    def __init__(self, host: ArrivalHost, arrivals: Arrivals, migrations: Migrations, peers: Collection[str]) -> None:
        """`peers` are the names of the hosts that containers may come from and go to."""
        self._peers = peers
        self._host = host
        self._arrivals = arrivals
        self._migrations = migrations

    def Examine(self, request: peer_pb2.ExamineRequest, context: grpc.ServicerContext) -> peer_pb2.ExamineResponse:
        return self._host.examine(self._peer(context), request)

    def Queue(self, request: peer_pb2.QueueRequest, context: grpc.ServicerContext) -> peer_pb2.QueueResponse:
        return peer_pb2.QueueResponse(position=self._arrivals.queue(self._peer(context), request))

    def Prepare(self, request: peer_pb2.PrepareRequest, context: grpc.ServicerContext) -> peer_pb2.PrepareResponse:
        return self._arrivals.prepare(self._peer(context), request)

    def Send(
        self, request_iterator: Iterator[peer_pb2.SendRequest], context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.SendResponse]:
        source = self._peer(context)
        try:
            first = next(request_iterator, None)
            if first is None:
                return
            arrival = self._arrivals.get(source, first.migration, first.epoch)
            # A migration that is over does not wait for a source that neither sends nor ends.
            with arrival.cutting(context.cancel):
                yield from arrival.send(request_iterator, first)
        except grpc.RpcError as error:
            raise PeerError("the source broke off its stream", reason="STREAM_BROKEN") from error

    def KeepSnapshots(
        self, request: peer_pb2.KeepSnapshotsRequest, context: grpc.ServicerContext
    ) -> peer_pb2.KeepSnapshotsResponse:
        self._arrivals.get(self._peer(context), request.migration, request.epoch).keep_snapshots()
        return peer_pb2.KeepSnapshotsResponse()

    def DigestVolume(
        self, request: peer_pb2.DigestVolumeRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.DigestVolumeResponse]:
        arrival = self._arrivals.get(self._peer(context), request.migration, request.epoch)
        with arrival.cutting(context.cancel):
            yield from arrival.digest(request.target, request.chunk_bytes)

    def HoldTraffic(
        self, request: peer_pb2.HoldTrafficRequest, context: grpc.ServicerContext
    ) -> peer_pb2.HoldTrafficResponse:
        if len(request.neighbours) > NEIGHBOURS_MAX:
            raise InvalidArgument(f"{len(request.neighbours)} neighbours, and no more than {NEIGHBOURS_MAX} may travel")
        neighbours = [Neighbour(known.interface, known.address, known.mac) for known in request.neighbours]
        self._arrivals.get(self._peer(context), request.migration, request.epoch).hold_traffic(neighbours)
        return peer_pb2.HoldTrafficResponse()

    def Restore(self, request: peer_pb2.RestoreRequest, context: grpc.ServicerContext) -> peer_pb2.RestoreResponse:
        arrival = self._arrivals.get(self._peer(context), request.migration, request.epoch)
        return peer_pb2.RestoreResponse(steps=_timed(arrival.restore(request.digests)))

    def Decide(self, request: peer_pb2.DecideRequest, context: grpc.ServicerContext) -> peer_pb2.DecideResponse:
        return self._arrivals.decide(self._peer(context), request)

    def GetDecision(
        self, request: peer_pb2.GetDecisionRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GetDecisionResponse:
        decision = self._migrations.decision(request.migration, request.epoch, self._peer(context))
        return peer_pb2.GetDecisionResponse(decision=decision)

    def GetArrival(
        self, request: peer_pb2.GetArrivalRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GetArrivalResponse:
        stage = self._arrivals.stage(self._peer(context), request.migration, request.epoch)
        return peer_pb2.GetArrivalResponse(stage=STAGES[stage])

    def PullMemory(
        self, request_iterator: Iterator[peer_pb2.PullMemoryRequest], context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.PullMemoryResponse]:
        try:
            yield from self._migrations.lend(self._peer(context), request_iterator)
        except grpc.RpcError as error:
            raise PeerError("the destination broke off its stream", reason="STREAM_BROKEN") from error

    def _peer(self, context: grpc.ServicerContext) -> str:
        """The host that calls. Raises PermissionDenied, also for one that this host's configuration does not name."""
        name = caller_host(context)
        if name not in self._peers:
            raise PermissionDenied(f"{name} is not among this host's peers: see [peers] in its configuration")
        return name


def _timed(steps: Mapping[str, float]) -> list[peer_pb2.TimedStep]:
    return [peer_pb2.TimedStep(name=name, duration_ms=milliseconds) for name, milliseconds in steps.items()]
