"""The `migrator` command group and the commands that stand on their own.

Commands are imported when they are used: `migrator ps` must not pay for what only `migrate` draws.
"""

import importlib
import os
import sys

import click

from migrator.cli.base import Command, Group

# gRPC's own log says on standard error what our message says too; it is read when grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

COMMANDS = {
    "cert": "certificates:group",
    "completion": "completion:command",
    "create": "create:command",
    "doctor": "hosts:doctor",
    "exec": "execute:command",
    "hosts": "hosts:hosts",
    "image": "images:group",
    "inspect": "containers:inspect",
    "kill": "containers:kill",
    "logs": "logs:command",
    "migrate": "migrate:command",
    "migrations": "migrations:group",
    "pause": "containers:pause",
    "ps": "containers:ps",
    "resolve": "resolve:command",
    "resume": "containers:resume",
    "rm": "containers:rm",
    "run": "create:run",
    "snapshot": "snapshots:group",
    "start": "containers:start",
    "stop": "containers:stop",
    "volume": "volumes:group",
}


def load(name: str) -> click.Command:
    """The command of this name; its module is imported now."""
    module_name, _, attribute = COMMANDS[name].partition(":")
    found: click.Command = getattr(importlib.import_module(f"migrator.cli.{module_name}"), attribute)
    return found


class LazyGroup(Group):
    """A group whose commands are imported by the first use of their name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load(cmd_name) if cmd_name in COMMANDS else None


@click.group(cls=LazyGroup, connection=True)
@click.version_option(package_name="migrator", message="migrator %(version)s")
def main() -> None:
    """Run containers and move them, while they run, between hosts.

    \b
    migrator create ct101 --image redis --ip 10.77.2.101/16 -- redis-server
    migrator start ct101
    migrator migrate ct101 host-b

    Data goes to standard output, messages to standard error. Without --host the agent of this machine is asked,
    over its UNIX socket.
    """


def migrate() -> None:
    """Entry point of `migrate CT HOST`."""
    command: Command = load("migrate")  # type: ignore[assignment]
    command.connection_options_shown = True
    sys.exit(command.main(prog_name="migrate"))
