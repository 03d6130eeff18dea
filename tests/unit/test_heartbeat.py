"""A peer that falls silent without closing anything, as one whose process hangs, is noticed within seconds."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from agent.server import Servers, Service
from migrator import certificates, channel, status
from migrator.channel import Tls
from migrator.errors import Unreachable
from migrator.v1 import host_pb2, host_pb2_grpc


class Hosts(host_pb2_grpc.HostServiceServicer):
    def GetHost(self, request: host_pb2.GetHostRequest, context: grpc.ServicerContext) -> host_pb2.GetHostResponse:
        return host_pb2.GetHostResponse()


class Cable:
    """Carries bytes between its own port and another one, until it is pulled."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._to = port
        self._pulled = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def pull(self) -> None:
        self._pulled.set()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _carry(self) -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(self._listener)
            others: dict[socket.socket, socket.socket] = {}
            while not self._ended.is_set():
                for ready in select.select([listener, *others], [], [], 0.05)[0]:
                    if ready is listener:
                        one = stack.enter_context(listener.accept()[0])
                        other = stack.enter_context(socket.create_connection(("127.0.0.1", self._to)))
                        others |= {one: other, other: one}
                    elif not (data := ready.recv(65536)):
                        others.pop(ready)
                    elif not self._pulled.is_set():
                        others[ready].sendall(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.init(tmp_path / "ca")
    certificates.issue(tmp_path / "ca", "host-a", "peer")
    return tmp_path / "ca"


@pytest.fixture
def cable(folder: Path) -> Iterator[Cable]:
    service = Service(
        "migrator.v1.HostService", lambda server: host_pb2_grpc.add_HostServiceServicer_to_server(Hosts(), server)
    )
    servers = Servers([service])
    made = Cable(servers.listen_tls("127.0.0.1:0", tls(folder)))
    servers.start()
    yield made
    servers.stop(0)
    made.close()


def tls(folder: Path) -> Tls:
    return Tls(folder / "ca.crt", folder / "host-a.crt", folder / "host-a.key")


@pytest.mark.parametrize("urgent", [True, False], ids=["while a container waits", "else"])
def test_silence_is_noticed(folder: Path, cable: Cable, urgent: bool) -> None:
    with channel.connect(f"127.0.0.1:{cable.port}", name="host-a", tls=tls(folder), urgent=urgent) as connection:
        stub = host_pb2_grpc.HostServiceStub(connection)
        stub.GetHost(host_pb2.GetHostRequest(), timeout=20)
        cable.pull()
        began = time.monotonic()
        # Far more than it takes: what ends the call is the silence.
        with pytest.raises(grpc.RpcError) as raised:
            stub.GetHost(host_pb2.GetHostRequest(), timeout=120)
        took_s = time.monotonic() - began
    assert isinstance(raised.value, grpc.Call) and raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(status.from_rpc(raised.value), Unreachable)
    print(f"noticed within {took_s:.1f} s")
    assert took_s < 30  # gRPC's own patience is a minute
