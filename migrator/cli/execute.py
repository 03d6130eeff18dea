"""`migrator exec`: a command in a running container, with its streams and exit code passed through."""

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence

import click

from migrator.cli import terminal
from migrator.cli.base import Command
from migrator.cli.connection import agent
from migrator.cli.names import CONTAINER
from migrator.cli.spec_options import check_environment
from migrator.errors import Exit, InvalidArgument, Unreachable
from migrator.v1 import container_pb2
from migrator.v1.container_pb2_grpc import ContainerServiceStub

PIECE_BYTES = 64 * 1024
PIECES_AHEAD = 8


class _ExecCommand(Command):
    """With `--` options may stand on both sides of the name; without, everything after the name is the command's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@click.command("exec", cls=_ExecCommand)
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-e", "--env", "environment", multiple=True, metavar="NAME=VALUE")
@click.option("-w", "--workdir", default="", metavar="PATH")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]")
@click.argument("name", type=CONTAINER)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def command(
    *,
    name: str,
    command: Sequence[str],
    interactive: bool,
    tty: bool,
    environment: Sequence[str],
    workdir: str,
    user: str,
) -> int:
    """Run a command in a running container; its exit code becomes this one's.

    \b
    migrator exec ct101 -- cat /etc/hostname
    migrator exec -it ct101 -- bash
    """
    if tty and interactive and not sys.stdin.isatty():
        raise InvalidArgument("-t needs a terminal on standard input; leave it out to pass a file or a pipe on")
    start = container_pb2.ExecStart(
        name=name,
        command=command,
        terminal=tty,
        environment=[check_environment(item) for item in environment],
        working_directory=workdir,
        user=user,
    )
    if tty:
        start.rows, start.columns = terminal.size()
        if term := os.environ.get("TERM"):
            start.environment.insert(0, f"TERM={term}")
    requests = _Requests(start)
    with agent() as channel, terminal.passed_through(raw=tty and interactive, resized=requests.resize if tty else None):
        responses = ContainerServiceStub(channel).Exec(iter(requests))
        if interactive:
            threading.Thread(target=requests.pump, args=(sys.stdin.fileno(),), daemon=True, name="stdin").start()
        else:
            requests.end()
        try:
            return _copy_out(responses)
        except KeyboardInterrupt:
            return int(Exit.CANCELLED)
        finally:
            responses.cancel()


class _Requests:
    """The request stream. Input waits until gRPC has taken what came before it: memory stays small."""

    def __init__(self, start: container_pb2.ExecStart) -> None:
        # SimpleQueue, because resize() puts from a signal handler.
        self._queue: queue.SimpleQueue[container_pb2.ExecRequest] = queue.SimpleQueue()
        self._room = threading.Semaphore(PIECES_AHEAD)
        self._queue.put(container_pb2.ExecRequest(start=start))

    def __iter__(self) -> Iterator[container_pb2.ExecRequest]:
        while True:
            request = self._queue.get()
            yield request
            kind = request.WhichOneof("request")
            if kind == "input":
                self._room.release()

    def pump(self, descriptor: int) -> None:
        """Read the descriptor to its end. Runs in a thread of its own."""
        while True:
            try:
                piece = os.read(descriptor, PIECE_BYTES)
            except OSError:
                # A terminal that is gone (EIO) has no more input, like one at its end.
                piece = b""
            if not piece:
                self.end()
                return
            self._room.acquire()
            self._queue.put(container_pb2.ExecRequest(input=piece))

    def end(self) -> None:
        self._queue.put(container_pb2.ExecRequest(input_end=True))

    def resize(self) -> None:
        rows, columns = terminal.size()
        self._queue.put(container_pb2.ExecRequest(resize=container_pb2.TerminalSize(rows=rows, columns=columns)))


def _copy_out(responses: Iterator[container_pb2.ExecResponse]) -> int:
    for response in responses:
        match response.WhichOneof("response"):
            case "output":
                sys.stdout.buffer.write(response.output)
                sys.stdout.buffer.flush()
            case "error_output":
                sys.stderr.buffer.write(response.error_output)
                sys.stderr.buffer.flush()
            case "exit_code":
                return response.exit_code
    raise Unreachable("the connection ended before the command did; it may still run in the container")
