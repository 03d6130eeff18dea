"""Around every call: may this caller do it, who changed what, and failures as statuses."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import structlog
from grpc_status import rpc_status

from agent import auth
from agent.auth import Caller
from blockdev.errors import BlockError
from migrator import status
from migrator.errors import Busy, ExecutionError, MigratorError

# The fields that say what a request is about.
SUBJECTS = ("name", "container", "migration", "destination")
LONGEST_SUBJECT = 100
# Calls of one peer or one remote client at the same time: each has a thread, and others shall find one.
MOST_CALLS = 48

log = structlog.get_logger()
audit = structlog.get_logger("audit")

# grpc's classes are generic in their stubs alone.
if TYPE_CHECKING:
    Interceptor = grpc.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.ServerInterceptor


class Guarded(Interceptor):
    """Checks roles, writes the audit log, and answers failures with ErrorInfo. Nothing unexpected is told in detail."""

    def __init__(self) -> None:
        self._calls = _Calls()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.stream_unary), **coders)
        assert handler.stream_stream is not None
        return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **coders)

    def _unary(self, method: str, behaviour: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            recorder = _Recorder(method, request, self._calls)
            with recorder:
                try:
                    recorder.admit(context)
                    response = behaviour(recorder.request, context)
                except Exception as error:
                    recorder.fail(error, context)
                recorder.done()
                return response

        return call

    def _stream(
        self, method: str, behaviour: Callable[[Any, grpc.ServicerContext], Iterator[Any]]
    ) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            recorder = _Recorder(method, request, self._calls)
            with recorder:
                try:
                    recorder.admit(context)
                    yield from behaviour(recorder.request, context)
                except GeneratorExit:
                    recorder.note("left by the caller")
                    raise
                except Exception as error:
                    recorder.fail(error, context)
                recorder.done()

        return call


class _Calls:
    """How many calls of each caller are under way."""

    def __init__(self) -> None:
        self._counts: Counter[Caller] = Counter()
        self._lock = threading.Lock()

    def begin(self, who: Caller) -> None:
        """Raises Busy. The local socket is not counted: who may open it may do anything."""
        with self._lock:
            if who != auth.LOCAL and self._counts[who] >= MOST_CALLS:
                raise Busy(f"{who.name} has {MOST_CALLS} calls under way: wait for one of them to end")
            self._counts[who] += 1

    def end(self, who: Caller) -> None:
        """One that `begin` has let through is over."""
        with self._lock:
            self._counts[who] -= 1
            if not self._counts[who]:
                del self._counts[who]


class _Recorder:
    """One call, from who made it to how it ended; use as a context manager."""

    def __init__(self, method: str, request: Any, calls: _Calls) -> None:
        self._calls = calls
        self._counted = False
        self._method = method
        self._subject = self._about(request)
        # What the handler gets: of a stream, the first message says what it is about.
        self.request = self._noting(request) if isinstance(request, Iterator) else request
        self._caller: Caller | None = None
        self._begin_s = time.monotonic()

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._counted and self._caller is not None:
            self._calls.end(self._caller)

    def _noting(self, requests: Iterator[Any]) -> Iterator[Any]:
        for first in requests:
            self._subject = self._about(getattr(first, "start", first))
            yield first
            break
        yield from requests

    def _about(self, request: Any) -> dict[str, str]:
        """The fields that name what a request is about; `name` is that of the service's resource."""
        resource = self._method.rpartition("/")[0].rpartition(".")[2].removesuffix("Service").lower()
        return {
            resource if field == "name" else field: value[:LONGEST_SUBJECT]
            for field in SUBJECTS
            if (value := getattr(request, field, "")) and isinstance(value, str)
        }

    def admit(self, context: grpc.ServicerContext) -> None:
        self._caller = auth.caller(context)
        auth.check(self._caller, self._method)
        self._calls.begin(self._caller)
        self._counted = True

    def done(self) -> None:
        self.note("done")

    def fail(self, error: Exception, context: grpc.ServicerContext) -> NoReturn:
        """Answer with the error's status; does not return."""
        if not context.is_active() and not isinstance(error, MigratorError):
            # The caller has gone, and whatever the handler ran into for that reason nobody will read.
            log.debug("call broken off", method=self._method, error=repr(error))
        elif isinstance(error, MigratorError | BlockError):
            log.info("call failed", method=self._method, error=str(error))
        else:
            log.error("call failed unexpectedly", method=self._method, exc_info=error)
        known = as_migrator_error(error)
        foreign = known.reason == "MIGRATION_NOT_FOUND" and "PeerService" in self._method
        self.note(known.reason, denied=not self._counted or foreign or known.reason == "PERMISSION_DENIED")
        context.abort_with_status(rpc_status.to_status(status.to_status(known)))

    def note(self, outcome: str, *, denied: bool = False) -> None:
        """A line in the audit log, for every change and every refusal."""
        if self._method in auth.READING and not denied:
            return
        audit.info(
            "call",
            who=self._caller.name if self._caller else "unknown",
            role=str(self._caller.role) if self._caller else "none",
            method=self._method.rpartition("/")[2],
            **self._subject,
            outcome=outcome,
            duration_ms=round((time.monotonic() - self._begin_s) * 1000),
        )


def as_migrator_error(error: Exception) -> MigratorError:
    """The failure that is told to the caller."""
    if isinstance(error, MigratorError):
        return error
    if isinstance(error, BlockError):
        return ExecutionError(str(error), reason="BLOCK_FAILED")
    if isinstance(error, OSError):
        return ExecutionError(f"the agent failed: {error}", reason="EXECUTION_FAILED")
    return MigratorError(f"the agent failed unexpectedly ({type(error).__name__}): its log has the details")
