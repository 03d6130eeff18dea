"""A hostile peer: it has a certificate, and says whatever it likes, in any order, on several connections at once."""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from fuzzkit import messages
from fuzzkit.server import HOST, LOG, PEERS, STRANGER, make_certificates
from migrator import channel, status
from migrator.channel import Tls
from migrator.errors import MigratorError
from migrator.v1 import peer_pb2, peer_pb2_grpc

SERVICE = "/migrator.v1.PeerService/"
WORKERS = 4
CALL_S = 20.0
RECONNECT_S, PATIENCE_S = 0.1, 30.0
START_S = 30.0
# Migrations of one worker that are under way; the longest of its streams.
MOST_ARRIVALS = 4
LONGEST_STREAM = 24
# What Python and gRPC may take more in the end than after a quarter of the messages.
GROWTH_BYTES = 48 << 20
SCRIPTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Usage:
    """Of the server's process."""

    memory_bytes: int
    files: int
    threads: int


@dataclass
class Report:
    """What was sent, how it was answered, and what must not have been."""

    messages: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    early: Usage | None = None
    late: Usage | None = None


class Server:
    """`fuzzkit.server` as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_certificates(folder)
        self.before = _files(folder)
        paths = [str(SCRIPTS), str(SCRIPTS.parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzzkit.server", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(paths), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(START_S)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def usage(self) -> Usage:
        proc = Path(f"/proc/{self._process.pid}")
        facts = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Usage(int(facts["VmRSS"].split()[0]) << 10, len(list((proc / "fd").iterdir())), int(facts["Threads"]))

    @contextmanager
    def connected(self, name: str) -> Iterator[grpc.Channel]:
        """As the owner of a certificate."""
        ca = self.folder / "ca"
        tls = Tls(ca / "ca.crt", ca / f"{name}.crt", ca / f"{name}.key")
        with channel.connect(f"127.0.0.1:{self.port}", name=HOST, tls=tls) as connection:
            yield connection

    def unexpected(self) -> list[str]:
        """What the server has logged of failures that nobody had thought of."""
        lines = [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]
        return [
            f"{line['method']}: {line.get('exception', line.get('error', ''))}"
            for line in lines
            if line["event"] == "call failed unexpectedly"
        ]

    def audited(self) -> list[dict[str, str]]:
        """The audit log."""
        lines = [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]
        return [line for line in lines if line["event"] == "call"]


@dataclass
class _Arrival:
    migration: str
    container: str
    epoch: int
    received: dict[int, int] = field(default_factory=dict)


class Worker:
    """One thread of the peer's, with migrations of its own."""

    def __init__(self, server: Server, number: int, seed: int, report: Report, lock: threading.Lock) -> None:
        self._server = server
        self._number = number
        self._chance = random.Random(seed * 1000 + number)
        self._report = report
        self._lock = lock
        self._made = self._sent = 0
        self._arrivals: list[_Arrival] = []
        self._stubs: dict[str, peer_pb2_grpc.PeerServiceStub] = {}
        self._channels: dict[str, grpc.Channel] = {}

    def run(self, count: int) -> None:
        """At least so many messages."""
        names = (*PEERS, STRANGER)
        with ExitStack() as stack:
            self._channels = {name: stack.enter_context(self._server.connected(name)) for name in names}
            self._stubs = {name: peer_pb2_grpc.PeerServiceStub(each) for name, each in self._channels.items()}
            while self._sent < count and self._server.is_alive():
                self._one()
            while self._arrivals:
                self._end(self._arrivals.pop())

    def _one(self) -> None:
        """One call, or a few that belong together."""
        chance = self._chance
        actions: list[tuple[int, Callable[[], None]]] = [
            (5, self._prepare),
            (8, self._send),
            (5, self._ask),
            (2, self._ask_garbage),
            (1, self._end_one),
            (1, self._hand_over),
        ]
        (action,) = chance.choices([action for _, action in actions], [weight for weight, _ in actions])
        action()

    def _caller(self) -> str:
        return self._chance.choices((*PEERS, STRANGER), [20, 3, 1])[0]

    def _prepare(self) -> None:
        if len(self._arrivals) >= MOST_ARRIVALS:
            self._end_one()
            return
        chance = self._chance
        self._made += 1
        arrival = _Arrival(f"m-{self._number}-{self._made}", f"ct{self._number}-{self._made % 50}", self._made)
        request = messages.prepare(chance, arrival.migration, arrival.container, arrival.epoch)
        caller = PEERS[0]
        if chance.random() < 0.5:
            messages.mutated(chance, request)
            caller = self._caller()
        if self._call(caller, "Prepare", request) == "OK":
            self._arrivals.append(
                _Arrival(request.migration, request.container, request.epoch) if caller == PEERS[0] else arrival
            )
            if caller != PEERS[0]:
                # It is the other peer's then, who ends it.
                self._arrivals.pop()
                self._decide(caller, request.migration, request.epoch, peer_pb2.DECISION_ABORTED)

    def _some(self) -> _Arrival:
        if self._arrivals and self._chance.random() < 0.95:
            return self._chance.choice(self._arrivals)
        return _Arrival("m-none", "ct", 1)

    def _send(self) -> None:
        chance, arrival = self._chance, self._some()
        stream = chance.randrange(1, 5)
        at = arrival.received.get(stream, 0)
        made: list[bytes] = []
        in_turn = True
        for number in range(1, chance.randrange(2, LONGEST_STREAM)):
            request = messages.piece(chance, arrival.migration, arrival.epoch, stream, at + number)
            whole = request.SerializeToString()
            if chance.random() < 0.12:
                whole = messages.mutated(chance, request).SerializeToString()
                in_turn = False
            if chance.random() < 0.03:
                whole = messages.garbage(chance, request)
                in_turn = False
            if len(whole) < channel.MESSAGE_BYTES:
                made.append(whole)
        call = self._channels[self._caller()].stream_stream(
            f"{SERVICE}Send",
            request_serializer=lambda data: data,
            response_deserializer=peer_pb2.SendResponse.FromString,
        )
        outcome, last = "OK", at
        answers: Any = call(iter(made), timeout=CALL_S)
        try:
            if chance.random() < 0.05:
                time.sleep(0.002)
                answers.cancel()
            for answer in answers:
                last = answer.received
        except grpc.RpcError as error:
            outcome = self._outcome(error)
        # What a broken stream has stored it says only when it is asked.
        if outcome == "OK" and in_turn:
            arrival.received[stream] = last
        else:
            arrival.received.pop(stream, None)
            self._resume(arrival, stream)
        self._note("Send", outcome, len(made))

    def _resume(self, arrival: _Arrival, stream: int) -> None:
        request = peer_pb2.SendRequest(migration=arrival.migration, epoch=arrival.epoch, stream=stream)
        try:
            for answer in self._stubs[PEERS[0]].Send(iter([request]), timeout=CALL_S):
                arrival.received[stream] = answer.received
        except grpc.RpcError as error:
            self._note("Send", self._outcome(error), 1)
        else:
            self._note("Send", "OK", 1)

    def _question(self, about: _Arrival | None = None) -> tuple[str, Message]:
        chance, arrival = self._chance, about or self._some()
        name, epoch = arrival.migration, arrival.epoch
        neighbour = peer_pb2.Neighbour(interface="eth0", address="10.77.0.1", mac="02:00:00:00:00:09")
        digests = {"volume/0": chance.randbytes(16)} if chance.random() < 0.7 else {}
        choices: list[tuple[str, Message]] = [
            ("Examine", peer_pb2.ExamineRequest(container="ct", spec=messages.spec(chance), disk_bytes=1 << 30)),
            ("Queue", peer_pb2.QueueRequest(migration=name, waited_ms=chance.randrange(10_000))),
            ("KeepSnapshots", peer_pb2.KeepSnapshotsRequest(migration=name, epoch=epoch)),
            (
                "DigestVolume",
                peer_pb2.DigestVolumeRequest(migration=name, epoch=epoch, target="volume/0", chunk_bytes=1 << 20),
            ),
            ("HoldTraffic", peer_pb2.HoldTrafficRequest(migration=name, epoch=epoch, neighbours=[neighbour])),
            ("Restore", peer_pb2.RestoreRequest(migration=name, epoch=epoch, digests=digests)),
            ("Decide", peer_pb2.DecideRequest(migration=name, epoch=epoch, decision=peer_pb2.DECISION_RELEASED)),
            ("GetDecision", peer_pb2.GetDecisionRequest(migration=name, epoch=epoch)),
            ("GetArrival", peer_pb2.GetArrivalRequest(migration=name, epoch=epoch)),
            ("PullMemory", peer_pb2.PullMemoryRequest(migration=name, epoch=epoch, pid=7, ranges=[4096, 4096])),
        ]
        return chance.choices(choices, [2, 2, 2, 2, 2, 2, 1, 2, 2, 2])[0]

    def _ask(self) -> None:
        method, request = self._question()
        if self._chance.random() < 0.6:
            messages.mutated(self._chance, request)
        self._call(self._caller(), method, request)

    def _ask_garbage(self) -> None:
        method, request = self._question()
        content = messages.garbage(self._chance, request)
        connection = self._channels[self._caller()]
        kinds = {"DigestVolume": connection.unary_stream, "PullMemory": connection.stream_stream}
        make: Any = kinds.get(method, connection.unary_unary)
        call = make(f"{SERVICE}{method}")
        try:
            answer = call(iter([content]) if method == "PullMemory" else content, timeout=CALL_S)
            if method in kinds:
                list(answer)
            outcome = "OK"
        except grpc.RpcError as error:
            outcome = self._outcome(error)
        self._note(method, outcome, 1)

    def _end_one(self) -> None:
        if self._arrivals:
            self._end(self._arrivals.pop(self._chance.randrange(len(self._arrivals))))

    def _end(self, arrival: _Arrival) -> None:
        decision = self._chance.choice([peer_pb2.DECISION_ABORTED, peer_pb2.DECISION_RELEASED])
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._decide(PEERS[0], arrival.migration, arrival.epoch, decision) != "UNREACHABLE":
                break

    def _hand_over(self) -> None:
        """One that comes as far as it can, with untimely messages about it all the time."""
        chance = self._chance
        self._made += 1
        name, epoch = f"m-{self._number}-{self._made}", self._made
        arrival = _Arrival(name, f"ct{self._number}-{self._made % 50}", epoch)
        if self._call(PEERS[0], "Prepare", messages.prepare(chance, name, arrival.container, epoch)) != "OK":
            return
        self._call(PEERS[0], "Restore", peer_pb2.RestoreRequest(migration=name, epoch=epoch))
        decisions = [peer_pb2.DECISION_RELEASED, peer_pb2.DECISION_ABORTED, peer_pb2.DECISION_RELEASED]
        for decision in decisions[chance.randrange(2) :]:
            method, request = self._question(arrival)
            if method != "Decide":
                self._call(PEERS[0], method, request)
            self._decide(PEERS[0], name, epoch, decision)

    def _decide(self, caller: str, migration: str, epoch: int, decision: "peer_pb2.Decision") -> str:
        return self._call(caller, "Decide", peer_pb2.DecideRequest(migration=migration, epoch=epoch, decision=decision))

    def _call(self, caller: str, method: str, request: Message) -> str:
        try:
            asked = iter([request]) if method == "PullMemory" else request
            answer = getattr(self._stubs[caller], method)(asked, timeout=CALL_S)
            if method in ("DigestVolume", "PullMemory"):
                list(answer)
            outcome = "OK"
        except grpc.RpcError as error:
            outcome = self._outcome(error)
        self._note(method, outcome, 1)
        return outcome

    @staticmethod
    def _outcome(error: grpc.RpcError) -> str:
        made = status.from_rpc(error)
        code = error.code() if isinstance(error, grpc.Call) else None
        return made.reason if type(made) is not MigratorError else f"{made.reason} {code}"

    def _note(self, method: str, outcome: str, count: int) -> None:
        if outcome == "UNREACHABLE":
            # A busy machine: keepalive has broken the connection, and nothing is sent until there is another one.
            count = 0
            time.sleep(RECONNECT_S)
        self._sent += count
        with self._lock:
            self._report.messages += count
            self._report.answers[f"{method} {outcome}"] += 1


