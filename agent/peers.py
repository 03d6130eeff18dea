"""Other hosts' agents, called over mutual TLS (`migrator.ports.Peer`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from agent.config import Config
from migrator import channel, status
from migrator.errors import NotFound
from migrator.handover import Incoming
from migrator.v1 import peer_pb2, peer_pb2_grpc

QUICK_S = 10.0
# A source that has something to say says it at once.
ASK_S = 2.0
# How often a waiting call looks whether it is still wanted.
CHECK_S = 0.02
# Preparing makes volumes and starts runc; restoring reads all images.
SLOW_S = 300.0
# A decision is asked again if it is not answered by then; the answer may already be on the other disk.
DECIDE_S = 60.0


class RemotePeer:
    """One destination during one migration; use as a context manager."""

    def __init__(self, config: Config, host: str) -> None:
        self.host = host
        self._channel = open_channel(config, host)
        self._stub = peer_pb2_grpc.PeerServiceStub(self._channel)
        self._check: Callable[[], None] = lambda: None

    def watch(self, check: Callable[[], None]) -> None:
        self._check = check

    def __enter__(self) -> "RemotePeer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def examine(self, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        with self._errors():
            answer: peer_pb2.ExamineResponse = self._stub.Examine(request, timeout=QUICK_S)
        return answer

    def prepare(self, request: peer_pb2.PrepareRequest) -> None:
        self._wait(self._stub.Prepare.future(request, timeout=SLOW_S))

    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None:
        """As long as pieces move there is no deadline; a dead peer is noticed by the channel's keepalive."""
        failure: list[BaseException] = []

        def watched() -> Iterator[peer_pb2.SendRequest]:
            try:
                yield from requests
            except BaseException as error:
                # grpc would only say that the stream broke.
                failure.append(error)
                raise

        try:
            self._wait(self._stub.Send.future(watched()))
        except Exception:
            if failure:
                raise failure[0] from None
            raise

    def hold_traffic(self, migration: str, epoch: int) -> None:
        request = peer_pb2.HoldTrafficRequest(migration=migration, epoch=epoch)
        self._wait(self._stub.HoldTraffic.future(request, timeout=QUICK_S))

    def restore(self, migration: str, epoch: int, digests: Mapping[str, bytes]) -> Sequence[peer_pb2.TimedStep]:
        request = peer_pb2.RestoreRequest(migration=migration, epoch=epoch, digests=digests)
        answer: peer_pb2.RestoreResponse = self._wait(self._stub.Restore.future(request, timeout=SLOW_S))
        return answer.steps

    def decide(self, migration: str, epoch: int, decision: peer_pb2.Decision) -> peer_pb2.DecideResponse:
        request = peer_pb2.DecideRequest(migration=migration, epoch=epoch, decision=decision)
        with self._errors():
            answer: peer_pb2.DecideResponse = self._stub.Decide(request, timeout=DECIDE_S)
        return answer

    def _wait(self, call: "grpc.Future[Any]") -> Any:
        """The answer; a cancelled or overdue migration does not wait for it."""
        with self._errors():
            while True:
                try:
                    return call.result(timeout=CHECK_S)
                except grpc.FutureTimeoutError:
                    try:
                        self._check()
                    except BaseException:
                        call.cancel()
                        raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise status.from_rpc(error, self.host) from error


def ask_source(config: Config, record: Incoming) -> peer_pb2.Decision:
    """What the source of an arrival has decided. Raises Unreachable if it does not answer."""
    request = peer_pb2.GetDecisionRequest(migration=record.migration, epoch=record.epoch)
    with open_channel(config, record.source) as connection:
        try:
            answer: peer_pb2.GetDecisionResponse = peer_pb2_grpc.PeerServiceStub(connection).GetDecision(
                request, timeout=ASK_S
            )
        except grpc.RpcError as error:
            raise status.from_rpc(error, record.source) from error
    return answer.decision


def open_channel(config: Config, host: str) -> grpc.Channel:
    """A channel to a configured peer, which must prove to be that host. Raises NotFound for an unknown name."""
    address = config.peers.get(host)
    if address is None:
        known = ", ".join(sorted(config.peers)) or "none"
        raise NotFound(
            f"{host} is not among this host's peers ({known}): see [peers] in the configuration", reason="UNKNOWN_HOST"
        )
    return channel.connect(address, name=host, tls=config.tls)
