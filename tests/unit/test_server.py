"""Over real connections: who gets in, what failures look like to a client, and certificates that are renewed."""

import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography import x509

from agent.peers import RemotePeer
from agent.server import Servers, Service
from blockdev.errors import BlockError
from migrator import certificates, channel, errors, status
from migrator.channel import Tls
from migrator.errors import Cancelled, Exit, MigratorError
from migrator.v1 import host_pb2, host_pb2_grpc, peer_pb2, peer_pb2_grpc

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MigratorError)]


class Hosts(host_pb2_grpc.HostServiceServicer):
    """Answers with its name, or raises what it was given."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def GetHost(self, request: host_pb2.GetHostRequest, context: grpc.ServicerContext) -> host_pb2.GetHostResponse:
        if self.error is not None:
            raise self.error
        return host_pb2.GetHostResponse(host=host_pb2.Host(name="host-a"))

    def Diagnose(self, request: host_pb2.DiagnoseRequest, context: grpc.ServicerContext) -> host_pb2.DiagnoseResponse:
        return host_pb2.DiagnoseResponse()


class Peers(peer_pb2_grpc.PeerServiceServicer):
    """Agrees to everything."""

    def __init__(self) -> None:
        self.asked = 0

    def Examine(self, request: peer_pb2.ExamineRequest, context: grpc.ServicerContext) -> peer_pb2.ExamineResponse:
        return peer_pb2.ExamineResponse(host="host-a")

    def DigestVolume(
        self, request: peer_pb2.DigestVolumeRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.DigestVolumeResponse]:
        """One answer, and then a volume that takes for ever to read; or as many as it is a link's that breaks twice."""
        yield peer_pb2.DigestVolumeResponse(digests=[bytes(16)])
        if request.target == "volume/1":
            self.asked += 1
            for number in range(1, self.asked + 1):
                yield peer_pb2.DigestVolumeResponse(first_chunk=number, digests=[bytes(16)])
            if self.asked < 3:
                raise errors.Unreachable("the link is broken")
            return
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(60)


class Bench:
    """A server on the loopback, with certificates."""

    def __init__(self, folder: Path) -> None:
        self.ca = folder / "ca"
        certificates.init(self.ca)
        for name, role in (("host-a", "peer"), ("host-b", "peer"), ("alice", "operator"), ("bob", "viewer")):
            certificates.issue(self.ca, name, role)
        self.hosts, self.peers = Hosts(), Peers()
        self.servers = Servers(
            [
                Service(
                    "migrator.v1.HostService",
                    lambda server: host_pb2_grpc.add_HostServiceServicer_to_server(self.hosts, server),
                ),
                Service(
                    "migrator.v1.PeerService",
                    lambda server: peer_pb2_grpc.add_PeerServiceServicer_to_server(self.peers, server),
                ),
            ]
        )
        self.port = self.servers.listen_tls("127.0.0.1:0", self.tls("host-a"))
        self.servers.start()

    def tls(self, name: str) -> Tls:
        return Tls(self.ca / "ca.crt", self.ca / f"{name}.crt", self.ca / f"{name}.key")

    @contextmanager
    def connected(self, tls: Tls, name: str = "host-a") -> Iterator[grpc.Channel]:
        with channel.connect(f"127.0.0.1:{self.port}", name=name, tls=tls) as connection:
            yield connection

    def serial(self) -> int:
        """Of the certificate that the server shows."""
        client = ssl.create_default_context(cafile=str(self.ca / "ca.crt"))
        client.load_cert_chain(self.ca / "alice.crt", self.ca / "alice.key")
        client.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", self.port))
        with client.wrap_socket(plain, server_hostname="host-a") as connection:
            shown = connection.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number

    def get_host(self, tls: Tls, name: str = "host-a") -> str:
        with self.connected(tls, name) as connection:
            try:
                stub = host_pb2_grpc.HostServiceStub(connection)
                return str(stub.GetHost(host_pb2.GetHostRequest(), timeout=5).host.name)
            except grpc.RpcError as error:
                raise status.from_rpc(error, "host-a") from error


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.servers.stop(0)


