"""The agent's two gRPC servers: a local socket for root and one group, and mutual TLS for peers and remote clients."""

import grp
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agent.interceptor import Guarded
from migrator import channel
from migrator.channel import Tls
from migrator.errors import ExecutionError, Precondition

GROUP = "migrator"
# A stream (exec, a followed log, a watch, a migration's Send) keeps its thread as long as it lasts.
WORKERS = 128
# More than these wait for a thread, or are refused; and no more at once on one connection.
MOST_CALLS, MOST_STREAMS = 512, 100
# Who has not shown a certificate by then is cut off.
HANDSHAKE_MS = 10_000

log = structlog.get_logger()


@dataclass(frozen=True)
class Service:
    """One gRPC service: its full name, and what adds it to a server."""

    name: str
    add: Callable[[grpc.Server], None]


class Servers:
    """Start, and stop at the end; `services` are on both of them."""

    def __init__(self, services: Sequence[Service]) -> None:
        self._services = services
        self._health = health.HealthServicer(experimental_non_blocking=False)
        self._servers: list[grpc.Server] = []

    def listen_local(self, path: Path) -> None:
        """Serve a UNIX socket, which root and the group `migrator` (if there is one) may open."""
        server = self._server()
        names = [service.name for service in self._services]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        # It must not be open to all between bind and chmod. The mask is the process's: bind before there are threads.
        mask = os.umask(0o117)
        try:
            _bind(lambda: server.add_insecure_port(f"unix:{path}"), str(path))
        finally:
            os.umask(mask)
        os.chown(path, 0, _group())
        path.chmod(0o660)
        self._servers.append(server)

    def listen_tls(self, address: str, tls: Tls) -> int:
        """Serve host:port over mutual TLS 1.3; the files are read again when they have changed. Returns the port."""
        certificates = _Certificates(tls)
        server = self._server()
        credentials = grpc.dynamic_ssl_server_credentials(
            certificates.configuration(),
            certificates.renewed,  # type: ignore[arg-type]  # None is allowed: nothing new
            require_client_authentication=True,
        )
        port = _bind(lambda: server.add_secure_port(address, credentials), address)
        self._servers.append(server)
        return port

    def start(self) -> None:
        """Answer calls from now on."""
        for service in ("", *(service.name for service in self._services)):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        for server in self._servers:
            server.start()

    def stop(self, grace_s: float) -> None:
        """Take no new calls, let those under way end within `grace_s`, then break them off."""
        self._health.enter_graceful_shutdown()
        for stopped in [server.stop(grace_s) for server in self._servers]:
            stopped.wait(grace_s + 1)

    def _server(self) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="call"),
            interceptors=[Guarded()],
            options=_options(),
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        for service in self._services:
            service.add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server


class _Certificates:
    """The host's certificate files as they are now."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = self._stamp()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Raises Precondition if a file cannot be read, or if they do not belong together."""
        try:
            channel.check_files(self._tls)
            chain = [(self._tls.key.read_bytes(), self._tls.certificate.read_bytes())]
            return grpc.ssl_server_certificate_configuration(chain, self._tls.ca.read_bytes())
        except OSError as error:
            file = error.filename or self._tls.certificate
            raise Precondition(
                f"TLS needs {file}: {error.strerror}; make certificates with `migrator cert init` and "
                "`migrator cert issue`, or remove [listen] to serve the local socket only"
            ) from error

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked at each handshake: the new ones if the files have changed, None if not. Broken files change nothing."""
        with self._lock:
            try:
                stamp = self._stamp()
                if stamp == self._seen:
                    return None
                made = self.configuration()
            except Precondition as error:
                # As between two of three files being replaced: tried again at the next handshake.
                log.error("certificates not read again; the old ones stay in use", error=str(error))
                return None
            self._seen = stamp
        log.info("certificates read again", certificate=str(self._tls.certificate))
        return made

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            files = [path.stat() for path in (self._tls.ca, self._tls.certificate, self._tls.key)]
        except OSError as error:
            raise Precondition(f"TLS needs {error.filename}: {error.strerror}; see `migrator cert`") from error
        return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in files)


def _options() -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", channel.MESSAGE_BYTES),
        ("grpc.max_receive_message_length", channel.MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MOST_STREAMS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # A dead client is noticed as quickly as a dead server, and clients may ping as often as ours do.
        ("grpc.keepalive_time_ms", channel.KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", channel.KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", channel.HANG_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _bind(bind: Callable[[], int], where: str) -> int:
    try:
        port = bind()
    except RuntimeError as error:
        raise ExecutionError(f"cannot listen on {where}: {error}") from error
    if port == 0:
        raise ExecutionError(f"cannot listen on {where}: is the address this host's, and free?")
    return port


def _group() -> int:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return 0
