"""Other hosts' agents, called over mutual TLS (`migrator.ports.Peer`)."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import grpc
import structlog

from agent.config import Config
from migrator import channel, priority, status, wire
from migrator.errors import MigratorError, NotFound, Unreachable
from migrator.handover import Incoming, Outgoing
from migrator.network import Neighbour
from migrator.numbered import Outbound
from migrator.v1 import peer_pb2, peer_pb2_grpc

QUICK_S = 10.0
# A source that has something to say says it at once.
ASK_S = 2.0
# Nothing waits for it yet; less than `examine` is waited for.
PROBE_S = 5.0
# How often a waiting call looks whether it is still wanted.
CHECK_S = 0.02
# Preparing makes volumes and starts runc; restoring reads all images.
SLOW_S = 300.0
# A decision is asked again if it is not answered by then; the answer may already be on the other disk.
DECIDE_S = 60.0

# A destination that is gone for longer has given the migration up (migrator.destination.GIVE_UP_S).
RESUME_S = 25.0
RETRY_S = 0.5

log = structlog.get_logger()


class _Patience:
    """How long a connection that breaks again and again is waited for: anew whenever something has come by it."""

    def __init__(self) -> None:
        self._progress = -1
        self._until = 0.0

    def is_over(self, progress: int) -> bool:
        """To be asked when it has broken. `progress` counts what has come in all."""
        now = time.monotonic()
        if progress != self._progress:
            self._progress, self._until = progress, now + RESUME_S
        return now > self._until


class RemotePeer:
    """One destination during one migration; use as a context manager."""

    def __init__(self, config: Config, host: str) -> None:
        self.host = host
        self._channel = open_channel(config, host)
        self._stub = peer_pb2_grpc.PeerServiceStub(self._channel)
        # For what a container waits for: a connection of its own, whose death ends every other call, too.
        self._pulse = open_channel(config, host, urgent=True)
        self._urgent = peer_pb2_grpc.PeerServiceStub(self._pulse)
        self._pulse_state = grpc.ChannelConnectivity.IDLE
        self._pulse.subscribe(self._note_pulse)
        self._is_urgent = False
        self._check: Callable[[], None] = lambda: None
        self._streams = itertools.count(1)

    def watch(self, check: Callable[[], None]) -> None:
        self._check = check

    def __enter__(self) -> "RemotePeer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pulse.unsubscribe(self._note_pulse)
        self._pulse.close()
        self._channel.close()

    def _note_pulse(self, state: grpc.ChannelConnectivity) -> None:
        self._pulse_state = state

    def examine(self, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        with self._errors():
            # By this one, so that it is connected long before it matters.
            answer: peer_pb2.ExamineResponse = self._urgent.Examine(request, timeout=QUICK_S)
        return answer

    def queue(self, migration: str, waited_s: float, *, leave: bool = False) -> int:
        request = peer_pb2.QueueRequest(migration=migration, waited_ms=int(waited_s * 1000), leave=leave)
        with self._errors():
            answer: peer_pb2.QueueResponse = self._urgent.Queue(request, timeout=QUICK_S)
        return max(0, answer.position)

    def prepare(self, request: peer_pb2.PrepareRequest) -> peer_pb2.PrepareResponse:
        answer: peer_pb2.PrepareResponse = self._wait(self._stub.Prepare.future(request, timeout=SLOW_S))
        return answer

    def keep_snapshots(self, migration: str, epoch: int) -> None:
        request = peer_pb2.KeepSnapshotsRequest(migration=migration, epoch=epoch)
        self._wait(self._stub.KeepSnapshots.future(request, timeout=SLOW_S))

    def digest_volume(
        self, migration: str, epoch: int, target: str, chunk_bytes: int
    ) -> Iterator[peer_pb2.DigestVolumeResponse]:
        """As long as the peer reads there is no deadline. A broken connection is waited for as by `send`."""
        request = peer_pb2.DigestVolumeRequest(migration=migration, epoch=epoch, target=target, chunk_bytes=chunk_bytes)
        given, patience = 0, _Patience()
        while True:
            try:
                # Nothing changes what is read: the same answers come again.
                for answer in itertools.islice(self._digests(request), given, None):
                    given += 1
                    yield answer
                return
            except Unreachable as error:
                if self._is_urgent or patience.is_over(given):
                    raise
                log.warning("digests broke off; they are asked for again", peer=self.host, why=str(error))
                self._sleep(RETRY_S)

    def _digests(self, request: peer_pb2.DigestVolumeRequest) -> Iterator[peer_pb2.DigestVolumeResponse]:
        call = self._stub.DigestVolume(request)
        # None at the end. A peer may read for minutes without an answer, while a container waits or an operator does.
        answers: queue.SimpleQueue[peer_pb2.DigestVolumeResponse | BaseException | None] = queue.SimpleQueue()

        def listen() -> None:
            try:
                for answer in call:
                    answers.put(answer)
            except BaseException as error:
                answers.put(error)
            answers.put(None)

        threading.Thread(target=listen, name="digests", daemon=True).start()
        with self._errors():
            try:
                while True:
                    try:
                        answer = answers.get(timeout=CHECK_S)
                    except queue.Empty:
                        self._check()
                        self._feel_pulse()
                        continue
                    if answer is None:
                        return
                    if isinstance(answer, BaseException):
                        raise answer
                    self._check()
                    yield answer
            finally:
                call.cancel()

    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None:
        """As long as pieces move there is no deadline; a dead peer is noticed by the channel's keepalive.

        While no container waits, a broken connection is waited for, and the stream goes on where it was.
        """
        with closing(Outbound(next(self._streams), requests)) as stream:
            patience = _Patience()
            while True:
                try:
                    self._attempt(stream)
                    return
                except Unreachable as error:
                    stream.check()
                    if self._is_urgent or patience.is_over(stream.confirmed):
                        raise
                    log.warning("a stream broke; it goes on when there is a connection", peer=self.host, why=str(error))
                    self._sleep(RETRY_S)

    def _in_turn(self, requests: Iterator[peer_pb2.SendRequest]) -> Iterator[peer_pb2.SendRequest]:
        """Not the whole thread: those that gRPC starts in it stay, and would stay behind."""
        while True:
            with nullcontext() if self._is_urgent else priority.behind_containers():
                request = next(requests, None)
            if request is None:
                return
            yield request

    def _attempt(self, stream: Outbound) -> None:
        failure: list[BaseException] = []
        call = self._stub.Send(self._in_turn(stream.attempt()))

        def listen() -> None:
            try:
                for answer in call:
                    stream.answered(answer)
            except BaseException as error:
                failure.append(error)
                call.cancel()

        listener = threading.Thread(target=listen, name="send-answers", daemon=True)
        listener.start()
        with self._errors():
            try:
                while listener.is_alive():
                    listener.join(CHECK_S)
                    self._check()
                    self._feel_pulse()
            except BaseException:
                call.cancel()
                raise
            stream.check()
            if failure:
                raise failure[0]
            stream.check_complete()

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._check()
            time.sleep(CHECK_S)

    def hold_traffic(self, migration: str, epoch: int, neighbours: Sequence[Neighbour]) -> None:
        known = [peer_pb2.Neighbour(interface=n.interface, address=n.address, mac=n.mac) for n in neighbours]
        request = peer_pb2.HoldTrafficRequest(migration=migration, epoch=epoch, neighbours=known)
        self._wait(self._urgent.HoldTraffic.future(request, timeout=QUICK_S))
        self._is_urgent = True

    def restore(self, migration: str, epoch: int, digests: Mapping[str, bytes]) -> Sequence[peer_pb2.TimedStep]:
        request = peer_pb2.RestoreRequest(migration=migration, epoch=epoch, digests=digests)
        answer: peer_pb2.RestoreResponse = self._wait(self._urgent.Restore.future(request, timeout=SLOW_S))
        return wire.plausible_steps(answer.steps)

    def stage(self, migration: str, epoch: int) -> peer_pb2.ArrivalStage:
        request = peer_pb2.GetArrivalRequest(migration=migration, epoch=epoch)
        with self._errors():
            answer: peer_pb2.GetArrivalResponse = self._urgent.GetArrival(request, timeout=QUICK_S)
        return answer.stage

    def decide(self, migration: str, epoch: int, decision: peer_pb2.Decision) -> peer_pb2.DecideResponse:
        request = peer_pb2.DecideRequest(migration=migration, epoch=epoch, decision=decision)
        with self._errors():
            answer: peer_pb2.DecideResponse = self._urgent.Decide(request, timeout=DECIDE_S)
        return peer_pb2.DecideResponse(
            ownership=answer.ownership,
            resume_ms=wire.plausible_ms(answer.resume_ms),
            total_ms=wire.plausible_ms(answer.total_ms),
            steps=wire.plausible_steps(answer.steps),
            refusal=answer.refusal[: wire.LONGEST_REASON],
            missing_bytes=max(0, answer.missing_bytes),
        )

    def _wait(self, call: "grpc.Future[Any]") -> Any:
        """The answer; a cancelled or overdue migration does not wait for it."""
        with self._errors():
            while True:
                try:
                    return call.result(timeout=CHECK_S)
                except grpc.FutureTimeoutError:
                    try:
                        self._check()
                        self._feel_pulse()
                    except BaseException:
                        call.cancel()
                        raise

    def _feel_pulse(self) -> None:
        if self._is_urgent and self._pulse_state is not grpc.ChannelConnectivity.READY:
            raise Unreachable(f"the agent of {self.host} has gone silent; the container could not wait for it")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise status.from_rpc(error, self.host) from error
        except grpc.FutureCancelledError as error:
            raise Unreachable(f"the agent of {self.host} broke the call off: is it stopping?") from error


def ask_destination(config: Config, record: Outgoing) -> peer_pb2.ArrivalStage:
    """How far the destination is. Raises Unreachable if it does not answer."""
    with RemotePeer(config, record.destination) as peer:
        return peer.stage(record.migration, record.epoch)


class UnknownPeer:
    """A destination that the configuration does not name any more: it is as one that does not answer."""

    def __init__(self, host: str, error: NotFound) -> None:
        self.host = host
        self._error = error

    def stage(self, migration: str, epoch: int) -> peer_pb2.ArrivalStage:
        raise self._error

    def decide(self, migration: str, epoch: int, decision: peer_pb2.Decision) -> peer_pb2.DecideResponse:
        raise self._error


class PulledMemory:
    """A stream of memory from the source of an arrival (`migrator.postcopy.Lent`)."""

    def __init__(self, config: Config, record: Incoming, requests: Iterator[peer_pb2.PullMemoryRequest]) -> None:
        self._source = record.source
        self._channel = open_channel(config, record.source)
        self._call = peer_pb2_grpc.PeerServiceStub(self._channel).PullMemory(requests)

    def __iter__(self) -> Iterator[peer_pb2.PullMemoryResponse]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise status.from_rpc(error, self._source) from error

    def close(self) -> None:
        self._call.cancel()
        self._channel.close()


def ask_source(config: Config, record: Incoming, timeout_s: float = ASK_S) -> peer_pb2.Decision:
    """What the source of an arrival has decided. Raises Unreachable if it does not answer."""
    request = peer_pb2.GetDecisionRequest(migration=record.migration, epoch=record.epoch)
    with open_channel(config, record.source) as connection:
        try:
            answer: peer_pb2.GetDecisionResponse = peer_pb2_grpc.PeerServiceStub(connection).GetDecision(
                request, timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise status.from_rpc(error, record.source) from error
    return answer.decision


def why_silent(config: Config, source: str) -> str:
    """Why a source cannot be asked from here, by a question about no migration at all; empty if it can."""
    try:
        ask_source(config, Incoming(migration="", container="", source=source, epoch=0), PROBE_S)
    except MigratorError as error:
        return "" if error.reason == "MIGRATION_NOT_FOUND" else str(error)
    return ""


def open_channel(config: Config, host: str, *, urgent: bool = False) -> grpc.Channel:
    """A channel to a configured peer, which must prove to be that host. Raises NotFound for an unknown name."""
    address = config.peers.get(host)
    if address is None:
        known = ", ".join(sorted(config.peers)) or "none"
        raise NotFound(
            f"{host} is not among this host's peers ({known}): see [peers] in the configuration", reason="UNKNOWN_HOST"
        )
    return channel.connect(address, name=host, tls=config.tls, urgent=urgent)
