"""What the lab's outside machine runs for the tests and the demo; standard library only. Each prints one JSON value.

client.py count HOST PORT           INCR on one Redis connection without a break, until SIGTERM
client.py web HOST PORT N SHA256    GET /data on N keep-alive connections in turn, each answer checked, until SIGTERM
client.py ask HOST PORT WORD        one line to a workload, its answer
client.py redis HOST PORT WORD...   one command to a Redis, its answer
client.py fill HOST PORT N          N keys into a Redis
client.py check HOST PORT N         how many of those N keys are there with the right value

Times are CLOCK_MONOTONIC, which every process of the machine shares. LAB_ANSWER_S: how long an answer may take, in s;
LAB_PACE_S: how long `count` waits between an answer and the next request.
"""

import hashlib
import http.client
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

# What is longer than this between two answers is told.
PAUSE_S = 0.02
ANSWER_TIMEOUT_S = float(os.environ.get("LAB_ANSWER_S", "30"))
PACE_S = float(os.environ.get("LAB_PACE_S", "0.0005"))
BATCH = 1000


class Stop:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def count(host: str, port: int) -> dict[str, object]:
    stop = Stop()
    wrong: list[str] = []
    pauses: list[tuple[float, float]] = []
    gaps: list[float] = []
    answers = value = 0
    with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own_port = connection.getsockname()[1]
        last = time.monotonic()
        while not stop.asked:
            connection.sendall(b"INCR counter\r\n")
            received = b""
            while not received.endswith(b"\r\n"):
                piece = connection.recv(100)
                if not piece:
                    raise ConnectionError(f"the server closed the connection after {answers} answers")
                received += piece
            now = time.monotonic()
            new = int(received[1:])
            if answers and new != value + 1:
                wrong.append(f"{new} after {value}")
            value = new
            answers += 1
            gaps.append(now - last)
            if now - last > PAUSE_S:
                pauses.append((last, now - last))
            last = now
            time.sleep(PACE_S)
        same = connection.getsockname()[1] == own_port
    typical_s = statistics.median(gaps) if gaps else 0.0
    return {
        "answers": answers,
        "value": value,
        "wrong": wrong,
        "pauses": pauses,
        "typical_s": typical_s,
        "same_connection": same,
    }


def web(host: str, port: int, connections: int, digest: str) -> dict[str, object]:
    stop = Stop()
    clients = [http.client.HTTPConnection(host, port, timeout=ANSWER_TIMEOUT_S) for _ in range(connections)]
    for client in clients:
        client.connect()
    ports = [client.sock.getsockname()[1] for client in clients]
    answers, wrong, longest_s = 0, 0, 0.0
    while not stop.asked:
        for client in clients:
            began = time.monotonic()
            client.request("GET", "/data")
            response = client.getresponse()
            if response.status != 200 or hashlib.sha256(response.read()).hexdigest() != digest:
                wrong += 1
            longest_s = max(longest_s, time.monotonic() - began)
            answers += 1
    # http.client silently connects again where the server has closed: then the port is another.
    kept = sum(
        client.sock is not None and client.sock.getsockname()[1] == own
        for client, own in zip(clients, ports, strict=True)
    )
    for client in clients:
        client.close()
    return {"answers": answers, "wrong": wrong, "kept": kept, "longest_s": longest_s}


def ask(host: str, port: int, word: str) -> object:
    with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S) as connection:
        connection.sendall(f"{word}\n".encode())
        with connection.makefile() as answer:
            return json.loads(answer.readline())


class Redis:
    """One connection to a Redis; see redis.io/docs/latest/develop/reference/protocol-spec."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S)
        self._answers = self._connection.makefile("rb")

    def send(self, commands: Sequence[Sequence[str]]) -> list[object]:
        """All commands at once; their answers."""
        parts = [f"*{len(words)}\r\n" + "".join(f"${len(w)}\r\n{w}\r\n" for w in words) for words in commands]
        self._connection.sendall("".join(parts).encode("ascii"))
        return [self._answer() for _ in commands]

    def _answer(self) -> object:
        line = self._answers.readline().decode().removesuffix("\r\n")
        match line[:1]:
            case "+":
                return line[1:]
            case ":":
                return int(line[1:])
            case "$":
                size = int(line[1:])
                return None if size < 0 else self._answers.read(size + 2)[:-2].decode()
            case "*":
                return [self._answer() for _ in range(int(line[1:]))]
        raise ConnectionError(line or "the server closed the connection")

    def close(self) -> None:
        self._answers.close()
        self._connection.close()


def batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH):
        yield range(start, min(start + BATCH, count))


def value_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def fill(redis: Redis, count: int) -> int:
    """Returns how many keys were set."""
    return sum(
        redis.send([("SET", f"key:{number}", value_of(number)) for number in batch]).count("OK")
        for batch in batches(count)
    )


def check(redis: Redis, count: int) -> int:
    """Returns how many keys have the value that `fill` gave them."""
    right = 0
    for batch in batches(count):
        (values,) = redis.send([("MGET", *(f"key:{number}" for number in batch))])
        assert isinstance(values, list)
        right += sum(value == value_of(number) for number, value in zip(batch, values, strict=True))
    return right


def with_redis(verb: str, host: str, port: int, words: Sequence[str]) -> object:
    redis = Redis(host, port)
    try:
        if verb == "redis":
            return redis.send([words])[0]
        return (fill if verb == "fill" else check)(redis, int(words[0]))
    finally:
        redis.close()


def main(verb: str, host: str, port: str, *rest: str) -> object:
    match verb:
        case "count":
            return count(host, int(port))
        case "web":
            return web(host, int(port), int(rest[0]), rest[1])
        case "ask":
            return ask(host, int(port), rest[0])
        case "redis" | "fill" | "check":
            return with_redis(verb, host, int(port), rest)
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
