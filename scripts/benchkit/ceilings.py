"""What this machine can do at best, measured in the same run: memcpy, TCP between the hosts without and with TLS, tmpfs
and disk writes."""

import mmap
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchkit.contenders.base import Bench
from benchkit.errors import BenchError
from benchkit.hosts import DESTINATION, SOURCE, last_words
from benchkit.measure import Metrics, cpu_busy_s
from labkit.hosts import host_named
from migrator import certificates

# Bytes a second, and all that is measured.
SPEEDS = ("memcpy", "tcp", "tls", "tmpfs", "disk")
NAMES = (*SPEEDS, "cpu_s_per_gib")
MEMORY_BYTES = 256 << 20
STREAM_BYTES = 2 << 30
DISK_BYTES = 512 << 20
PORT = 7997

RECEIVER = """
import socket, ssl, sys
port, size, *certificate = sys.argv[1:]
with socket.create_server(("0.0.0.0", int(port))) as listener:
    print("ready", flush=True)
    connection, _ = listener.accept()
if certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    connection = context.wrap_socket(connection, server_side=True)
left, buffer = int(size), bytearray(4 << 20)
while left > 0:
    left -= connection.recv_into(buffer) or left
connection.sendall(b"d")
"""
SENDER = """
import json, os, socket, ssl, sys, time
size, encrypted = int(sys.argv[3]), len(sys.argv) > 4
with open("/dev/shm/migrator-bench-stream", "w+b", buffering=0) as file:
    file.write(os.urandom(64 << 20))
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
        if encrypted:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        began, sent = time.monotonic(), 0
        while sent < size:
            file.seek(0)
            if encrypted:
                while piece := file.read(1 << 20):
                    connection.sendall(piece)
                    sent += len(piece)
            else:
                sent += connection.sendfile(file)
        connection.recv(1)
        print(json.dumps({"sent": sent, "seconds": time.monotonic() - began}))
os.unlink("/dev/shm/migrator-bench-stream")
"""


def measure(bench: Bench) -> Metrics:
    """In bytes a second; cpu_s_per_gib is for both ends of the TCP stream."""
    tcp, cpu = stream(bench)
    with TemporaryDirectory(dir=bench.folder) as folder:
        tls, _ = stream(bench, certificate(Path(folder)))
    return {
        "memcpy": memcpy(),
        "tcp": tcp,
        "tls": tls,
        "cpu_s_per_gib": cpu,
        "tmpfs": written(Path("/dev/shm"), os.O_RDWR),
        "disk": written(bench.folder, os.O_RDWR | os.O_DIRECT),
    }


def memcpy() -> float:
    with (
        mmap.mmap(-1, MEMORY_BYTES) as source,
        mmap.mmap(-1, MEMORY_BYTES) as target,
        memoryview(source) as read,
        memoryview(target) as write,
    ):
        write[:] = read  # the first touch is no copy
        rounds = 4
        began = time.monotonic()
        for _ in range(rounds):
            write[:] = read
        return rounds * MEMORY_BYTES / (time.monotonic() - began)


def certificate(folder: Path) -> list[str]:
    """Files of a certificate and its key."""
    certificates.init(folder)
    made = certificates.issue(folder, "bench", certificates.Role.PEER)
    return [str(made.certificate), str(made.key)]


def stream(bench: Bench, certificate: Sequence[str] = ()) -> tuple[float, float]:
    """Bytes a second over one connection from host to host, with TLS if there is a certificate; processor seconds for a
    GiB."""
    size = str(STREAM_BYTES)
    receiver = bench.lab.popen(DESTINATION, "/usr/bin/python3", "-c", RECEIVER, str(PORT), size, *certificate)
    assert receiver.stdout is not None
    receiver.stdout.readline()
    busy_s = cpu_busy_s()
    address = host_named(DESTINATION).address
    try:
        told = bench.lab.json(SOURCE, "/usr/bin/python3", "-c", SENDER, address, str(PORT), size, *certificate[:1])
        receiver.communicate(timeout=30)
    except (BenchError, subprocess.TimeoutExpired):
        receiver.kill()
        _, said = receiver.communicate()
        raise BenchError(f"the TCP stream between the hosts failed: {last_words(said)}") from None
    return told["sent"] / told["seconds"], (cpu_busy_s() - busy_s) / (told["sent"] / 2**30)


def written(folder: Path, flags: int) -> float:
    """Bytes a second into a new file in large pieces, synced at the end."""
    path = folder / "migrator-bench-written"
    piece = mmap.mmap(-1, 4 << 20)
    piece.write(os.urandom(4 << 20))
    descriptor = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        began = time.monotonic()
        for _ in range(DISK_BYTES // len(piece)):
            os.write(descriptor, piece)
        os.fsync(descriptor)
        return DISK_BYTES / (time.monotonic() - began)
    finally:
        os.close(descriptor)
        path.unlink()
        piece.close()


def as_text(metrics: Metrics) -> str:
    """One line for people."""
    return ", ".join(f"{name} {metrics[name] / 1e9:.2f} GB/s" for name in SPEEDS)
