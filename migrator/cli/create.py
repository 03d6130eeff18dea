"""`migrator create`, and `run`, which is create and start."""

from collections.abc import Callable
from typing import Any

import click
import grpc

from migrator.cli import output
from migrator.cli.amounts import CPUS, SIZE
from migrator.cli.base import Command, settings
from migrator.cli.connection import WORK_S, agent
from migrator.cli.names import CONTAINER, IMAGE
from migrator.cli.spec_options import build_spec
from migrator.v1 import container_pb2
from migrator.v1.container_pb2_grpc import ContainerServiceStub

OPTIONS = [
    click.option("--image", required=True, type=IMAGE, help="Image whose file system the container gets a copy of."),
    click.option("--disk", type=SIZE, help="Size of the root volume, for example 2GiB."),
    click.option("--fs", type=click.Choice(["ext4", "xfs", "btrfs"]), help="File system of the root volume."),
    click.option("--memory", type=SIZE, help="Limit, for example 512MiB; none by default."),
    click.option("--shm-size", type=SIZE, help="What its /dev/shm holds at most, up to 1GiB; 64MiB by default."),
    click.option("--cpus", type=CPUS, help="Limit in CPUs, for example 1.5; none by default."),
    click.option("--pids", type=click.IntRange(1, 1 << 22), help="Limit on processes and threads; none by default."),
    click.option("--ip", "ips", multiple=True, metavar="ADDRESS/PREFIX|auto", help="IPv4 of the first interface."),
    click.option("--ip6", "ip6s", multiple=True, metavar="ADDRESS/PREFIX|auto", help="IPv6 of the first interface."),
    click.option("--gateway", default="", metavar="ADDRESS", help="IPv4 gateway of the first interface."),
    click.option("--gateway6", default="", metavar="ADDRESS", help="IPv6 gateway of the first interface."),
    click.option(
        "--net",
        "nets",
        multiple=True,
        metavar="KEY=VALUE,...",
        help="One more interface: name=, bridge=, ip= (repeatable), mac=, gateway=, gateway6=.",
    ),
    click.option("-p", "--publish", "ports", multiple=True, metavar="HOST:CONTAINER[/udp]", help="Forward a port."),
    click.option("--volume", "volumes", multiple=True, metavar="/PATH=SIZE[,FS]", help="One more volume, moved along."),
    click.option(
        "--bind",
        "binds",
        multiple=True,
        metavar="SRC:DST[:ro][,shared]",
        help="A folder of the host. Migrates live only if shared: your word that it is the same on every host.",
    ),
    click.option(
        "-e", "--env", "environment", multiple=True, metavar="NAME=VALUE", help="Variable of its environment."
    ),
    click.option("-w", "--workdir", default="", metavar="PATH", help="Where its command begins; / by default."),
    click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Who runs its command; root by default."),
    click.option("--hostname", default="", help="The container's name by default."),
    click.option(
        "--cap-add", multiple=True, metavar="CAPABILITY", help="Beside the default ones, for example NET_ADMIN."
    ),
    click.option("--cap-drop", multiple=True, metavar="CAPABILITY", help="Without this one of the default ones."),
    click.option(
        "--seccomp",
        type=click.Choice(["default", "unconfined"]),
        default="default",
        help="System calls that are allowed.",
    ),
    click.option(
        "--restart",
        type=click.Choice(["no", "on-failure", "always"]),
        default="no",
        show_default=True,
        help="When it ends.",
    ),
    click.argument("name", type=CONTAINER),
    click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] COMMAND..."),
]


def _spec_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command("create", cls=Command)
@_spec_options
def command(name: str, **given: Any) -> None:
    """Make a container from an image; `migrator start` runs it.

    \b
    migrator create ct101 --image redis --disk 2GiB --memory 512MiB \\
        --ip 10.77.2.101/16 -- redis-server --bind 0.0.0.0
    migrator create web --image nginx --ip auto -p 8080:80 --restart always -- nginx

    Without --ip, --ip6 and --net it has no network but its own loopback.
    """
    _make(name, given, run=False)


@click.command("run", cls=Command)
@_spec_options
def run(name: str, **given: Any) -> None:
    """Make a container from an image and start it: create and start in one."""
    _make(name, given, run=True)


def _make(name: str, given: dict[str, Any], *, run: bool) -> None:
    request = container_pb2.CreateContainerRequest(name=name, spec=build_spec(given))
    with agent() as channel:
        stub = ContainerServiceStub(channel)
        made = stub.CreateContainer(request, timeout=WORK_S).container
        if run:
            try:
                made = stub.StartContainer(container_pb2.StartContainerRequest(name=name), timeout=WORK_S).container
            except grpc.RpcError:
                click.echo(f"migrator: {name} was made, but not started; to be rid of it: migrator rm {name}", err=True)
                raise
    if settings().json:
        output.write_json(output.container_object(made))
    else:
        print(made.name)
