"""Long work of a call that streams what is being done: in a thread, ended and waited for when the caller leaves."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import grpc

from agent.tarball import Cancel
from migrator.errors import MigratorError

# A caller who hears nothing for longer wonders; it also shows us that it is still there.
SILENCE_S = 10.0

Result = TypeVar("Result")


class _Done(Generic[Result]):
    def __init__(self, result: Result) -> None:
        self.result = result


def streamed(
    name: str, work: Callable[[Callable[[str], None], Cancel], Result], context: grpc.ServicerContext
) -> Iterator[str | Result]:
    """What `work` reports, line by line, empty lines in silence, and at last its result. Raises what it raises."""
    cancel = Cancel()
    said: queue.SimpleQueue[str | _Done[Result] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            said.put(_Done(work(said.put, cancel)))
        except Exception as error:
            said.put(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    if not context.add_callback(cancel.cancel):
        raise MigratorError("the caller has gone")
    thread.start()
    try:
        while True:
            try:
                item = said.get(timeout=SILENCE_S)
            except queue.Empty:
                yield ""
                continue
            if isinstance(item, Exception):
                raise item
            if isinstance(item, _Done):
                yield item.result
                return
            yield item
    finally:
        cancel.cancel()
        thread.join()
