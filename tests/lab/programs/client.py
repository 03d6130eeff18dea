"""What the lab's outside machine runs; standard library only. Each prints one JSON object when it is told to stop.

client.py count HOST PORT           INCR on one Redis connection without a break
client.py web HOST PORT N SHA256    GET /data on N keep-alive connections in turn, each answer checked
client.py ask HOST PORT WORD        one line to a workload, its answer

SIGTERM is the word to stop. Times are CLOCK_MONOTONIC, which every process of the machine shares.
"""

import hashlib
import http.client
import json
import signal
import socket
import sys
import time
from types import FrameType

# What is longer than this between two answers is told.
PAUSE_S = 0.02
ANSWER_TIMEOUT_S = 30.0


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
            if now - last > PAUSE_S:
                pauses.append((last, now - last))
            last = now
            time.sleep(0.0005)
        same = connection.getsockname()[1] == own_port
    return {"answers": answers, "value": value, "wrong": wrong, "pauses": pauses, "same_connection": same}


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


def main(verb: str, host: str, port: str, *rest: str) -> object:
    match verb:
        case "count":
            return count(host, int(port))
        case "web":
            return web(host, int(port), int(rest[0]), rest[1])
        case "ask":
            return ask(host, int(port), rest[0])
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