@pytest.mark.parametrize("name", ["host-b", "alice", "bob"])
def test_every_role_may_ask_what_the_host_is(bench: Bench, name: str) -> None:
    assert bench.get_host(bench.tls(name)) == "host-a"


@pytest.mark.parametrize(
    ("name", "examine", "diagnose"), [("host-b", True, False), ("alice", False, True), ("bob", False, False)]
)
def test_roles_are_checked_per_method(bench: Bench, name: str, examine: bool, diagnose: bool) -> None:
    with bench.connected(bench.tls(name)) as connection:
        calls = [
            (peer_pb2_grpc.PeerServiceStub(connection).Examine, peer_pb2.ExamineRequest(), examine),
            (host_pb2_grpc.HostServiceStub(connection).Diagnose, host_pb2.DiagnoseRequest(), diagnose),
        ]
        for call, request, allowed in calls:
            try:
                call(request, timeout=5)
                assert allowed
            except grpc.RpcError as error:
                assert not allowed
                assert isinstance(status.from_rpc(error), errors.PermissionDenied)


def test_a_server_has_to_prove_its_name(bench: Bench) -> None:
    with pytest.raises(errors.Unreachable, match="certificates do not fit"):
        bench.get_host(bench.tls("alice"), name="host-b")


def test_a_stranger_does_not_get_in(bench: Bench, tmp_path: Path) -> None:
    certificates.init(tmp_path / "other")
    stranger = certificates.issue(tmp_path / "other", "eve", "operator")
    with pytest.raises(errors.Unreachable):
        bench.get_host(Tls(bench.ca / "ca.crt", stranger.certificate, stranger.key))


def test_an_operator_cannot_stand_in_for_a_host(bench: Bench, tmp_path: Path) -> None:
    certificates.issue(bench.ca, "host-c", "operator")
    servers = Servers([])
    port = servers.listen_tls("127.0.0.1:0", bench.tls("host-c"))
    servers.start()
    try:
        with channel.connect(f"127.0.0.1:{port}", name="host-c", tls=bench.tls("alice")) as connection:
            with pytest.raises(grpc.RpcError) as raised:
                host_pb2_grpc.HostServiceStub(connection).GetHost(host_pb2.GetHostRequest(), timeout=5)
            assert isinstance(status.from_rpc(raised.value), errors.Unreachable)
    finally:
        servers.stop(0)


def test_renewed_certificates_are_used(bench: Bench, tmp_path: Path) -> None:
    old = bench.tls("alice")
    assert bench.get_host(old) == "host-a"
    certificates.init(tmp_path / "new")
    certificates.issue(tmp_path / "new", "host-a", "peer")
    alice = certificates.issue(tmp_path / "new", "alice", "operator")
    for name in ("ca.crt", "host-a.crt", "host-a.key"):
        (tmp_path / "new" / name).rename(bench.ca / name)
    assert bench.get_host(Tls(bench.ca / "ca.crt", alice.certificate, alice.key)) == "host-a"
    with pytest.raises(errors.Unreachable):
        bench.get_host(old)