def fuzz(folder: Path, count: int, seed: int, say: Callable[[str], None] = lambda _: None) -> Report:
    """Send so many messages to a server of its own; `wrong` in the report is what must not have happened."""
    report, lock = Report(), threading.Lock()
    server = Server(folder)
    try:
        parts = (count // 4, count - count // 4)
        for number, part in enumerate(parts):
            workers = [Worker(server, 10 * number + index, seed, report, lock) for index in range(WORKERS)]
            with ThreadPoolExecutor(WORKERS) as threads:
                for done in [threads.submit(worker.run, -(-part // WORKERS)) for worker in workers]:
                    done.result()
            if server.is_alive():
                usage = server.usage()
                report.early, report.late = report.early or usage, usage
                say(
                    f"after {report.messages} messages: {usage.memory_bytes >> 20} MiB, {usage.files} open files, "
                    f"{usage.threads} threads"
                )
        _judge(server, report)
    finally:
        server.close()
    return report


def _judge(server: Server, report: Report) -> None:
    if not server.is_alive():
        report.wrong.append("the server ended")
        return
    report.wrong += server.unexpected()
    report.wrong += [f"{count} times {what}" for what, count in report.answers.items() if "DEADLINE" in what]
    if report.early and report.late:
        if report.late.memory_bytes > report.early.memory_bytes + GROWTH_BYTES:
            report.wrong.append(f"memory grew from {report.early.memory_bytes} to {report.late.memory_bytes} bytes")
        if report.late.files > report.early.files + 8:
            report.wrong.append(f"open files grew from {report.early.files} to {report.late.files}")
    outside = {path for path in _files(server.folder) - server.before if not path.startswith(("state", LOG))}
    outside |= {str(path) for path in (Path("/tmp") / messages.MARK, Path("/") / messages.MARK) if path.exists()}
    report.wrong += [f"there is a file outside the state folder: {path}" for path in sorted(outside)]
    report.wrong += [f"a name became a file: {path}" for path in sorted(_files(server.folder)) if messages.MARK in path]
    try:
        _serve(server)
    except grpc.RpcError as error:
        report.wrong.append(f"it does not serve any more: {error}")


def _serve(server: Server) -> None:
    """A migration as it should be."""
    request = messages.prepare(random.Random(0), "m-last", "last", 1)
    with server.connected(PEERS[0]) as connection:
        stub = peer_pb2_grpc.PeerServiceStub(connection)
        stub.Prepare(request, timeout=CALL_S)
        stub.HoldTraffic(peer_pb2.HoldTrafficRequest(migration="m-last", epoch=1), timeout=CALL_S)
        stub.Restore(peer_pb2.RestoreRequest(migration="m-last", epoch=1), timeout=CALL_S)
        released = peer_pb2.DecideRequest(migration="m-last", epoch=1, decision=peer_pb2.DECISION_RELEASED)
        answer = stub.Decide(released, timeout=CALL_S)
        assert answer.ownership == peer_pb2.OWNERSHIP_OWNER


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
