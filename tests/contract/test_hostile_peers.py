"""An agent's PeerService in a process of its own, before callers who have no right to what they ask, and a fuzzer.

The service is that of `scripts/fuzz-peer`, which sends far more messages than there is time for here.
"""

import datetime
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fuzzkit.fuzz import Server, fuzz
from fuzzkit.messages import prepare
from fuzzkit.server import HOST, PEERS, STRANGER
from migrator import certificates, channel, status
from migrator.channel import Tls
from migrator.errors import MigratorError, NotFound, PermissionDenied, Unreachable
from migrator.v1 import migration_pb2, migration_pb2_grpc, peer_pb2, peer_pb2_grpc

OWNER, OTHER = PEERS
CALL_S = 5.0
PREPARED = prepare(random.Random(0), "m-1", "ct", 1)
Peer = peer_pb2_grpc.PeerServiceStub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        with made.connected(OWNER) as connection:
            Peer(connection).Prepare(PREPARED, timeout=CALL_S)
        yield made
    finally:
        made.close()


def refusal(call: Callable[[], Any]) -> MigratorError:
    """What a call is refused with."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return status.from_rpc(raised.value, HOST)


def audited(server: Server, wanted: dict[str, str]) -> bool:
    """Whether there is such a line in the audit log, soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if any(wanted.items() <= line.items() for line in server.audited()):
            return True
        time.sleep(0.02)
    return False


ABOUT: dict[str, Any] = {"migration": "m-1", "epoch": 1}
QUESTIONS: list[tuple[str, Any]] = [
    ("KeepSnapshots", peer_pb2.KeepSnapshotsRequest(**ABOUT)),
    ("HoldTraffic", peer_pb2.HoldTrafficRequest(**ABOUT)),
    ("Restore", peer_pb2.RestoreRequest(**ABOUT)),
    ("Decide", peer_pb2.DecideRequest(**ABOUT, decision=peer_pb2.DECISION_ABORTED)),
    ("GetDecision", peer_pb2.GetDecisionRequest(**ABOUT)),
    ("GetArrival", peer_pb2.GetArrivalRequest(**ABOUT)),
    ("DigestVolume", peer_pb2.DigestVolumeRequest(**ABOUT, target="volume/0", chunk_bytes=1 << 20)),
    ("Send", peer_pb2.SendRequest(**ABOUT, stream=1)),
]


def ask(connection: grpc.Channel, method: str, request: Any) -> Any:
    call = getattr(Peer(connection), method)
    if method == "Send":
        return list(call(iter([request]), timeout=CALL_S))
    return list(call(request, timeout=CALL_S)) if method == "DigestVolume" else call(request, timeout=CALL_S)


@pytest.mark.parametrize(("method", "request_"), QUESTIONS, ids=[name for name, _ in QUESTIONS])
def test_anothers_migration_is_not_found(server: Server, method: str, request_: Any) -> None:
    with server.connected(OTHER) as connection:
        error = refusal(lambda: ask(connection, method, request_))
    assert isinstance(error, NotFound)
    line = {"who": OTHER, "role": "peer", "method": method, "migration": "m-1", "outcome": "MIGRATION_NOT_FOUND"}
    assert audited(server, line)
    with server.connected(OWNER) as connection:
        ask(connection, "HoldTraffic", peer_pb2.HoldTrafficRequest(**ABOUT))  # it is as it was


@pytest.mark.parametrize(("method", "request_"), [("Prepare", PREPARED), ("Examine", peer_pb2.ExamineRequest())])
def test_a_host_that_is_no_peer_here(server: Server, method: str, request_: Any) -> None:
    with server.connected(STRANGER) as connection:
        assert isinstance(refusal(lambda: ask(connection, method, request_)), PermissionDenied)
    assert audited(server, {"who": STRANGER, "role": "peer", "method": method, "outcome": "PERMISSION_DENIED"})


@pytest.mark.parametrize("name", [OWNER, "viewer"])
def test_only_an_operator_creates(server: Server, name: str) -> None:
    role = "viewer" if name == "viewer" else "peer"
    with server.connected(name) as connection:
        create = migration_pb2_grpc.MigrationServiceStub(connection).CreateMigration
        request = migration_pb2.CreateMigrationRequest(container="ct", destination="host-b")
        assert isinstance(refusal(lambda: create(request, timeout=CALL_S)), PermissionDenied)
    line = {"who": name, "role": role, "method": "CreateMigration", "container": "ct", "outcome": "PERMISSION_DENIED"}
    assert audited(server, line)


