"""CRIU at the source: one process, started and waiting before the freeze, dumps a tree by CRIU's own RPC.

After the images are written CRIU is kept waiting in its post-dump notification, with the tasks stopped: only so do the
links stay that it makes for open files whose name is gone, and its way back is clean: told of a failure, or left alone
by a dead agent, it takes its links away and lets the tasks go on (into the frozen control group).

`criu swrk FD` (criu.org/RPC) takes a request on a SOCK_SEQPACKET socket. It is started with subprocess, not with
pycriu's own helper, which forks: forking is unsafe once gRPC has threads.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from pycriu import rpc_pb2 as rpc

from migrator.errors import ExecutionError
from migrator.images import last_errors, rearm_timers
from migrator.pageless import KNOWS_PAGES, Pageless
from migrator.waiting import finishes

MESSAGE_BYTES = 1 << 20
GHOST_LIMIT_BYTES = 1 << 30
LOG = "dump.log"
# Warnings. CRIU writes each line by itself: told all, it spends a fourth of the time of a dump on that.
LOG_LEVEL = 2

log = structlog.get_logger()


@dataclass(frozen=True)
class DumpRequest:
    """What is dumped and how it is tied to its surroundings."""

    pid: int
    images: Path
    # For its log, and a file of options that its RPC does not have.
    work: Path
    configuration: Path
    root: Path
    freezer: Path
    # Key to value of CRIU's external mounts: bind mounts and masked files.
    external_mounts: Mapping[str, str] = field(default_factory=dict)
    # A folder beside `images` that `pageless.write_parent` has filled: then no memory is dumped.
    parent: Path | None = None


class Criu:
    """A waiting CRIU process; use as a context manager. At the end it rolls back, unless the tasks are dead by then."""

    # Killed half-way it would leave its own code in the tasks: that is for one that does nothing for so long.
    ROLLBACK_S = 5.0
    KILL_S = 5.0
    # How often a dump that takes its time is asked about.
    CHECK_S = 0.05

    def __init__(
        self, program: str, environment: Mapping[str, str], network: Path, pageless: Pageless | None = None
    ) -> None:
        """It runs in this network namespace, which is the container's: as its own, CRIU leaves it alone.

        Of another it dumps the tracked connections, and for that the kernel walks through a table of the whole host.
        With `pageless` it can dump against a parent that has every page; `add_pages` is to be called then.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [program, "swrk", str(theirs.fileno())]
            if pageless is not None:
                environment = {**environment, **KNOWS_PAGES}
            self._process = subprocess.Popen(
                ["nsenter", f"--net={network}", *(command if pageless is None else pageless.command(command))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        self._socket = ours

    def warm_up(self, timeout_s: float) -> None:
        """Have CRIU probe the kernel now and keep what it finds in /run/criu.kdat; the first time that takes 40 ms."""
        self._socket.settimeout(timeout_s)
        question = rpc.criu_req(type=rpc.FEATURE_CHECK, keep_open=True, features=rpc.criu_features(mem_track=False))
        try:
            self._socket.send(question.SerializeToString())
            self._receive()
        except OSError as error:
            raise ExecutionError(f"CRIU does not answer: {error}; see migrator doctor") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        if finishes(self._process.pid, self.ROLLBACK_S):
            self._process.wait()
        else:
            self.kill()

    @property
    def pid(self) -> int:
        """The CRIU process."""
        return self._process.pid

    def kill(self) -> None:
        """End CRIU at once; what it holds stays as the control group has it."""
        self._process.kill()
        try:
            self._process.wait(self.KILL_S)
        except subprocess.TimeoutExpired:
            log.error("CRIU does not die: it is in an uninterruptible wait, and is left alone", pid=self.pid)

    def dump(self, request: DumpRequest, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Dump the tree into `request.images` and return with its tasks stopped.

        `check` is called now and then; what it raises ends the dump.

        Raises ExecutionError with the last errors of CRIU's log; the tasks are let go then.
        """
        deadline = time.monotonic() + timeout_s
        criu_log = request.work / LOG
        images = os.open(request.images, os.O_RDONLY | os.O_DIRECTORY)
        work = os.open(request.work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._socket.settimeout(self.CHECK_S)
            self._socket.send(_dump_message(request, images, work).SerializeToString())
            while (answer := self._await(deadline, check)).type == rpc.NOTIFY:
                if answer.notify.script == "post-dump":
                    rearm_timers(request.images)
                    return
                self._socket.send(rpc.criu_req(type=rpc.NOTIFY, notify_success=True).SerializeToString())
        except TimeoutError as error:
            raise ExecutionError(
                f"CRIU has not dumped process {request.pid} within {timeout_s:g} s: it is ended{last_errors(criu_log)}",
                reason="DUMP_FAILED",
            ) from error
        except OSError as error:
            raise ExecutionError(f"CRIU went away during the dump: {error}{last_errors(criu_log)}") from error
        finally:
            os.close(images)
            os.close(work)
        reason = last_errors(criu_log) or answer.cr_errmsg or os.strerror(answer.cr_errno)
        raise ExecutionError(f"CRIU could not dump process {request.pid}: {reason}", reason="DUMP_FAILED")

    def _await(self, deadline: float, check: Callable[[], None]) -> rpc.criu_resp:
        while True:
            try:
                return self._receive()
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
                check()

    def _receive(self) -> rpc.criu_resp:
        message = self._socket.recv(MESSAGE_BYTES)
        if not message:
            raise ConnectionResetError("it closed its socket")
        return rpc.criu_resp.FromString(message)


def _dump_message(request: DumpRequest, images: int, work: int) -> rpc.criu_req:
    options = rpc.criu_opts(
        images_dir_fd=images,
        work_dir_fd=work,
        pid=request.pid,
        root=str(request.root),
        leave_running=True,
        tcp_established=True,
        # Connections that were not accepted by the freeze: reset at the other end, where they would fail the dump.
        tcp_skip_in_flight=True,
        file_locks=True,
        evasive_devices=True,
        link_remap=True,
        ghost_limit=GHOST_LIMIT_BYTES,
        freeze_cgroup=str(request.freezer),
        manage_cgroups=True,
        manage_cgroups_mode=rpc.IGNORE,
        # The veth is off the bridge by now: nothing reaches the sockets, so nothing has to be locked.
        network_lock=rpc.SKIP,
        notify_scripts=True,
        log_level=LOG_LEVEL,
        log_file=LOG,
        config_file=str(request.configuration),
    )
    if request.parent is not None:
        options.track_mem = True
        options.parent_img = f"../{request.parent.name}"
    for key, value in request.external_mounts.items():
        options.ext_mnt.add(key=key, val=value)
    return rpc.criu_req(type=rpc.DUMP, opts=options)
