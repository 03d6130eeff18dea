"""What every command shares: the options for output and connection, and how an error leaves the program."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from migrator.cli import output
from migrator.cli.settings import Settings
from migrator.errors import Exit, MigratorError

SETTINGS = "migrator.settings"


def settings() -> Settings:
    """The settings of the command that runs."""
    return settings_of(click.get_current_context())


def settings_of(ctx: click.Context) -> Settings:
    found: Settings = ctx.meta.setdefault(SETTINGS, Settings())
    return found


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            setattr(settings_of(ctx), field, value)

    return remember


def _option(flags: Sequence[str], field: str, *, hidden: bool = False, **more: Any) -> click.Option:
    return click.Option(
        [*flags, f"shared_{field}"], expose_value=False, callback=_remember(field), hidden=hidden, **more
    )


def shared_options(*, hidden: bool) -> list[click.Parameter]:
    """Options that may stand before and after the name of a command; the later one counts."""
    return [
        _option(
            ["-o", "--output"],
            "output",
            type=click.Choice(["table", "json"]),
            is_eager=True,
            help="What is written to standard output: for people, or one JSON value.",
        ),
        _option(
            ["--host"],
            "host",
            hidden=hidden,
            metavar="NAME|ADDRESS",
            help="Ask this host's agent, over mutual TLS. Environment: MIGRATOR_HOST.",
        ),
        _option(
            ["--socket"],
            "socket",
            hidden=hidden,
            metavar="PATH",
            help="The local agent's socket. Environment: MIGRATOR_SOCKET.",
        ),
        _option(["--ca"], "ca", hidden=hidden, metavar="FILE", help="Certificate of the authority. MIGRATOR_CA."),
        _option(["--cert"], "cert", hidden=hidden, metavar="FILE", help="Your own certificate. MIGRATOR_CERT."),
        _option(["--key"], "key", hidden=hidden, metavar="FILE", help="Its private key. MIGRATOR_KEY."),
    ]


class _Shared(click.Command):
    """Adds the shared options, and ends the program with the exit code that belongs to an error."""

    connection_options_shown = False

    def __init__(self, *args: Any, connection: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection_options_shown = connection

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        inside = ctx.parent is not None and not self.connection_options_shown
        own = super().get_params(ctx)
        return [*own[:-1], *shared_options(hidden=inside), *own[-1:]]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, False, **extra)
        sys.exit(self._guarded(words, prog_name, complete_var, **extra))

    def _guarded(self, words: list[str], prog_name: str | None, complete_var: str | None, **extra: Any) -> int:
        import grpc

        from migrator.status import from_rpc

        try:
            # A copy: click takes words out of the list as it goes.
            result = super().main(list(words), prog_name, complete_var, False, **extra)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            if _wants_json(words):
                message = error.format_message()
                output.write_json({"error": output.error_object("INVALID_ARGUMENT", message, error.exit_code)})
            return error.exit_code
        except click.Abort:
            return int(Exit.CANCELLED)
        except MigratorError as error:
            return _report(error, prog_name, words)
        except grpc.RpcError as error:
            return _report(from_rpc(error), prog_name, words)
        except BrokenPipeError:
            # The reader of our output left, as in `migrator logs | head`; the flush at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return int(Exit.INTERNAL)
        except OSError as error:
            return _report(MigratorError(str(error)), prog_name, words)
        return int(result) if isinstance(result, int) else 0


class Command(_Shared):
    """A command. Its callback returns the exit code, or nothing for 0."""


class Group(_Shared, click.Group):
    """A group of commands; commands made with its decorator are of our kind."""

    command_class = Command


def _report(error: MigratorError, prog_name: str | None, words: Sequence[str]) -> int:
    print(f"{prog_name or 'migrator'}: {error}", file=sys.stderr)
    if _wants_json(words):
        output.write_json({"error": output.error_object(error.reason, str(error), int(error.exit_code))})
    return int(error.exit_code)


def _wants_json(words: Sequence[str]) -> bool:
    """Whether JSON was asked for; read from the words, since an error may come before they are parsed."""
    chosen = None
    for index, word in enumerate(words):
        if word == "--":
            break
        if word in ("-o", "--output") and index + 1 < len(words):
            chosen = words[index + 1]
        elif word.startswith(("--output=", "-ojson", "-o=")):
            chosen = word.removeprefix("--output=").removeprefix("-o").removeprefix("=")
    return chosen == "json"
