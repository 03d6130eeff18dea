"""Callers that TLS turned away, for the audit log: no interceptor ever sees them, gRPC only says so in its own log.

That log is C's `stderr`. This process's is replaced (glibc allows that, stdio(3)), and nothing else is: descriptor 2,
which Python and every child process write to, stays as it is.
"""

import ctypes
import os
import re
import sys
import threading

import structlog

VERBOSITY = "GRPC_VERBOSITY"
# `... Handshake failed with error SSL_ERROR_SSL: error:NUMBER:SSL routines:FUNCTION:REASON: DETAIL`
_FAILED = re.compile(rb"Handshake failed with error \w+: error:[0-9a-f]+:[^:]*:[^:]*:(\w+)(?:: ([\w ,'-]*))?")
_UNBUFFERED = 2  # _IONBF of stdio.h

audit = structlog.get_logger("audit")


def watch() -> None:
    """Call once, before gRPC is imported. What gRPC logs for other reasons still comes to this process's stderr."""
    os.environ.setdefault(VERBOSITY, "info")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fdopen.restype = ctypes.c_void_p
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    stream = libc.fdopen(writing, b"w")
    libc.setvbuf(stream, None, _UNBUFFERED, 0)
    ctypes.c_void_p.in_dll(libc, "stderr").value = stream
    threading.Thread(target=_read, args=(reading,), name="handshakes", daemon=True).start()


def refusal(line: bytes) -> str | None:
    """Why a handshake failed, if this is a line about that: OpenSSL's reason, with what it says about it."""
    found = _FAILED.search(line)
    if found is None:
        return None
    reason, detail = found[1].decode(), (found[2] or b"").decode().strip()
    return f"{reason}: {detail}" if detail and detail != "Invalid certificate verification context" else reason


def _read(descriptor: int) -> None:
    with os.fdopen(descriptor, "rb") as lines:
        for line in lines:
            if (why := refusal(line)) is not None:
                audit.info("call", who="unknown", role="none", method="handshake", outcome=why)
            elif not line.startswith(b"I") and b"is not suitable for production" not in line:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
