"""One end of a move by checkpoint, copy and restore; runs inside a host, and does what its plan says as fast as it can.

peer_end.py PLAN    where PLAN is a JSON object, see `Plan`; it says "ready", and reads "go" from standard input

The destination listens, stores what comes in a tmpfs, restores, and connects the container. The last line of both is a
JSON object with the phases in ms. Standard library alone, everything loaded before "go".
"""

import json
import mmap
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

COPY_PORT = 7999
STEP_S = 60.0
# Started here, and to end with this.
serving: list["subprocess.Popen[bytes]"] = []
BROADCAST, ARP = b"\xff" * 6, 0x0806


@dataclass(frozen=True)
class Plan:
    """`before` and `after_dump` are commands around the one that dumps or restores, `daemon` runs beside it.

    `disk` is a sparse image that is copied as well, its data alone.
    The destination announces `address` at `mac`, which is a MAC or the name of the link that has it.

    With `lazy` the dump stays, says on the descriptor {status} that its images are complete, and serves the pages.
    """

    role: str
    peer: str
    images: str
    work: str
    main: list[str]
    before: list[list[str]] = field(default_factory=list)
    after_dump: list[list[str]] = field(default_factory=list)
    daemon: list[str] = field(default_factory=list)
    daemon_socket: str = ""
    lazy: bool = False
    copy: bool = True
    disk: str = ""
    mac: str = ""
    address: str = ""


class Phases:
    """Milliseconds from one mark to the next."""

    def __init__(self) -> None:
        self.lengths: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.lengths[name] = (now - self._last) * 1000
        self._last = now


def main() -> int:
    plan = Plan(**json.loads(sys.argv[1]))
    Path(plan.images).mkdir(parents=True, exist_ok=True)
    Path(plan.work).mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps((source if plan.role == "source" else destination)(plan)), flush=True)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    else:
        return 0
    finally:
        for child in serving:
            child.kill()  # of no consequence to one that has ended


def source(plan: Plan) -> dict[str, object]:
    connection = socket.create_connection((plan.peer, COPY_PORT), timeout=STEP_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    phases = Phases()
    for command in plan.before:
        run(command)
    phases.mark("before")
    dump = None
    if plan.lazy:
        dump = dump_lazily(plan)
    else:
        run(plan.main)
    for command in plan.after_dump:
        run(command)
    phases.mark("dump")
    if plan.copy:
        send_folder(connection, Path(plan.images))
    connection.sendall(b"\n")
    if plan.disk:
        send_sparse(connection, Path(plan.disk))
    phases.mark("copy")
    if connection.recv(1) != b"r":
        raise RuntimeError("the destination did not restore it")
    phases.mark("restore at the destination")
    if dump is not None:
        if dump.wait(STEP_S) != 0:
            raise RuntimeError(f"the serving dump ended with exit code {dump.returncode}")
        phases.mark("pages")
    connection.sendall(b"d")
    return {"phases_ms": phases.lengths}


def dump_lazily(plan: Plan) -> "subprocess.Popen[bytes]":
    """The dump that serves the pages, once its images are complete."""
    reader, writer = os.pipe()
    command = [word.replace("{status}", str(writer)) for word in plan.main]
    dump = subprocess.Popen(command, pass_fds=[writer], stdin=subprocess.DEVNULL)
    serving.append(dump)
    os.close(writer)
    if os.read(reader, 1) == b"" and dump.wait(STEP_S) != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {dump.returncode}")
    os.close(reader)
    return dump


def destination(plan: Plan) -> dict[str, object]:
    with socket.create_server(("0.0.0.0", COPY_PORT)) as listener:
        print("ready", flush=True)
        listener.settimeout(STEP_S)
        connection, _ = listener.accept()
    connection.settimeout(STEP_S)
    receive_folder(connection, Path(plan.images))
    if plan.disk:
        receive_sparse(connection, Path(plan.disk))
    phases = Phases()
    for command in plan.before:
        run(command)
    daemon = None
    if plan.daemon:
        daemon = subprocess.Popen(plan.daemon, stdin=subprocess.DEVNULL)
        serving.append(daemon)
        deadline = time.monotonic() + STEP_S
        while not Path(plan.daemon_socket).exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(plan.daemon)} is not there")
            time.sleep(0.0005)
    phases.mark("before")
    run(plan.main)
    phases.mark("restore")
    announce(plan)
    phases.mark("connect")
    connection.sendall(b"r")
    if daemon is not None and daemon.wait(STEP_S) != 0:
        raise RuntimeError(f"{' '.join(plan.daemon)} ended with exit code {daemon.returncode}")
    phases.mark("pages")
    if connection.recv(1) != b"d":
        raise RuntimeError("the source did not end well")
    return {"phases_ms": phases.lengths}


def run(command: list[str]) -> None:
    """Raises RuntimeError with the end of its log if it fails."""
    # Not captured through a pipe: a container that inherits it would keep it open, and CRIU would not dump it.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=STEP_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}")


def send_folder(connection: socket.socket, folder: Path) -> None:
    """Each file: a line with its size and name, then its bytes."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        header = f"{size} {path.name}\n".encode()
        connection.sendall(header)
        with path.open("rb") as file:
            connection.sendfile(file)


def send_sparse(connection: socket.socket, path: Path) -> None:
    """Its size, then each part that is not a hole: a line with offset and length, and its bytes."""
    with path.open("rb") as file:
        size, at = path.stat().st_size, 0
        connection.sendall(f"{size} 0\n".encode())
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            connection.sendall(f"{begin} {at - begin}\n".encode())
            connection.sendfile(file, begin, at - begin)
    connection.sendall(b"\n")


def receive_sparse(connection: socket.socket, path: Path) -> None:
    """The counterpart of `send_sparse`."""
    buffer = memoryview(bytearray(4 << 20))
    with path.open("wb", buffering=0) as file:
        file.truncate(int(read_line(connection).split()[0]))
        while header := read_line(connection):
            begin, left = map(int, header.split())
            file.seek(begin)
            while left:
                got = connection.recv_into(buffer[: min(left, len(buffer))])
                if not got:
                    raise RuntimeError("the source ended early")
                file.write(buffer[:got])
                left -= got


def read_line(connection: socket.socket) -> str:
    """Without its end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece:
            raise RuntimeError("the source ended early")
        line += piece
    return line[:-1].decode()


def receive_folder(connection: socket.socket, folder: Path) -> None:
    """Straight into the files' pages. Ends at the empty line."""
    while header := read_line(connection):
        size, name = header.split()
        with (folder / Path(name).name).open("w+b") as file:
            if int(size) == 0:
                continue
            file.truncate(int(size))
            with mmap.mmap(file.fileno(), int(size)) as at, memoryview(at) as view:
                done = 0
                while done < int(size):
                    got = connection.recv_into(view[done:])
                    if not got:
                        raise RuntimeError("the source ended early")
                    done += got


def announce(plan: Plan) -> None:
    """A gratuitous ARP from the uplink, so that the switch sends the container's frames here."""
    if not plan.mac:
        return
    link = Path(f"/sys/class/net/{plan.mac}/address")
    known = link.read_text().strip() if link.exists() else plan.mac
    mac, address = bytes.fromhex(known.replace(":", "")), socket.inet_aton(plan.address)
    frame = BROADCAST + mac + ARP.to_bytes(2) + bytes.fromhex("0001080006040002") + mac + address + BROADCAST + address
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        out.bind(("eth0", 0))
        out.send(frame)


if __name__ == "__main__":
    sys.exit(main())