@pytest.mark.parametrize("name", ["operator", "viewer"])
def test_only_a_peer_is_a_peer(server: Server, name: str) -> None:
    with server.connected(name) as connection:
        for method, request in QUESTIONS:
            assert isinstance(refusal(lambda m=method, r=request: ask(connection, m, r)), PermissionDenied)  # type: ignore[misc]
            assert audited(server, {"who": name, "role": name, "method": method, "outcome": "PERMISSION_DENIED"})


def turned_away(server: Server, tls: Tls) -> None:
    with channel.connect(f"127.0.0.1:{server.port}", name=HOST, tls=tls) as connection:
        error = refusal(lambda: Peer(connection).Examine(peer_pb2.ExamineRequest(), timeout=CALL_S))
    assert isinstance(error, Unreachable)


def test_a_foreign_certificate(server: Server, tmp_path: Path) -> None:
    certificates.init(tmp_path)
    foreign = certificates.issue(tmp_path, OWNER, "peer")
    turned_away(server, Tls(server.folder / "ca/ca.crt", foreign.certificate, foreign.key))
    why = "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"
    assert audited(server, {"who": "unknown", "method": "handshake", "outcome": why})


def test_an_expired_certificate(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = certificates._builder
    monkeypatch.setattr(certificates, "BACKDATE", datetime.timedelta(days=10))
    monkeypatch.setattr(certificates, "_builder", lambda subject, issuer, key, days: builder(subject, issuer, key, -1))
    old = certificates.issue(server.folder / "ca", "host-old", "peer")
    turned_away(server, Tls(server.folder / "ca/ca.crt", old.certificate, old.key))
    why = "CERTIFICATE_VERIFY_FAILED: certificate has expired"
    assert audited(server, {"who": "unknown", "method": "handshake", "outcome": why})


def test_one_caller_cannot_take_all_threads(server: Server) -> None:
    """Streams that say nothing each hold one. Others are served, and so is this one when they have ended."""
    with server.connected(OTHER) as connection, server.connected(OWNER) as owner:
        streams = [Peer(connection).Send(_silence(), timeout=CALL_S) for _ in range(90)]
        deadline = time.monotonic() + CALL_S
        busy = {"who": OTHER, "method": "Send", "outcome": "BUSY"}
        assert audited(server, busy)
        ask(owner, "HoldTraffic", peer_pb2.HoldTrafficRequest(**ABOUT))
        assert time.monotonic() < deadline
        for stream in streams:
            stream.cancel()
        question = peer_pb2.GetDecisionRequest(migration="m-none", epoch=1)
        while refusal(lambda: ask(connection, "GetDecision", question)).reason == "BUSY":
            assert time.monotonic() < deadline + 20
            time.sleep(0.02)


def _silence() -> Iterator[peer_pb2.SendRequest]:
    time.sleep(CALL_S)
    yield from ()


def test_a_stream_that_does_not_end_keeps_nothing(server: Server) -> None:
    """The migration is over when its source says so on another connection."""
    request = prepare(random.Random(1), "m-held", "held", 1)
    about: dict[str, Any] = {"migration": "m-held", "epoch": 1}

    def open_end() -> Iterator[peer_pb2.SendRequest]:
        yield peer_pb2.SendRequest(**about, stream=1)
        time.sleep(60)

    with server.connected(OWNER) as connection, server.connected(OWNER) as other:
        ask(connection, "Prepare", request)
        stream = Peer(connection).Send(open_end())
        next(stream)
        aborted = peer_pb2.DecideRequest(**about, decision=peer_pb2.DECISION_ABORTED)
        ask(other, "Decide", aborted)
        with pytest.raises(grpc.RpcError):
            list(stream)
        ask(other, "Prepare", prepare(random.Random(1), "m-next", "held", 2))
        ask(other, "Decide", peer_pb2.DecideRequest(migration="m-next", epoch=2, decision=peer_pb2.DECISION_ABORTED))


@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_and_untimely_messages(tmp_path: Path, seed: int) -> None:
    report = fuzz(tmp_path, 1000, seed)
    assert report.wrong == []
    assert report.messages >= 1000
    assert {outcome.partition(" ")[0] for outcome in report.answers} >= {"Prepare", "Send", "Restore", "Decide"}
