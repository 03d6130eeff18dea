"""gRPC channels to agents: over mutual TLS to a host that has to prove its name, or over the local socket."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from migrator.errors import Precondition, Unreachable

MESSAGE_BYTES = 4 << 20
# A dead peer is noticed within KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS; the server has to allow pings as often.
KEEPALIVE_MS = 3000
KEEPALIVE_TIMEOUT_MS = 2000
# A peer whose kernel answers, and not its process: more, since that one may be busy. gRPC's own default is a minute.
HANG_TIMEOUT_MS = 5000
# As the first two while a container stands still for the call; data on the same connection would hold such pings up.
URGENT_KEEPALIVE_MS = 400
URGENT_KEEPALIVE_TIMEOUT_MS = 800


@dataclass(frozen=True)
class Tls:
    """The PEM files of an identity and of the CA that it and its peers are signed by."""

    ca: Path
    certificate: Path
    key: Path


def options(name: str = "", *, urgent: bool = False) -> list[tuple[str, Any]]:
    """A client's channel options; `name` is what the server's certificate has to carry."""
    every_ms, timeout_ms = KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS
    if urgent:
        every_ms, timeout_ms = URGENT_KEEPALIVE_MS, URGENT_KEEPALIVE_TIMEOUT_MS
    made: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # The above becomes TCP_USER_TIMEOUT: for a host that is silent. This is for a process that hangs.
        ("grpc.http2.ping_timeout_ms", HANG_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", int(urgent)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
        # Channels to one address with the same options share a connection otherwise, and one failure hits them all.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if name:
        made.append(("grpc.ssl_target_name_override", name))
    return made


def connect(address: str, *, name: str, tls: Tls, urgent: bool = False) -> grpc.Channel:
    """A channel to host:port, whose certificate must carry `name`. Nothing is sent before the first call.

    An urgent one notices a dead peer within a good second; it is for few and small messages.

    The files are read now: make a channel per piece of work, and renewed certificates are used from the next one on.
    Raises Unreachable if one of the files cannot be read, or if they do not belong together.
    """
    try:
        credentials = grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
        )
        check_files(tls)
    except Precondition as error:
        raise Unreachable(f"no connection to {name or address}: {error}") from error
    except OSError as error:
        raise Unreachable(
            f"no connection to {name or address} without certificates: {error.filename}: {error.strerror}; "
            "make them with `migrator cert`"
        ) from error
    return grpc.secure_channel(address, credentials, options(name, urgent=urgent))


def check_files(tls: Tls) -> None:
    """Whether they are certificates and a key, and key and certificate belong together: gRPC says so only in its log.

    Raises Precondition, and OSError for a file that cannot be read.
    """
    # Only here: a command that uses the local socket shall not wait for it.
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.ca)
    except ssl.SSLError as error:
        raise Precondition(
            f"the certificates do not fit each other or are none: {tls.certificate}, {tls.key}, {tls.ca} "
            f"({error.reason or error})"
        ) from error


def connect_local(socket: Path) -> grpc.Channel:
    """A channel to the agent of this machine."""
    return grpc.insecure_channel(f"unix:{socket}", options())