def test_certificates_that_are_replaced_one_by_one(bench: Bench) -> None:
    """Between the first and the last of the files the old ones stay in use, also if a file is half written."""
    alice = bench.tls("alice")
    served, certificate, key = (bench.ca / name for name in ("host-a.crt", "new.crt", "new.key"))
    first = served.read_bytes()
    certificates.issue(bench.ca, "host-a", "peer", force=True)
    (bench.ca / "host-a.crt").rename(certificate)
    (bench.ca / "host-a.key").rename(key)
    for broken in (certificate.read_bytes()[:100], certificate.read_bytes()):
        served.write_bytes(broken)
        (bench.ca / "host-a.key").write_text("not yet")
        assert bench.get_host(alice) == "host-a"
        assert bench.serial() == x509.load_pem_x509_certificate(first).serial_number
    (bench.ca / "host-a.key").write_bytes(key.read_bytes())
    assert bench.get_host(alice) == "host-a"
    assert bench.serial() == x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_arrive_as_they_were_raised(bench: Bench, kind: type[MigratorError]) -> None:
    bench.hosts.error = kind("what happened, and what to do", reason="SPECIAL")
    with pytest.raises(kind, match="what happened, and what to do") as raised:
        bench.get_host(bench.tls("alice"))
    assert type(raised.value) is kind
    assert raised.value.reason == "SPECIAL"
    assert raised.value.exit_code == kind.exit_code


def test_a_failing_disk_is_told(bench: Bench) -> None:
    bench.hosts.error = BlockError("no loop device")
    with pytest.raises(errors.ExecutionError, match="no loop device"):
        bench.get_host(bench.tls("alice"))


def test_what_nobody_expected_is_not_told_in_detail(bench: Bench) -> None:
    bench.hosts.error = ZeroDivisionError("secret")
    with pytest.raises(MigratorError, match="unexpectedly") as raised:
        bench.get_host(bench.tls("alice"))
    assert "secret" not in str(raised.value)
    assert raised.value.exit_code is Exit.INTERNAL


def test_nobody_there() -> None:
    with channel.connect_local(Path("/nonexistent/agent.sock")) as connection, pytest.raises(grpc.RpcError) as raised:
        host_pb2_grpc.HostServiceStub(connection).GetHost(host_pb2.GetHostRequest(), timeout=5)
    made = status.from_rpc(raised.value, "host-a")
    assert isinstance(made, errors.Unreachable)
    assert "host-a" in str(made)


def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    """In a process of its own: gRPC takes the setting when it is imported."""
    script = """
        import socket, ssl, sys
        from pathlib import Path
        import agent.server
        from migrator import certificates
        from migrator.channel import Tls
        folder = Path(sys.argv[1])
        certificates.init(folder)
        certificates.issue(folder, "host-a", "peer")
        servers = agent.server.Servers([])
        port = servers.listen_tls("127.0.0.1:0", Tls(folder / "ca.crt", folder / "host-a.crt", folder / "host-a.key"))
        servers.start()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
            client.load_cert_chain(folder / "host-a.crt", folder / "host-a.key")
            client.set_alpn_protocols(["h2"])
            client.minimum_version = client.maximum_version = version
            with socket.create_connection(("127.0.0.1", port)) as plain:
                try:
                    with client.wrap_socket(plain, server_hostname="host-a") as connection:
                        print(version.name, connection.version())
                except OSError:
                    print(version.name, "refused")
        servers.stop(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["TLSv1_2 refused", "TLSv1_3 TLSv1.3"]


def test_who_is_cancelled_does_not_wait_for_digests(bench: Bench) -> None:
    config = SimpleNamespace(peers={"host-a": f"127.0.0.1:{bench.port}"}, tls=bench.tls("host-b"))
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("no more of it")

    with RemotePeer(config, "host-a") as peer:  # type: ignore[arg-type]
        peer.watch(check)
        answers = peer.digest_volume("m-1", 1, "volume/0", 65536)
        assert len(next(answers).digests) == 1
        threading.Timer(0.1, cancelled.set).start()
        with pytest.raises(Cancelled):
            next(answers)


def test_digests_go_on_when_the_link_is_there_again(bench: Bench) -> None:
    config = SimpleNamespace(peers={"host-a": f"127.0.0.1:{bench.port}"}, tls=bench.tls("host-b"))
    with RemotePeer(config, "host-a") as peer:  # type: ignore[arg-type]
        answers = list(peer.digest_volume("m-1", 1, "volume/1", 65536))
    assert [answer.first_chunk for answer in answers] == [0, 1, 2, 3]
