"""`migrator logs`."""

import sys

import click

from migrator.cli import output
from migrator.cli.base import Command, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.names import CONTAINER
from migrator.errors import Exit
from migrator.v1 import container_pb2
from migrator.v1.container_pb2_grpc import ContainerServiceStub


@click.command("logs", cls=Command)
@click.option("-f", "--follow", is_flag=True, help="Go on as the container writes, until Ctrl-C or its end.")
@click.option("-n", "--tail", type=click.IntRange(min=1), help="Only the last so many lines.")
@click.option("--timestamps", is_flag=True, help="Each line with the time at which it was written.")
@click.argument("name", type=CONTAINER)
def command(name: str, follow: bool, tail: int | None, timestamps: bool) -> int:
    """Show what a container wrote to its standard output and error, on the same streams here.

    \b
    migrator logs -f --tail 20 ct101

    With -o json: one object per line with time, stream and text.
    """
    request = container_pb2.ReadLogRequest(name=name, follow=follow, tail=tail or 0)
    with agent() as channel:
        lines = ContainerServiceStub(channel).ReadLog(request, timeout=None if follow else READ_S * 10)
        try:
            at_line_start = True
            for line in lines:
                if settings().json:
                    _write_object(line)
                else:
                    _write(line, timestamps and at_line_start)
                at_line_start = line.text.endswith(b"\n")
        except KeyboardInterrupt:
            return int(Exit.CANCELLED)
        finally:
            lines.cancel()
    return 0


def _write(line: container_pb2.ReadLogResponse, with_time: bool) -> None:
    stream = (sys.stderr if line.is_error_output else sys.stdout).buffer
    prefix = f"{output.iso(line.time)} ".encode() if with_time else b""
    stream.write(prefix + line.text)
    stream.flush()


def _write_object(line: container_pb2.ReadLogResponse) -> None:
    import json

    stream = "stderr" if line.is_error_output else "stdout"
    text = line.text.decode(errors="replace")
    print(json.dumps({"time": output.iso(line.time), "stream": stream, "text": text}), flush=True)
