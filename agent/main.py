"""`migrator-agent`: start in order, serve until told to stop, and leave the containers running."""

import fcntl
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import structlog

from agent import allocator, handshakes
from agent import config as configuration
from agent.config import Config
from blockdev.errors import BlockError
from migrator.errors import ExecutionError, Exit, MigratorError, Precondition

LEVELS = ("debug", "info", "warning", "error")
STOP_GRACE_S = 5.0
# After a stop was asked for; then the process ends whatever still runs in it. The state on the disk allows it.
STOP_DEADLINE_S = 20.0

SWITCH_INTERVAL_S = 0.0005

log = structlog.get_logger()


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/migrator/config.toml"),
    show_default=True,
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True)
def main(config_file: Path, log_level: str, log_format: str) -> None:
    """Run the agent of this host in the foreground."""
    set_up_log(log_level, log_format)
    allocator.set_up()
    # What a container waits for shall not wait 5 ms at a time for a thread that computes digests.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        run(config_file.absolute())
    except MigratorError as error:
        log.error("the agent cannot run", error=str(error), reason=error.reason)
        sys.exit(int(error.exit_code))
    except (BlockError, OSError) as error:
        log.error("the agent cannot run", error=str(error))
        sys.exit(int(Exit.INTERNAL))


def run(config_file: Path) -> None:
    """Until SIGTERM or SIGINT. Raises MigratorError, BlockError, OSError if it cannot start."""
    config = configuration.load(config_file)
    if os.geteuid() != 0:
        raise Precondition("the agent has to run as root: it mounts, makes namespaces, and starts containers")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as resources:
        resources.enter_context(locked(config))
        handshakes.watch()
        # Only now: these load gRPC and much else, and a second agent should be told at once.
        from agent.server import Servers
        from agent.wiring import assemble

        agent = assemble(config, config_file, resources)
        servers = Servers(agent.services())
        servers.listen_local(config.socket)
        resources.callback(config.socket.unlink, missing_ok=True)
        if config.listen_address:
            servers.listen_tls(config.listen_address, config.tls)
        agent.recover(resources)
        # It stays. To look through it for garbage would take 50 ms, for which a container may stand still.
        gc.freeze()
        servers.start()
        resources.callback(servers.stop, STOP_GRACE_S)
        log.info("ready", host=config.host, socket=str(config.socket), address=config.listen_address)
        notify("READY=1")
        stop.wait()
        log.info("stopping; containers run on")
        notify("STOPPING=1")
        end_at_last()
    log.info("stopped")
    sys.stderr.flush()
    # Handlers of calls that were broken off may still wait for something: they are not waited for.
    os._exit(int(Exit.DONE))


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """Keep a second agent from the same state and run folders. Raises Precondition."""
    with ExitStack() as stack:
        for folder in (config.state_dir, config.run_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o755)
                file = stack.enter_context((folder / "agent.lock").open("a+"))
            except OSError as error:
                raise ExecutionError(f"open {error.filename}: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                pid = file.read().strip() or "unknown"
                raise Precondition(
                    f"another agent (pid {pid}) uses {folder} already: stop it first, or give this one other folders",
                    reason="ALREADY_RUNNING",
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def end_at_last() -> None:
    """Whatever hangs while the agent stops, it ends within the deadline."""

    def end() -> None:
        log.error("stopping took too long: ending now", deadline_s=STOP_DEADLINE_S)
        sys.stderr.flush()
        os._exit(int(Exit.INTERNAL))

    timer = threading.Timer(STOP_DEADLINE_S, end)
    timer.daemon = True
    timer.start()


def notify(state: str) -> None:
    """Tell systemd, if it asked for it (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.warning("systemd was not told", state=state, error=str(error))


def set_up_log(level: str, kind: str) -> None:
    """Lines on stderr: for people on a terminal, JSON elsewhere."""
    as_json = kind == "json" or (kind == "auto" and not sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        # The other formatters show local variables, in which there may be a key or an environment.
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=_named_logger,
        cache_logger_on_first_use=True,
    )


def _named_logger(*names: str) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


if __name__ == "__main__":
    main()
