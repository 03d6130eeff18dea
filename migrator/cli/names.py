"""Names, checked before they are sent, with the messages that the agent has."""

import re

import click
from click.shell_completion import CompletionItem

from migrator.errors import InvalidArgument

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
SNAPSHOT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


def check_name(name: str, kind: str = "container") -> str:
    """The name, if it can be that of a container, an image or a snapshot. Raises InvalidArgument."""
    if kind == "snapshot":
        if not SNAPSHOT_NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot be a snapshot's name: 1 to 40 of a-z, 0-9, '.', '-' and '_'; the first a letter or"
                " digit"
            )
        return name
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} cannot be a {kind}'s name: 1 to 31 lower case letters, digits and dashes")
    return name


class _Name(click.ParamType[str]):
    def __init__(self, kind: str) -> None:
        self.name = kind
        self._kind = kind

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_name(value, self._kind)
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from migrator.cli.completion import names

        return [CompletionItem(name) for name in names(self._kind, ctx) if name.startswith(incomplete)]


CONTAINER = _Name("container")
IMAGE = _Name("image")
HOST = _Name("host")
SNAPSHOT = _Name("snapshot")
