"""A userfaultfd of another process, had by making it call userfaultfd(2) and taking the descriptor out of it.

The process must make the call itself, since the descriptor is bound to its memory; all else is done from outside on
the copy that pidfd_getfd(2) gives (Linux 5.6). UFFD_USER_MODE_ONLY (Linux 5.11) lets processes without CAP_SYS_PTRACE
have one; it is harmless here, where write faults are resolved in the kernel.
"""

import ctypes
import errno
import os
import resource
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from migrator.memory import machine, processes
from migrator.memory.errors import NotNow, ProcessGone, Untrackable
from migrator.memory.processes import Thread
from migrator.memory.tracee import Tracee

DEADLINE_SECONDS = 0.2

_USER_MODE_ONLY = 1
_PIDFD_THREAD = os.O_EXCL  # Linux 6.9
_SYS_PIDFD_GETFD = 438  # on every machine
_NAME = "anon_inode:[userfaultfd]"
# A thread waiting inside the kernel for a disk, and one that waits for its vfork child, do not stop.
_PREFERRED = "RSTtID"
_MOST_THREADS_TRIED = 4
_MORE_DESCRIPTORS = 64

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Injected:
    """The descriptor here, which the caller closes, and the number that it had for a moment inside."""

    descriptor: int
    number_inside: int


def open_userfaultfd(pid: int, inherited: Collection[int] = (), seconds: float = DEADLINE_SECONDS) -> Injected:
    """Have a process open a userfaultfd and take it away from it; it is without an API handshake yet.

    `inherited` are numbers at which a process forked in that moment may have got the descriptor: it is closed there.
    Raises Untrackable, NotNow if no thread of it stops within `seconds`, ProcessGone.
    """
    failures: list[Exception] = []
    for thread in _candidates(pid):
        done: list[Injected] = []
        worker = threading.Thread(target=_inject, args=(pid, thread, inherited, seconds, done, failures), daemon=True)
        # Of its own, as its end makes the kernel let go of a thread that does not stop.
        worker.start()
        worker.join()
        if done:
            return done[0]
        if not isinstance(failures[-1], NotNow | ProcessGone):
            raise failures[-1]
    if failures and processes.threads(pid):
        raise NotNow(f"process {pid} ({processes.name(pid)}): {failures[-1]}") from failures[-1]
    raise ProcessGone(f"process {pid} is gone")


def _candidates(pid: int) -> list[Thread]:
    """The threads to be tried, likely ones first. A few of a process that has thousands will do."""
    found: list[Thread] = []
    for tid in processes.threads(pid):
        try:
            thread = processes.thread(pid, tid)
        except ProcessGone:
            continue
        if thread.state not in "ZX":
            found.append(thread)
        if len(found) == _MOST_THREADS_TRIED and found[0].state != "D":
            break
    found.sort(key=lambda thread: (_PREFERRED.find(thread.state) == -1, thread.state == "D"))
    return found[:_MOST_THREADS_TRIED]


def _inject(
    pid: int,
    thread: Thread,
    inherited: Collection[int],
    seconds: float,
    done: list[Injected],
    failures: list[Exception],
) -> None:
    result: Injected | None = None
    try:
        with Tracee(pid, thread, time.monotonic() + seconds) as tracee:
            for number in inherited:
                if _is_userfaultfd(pid, number):
                    tracee.call(machine.this().sys_close, number)
            result = _take(tracee)
    except Exception as error:  # reported by the thread that waits
        if result is not None:
            os.close(result.descriptor)
        failures.append(error)
    else:
        done.append(result)


def _take(tracee: Tracee) -> Injected:
    here = machine.this()
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
    number = tracee.call(here.sys_userfaultfd, flags)
    if number == -errno.EMFILE:
        number = _with_more_descriptors(tracee, flags)
    if number < 0:
        raise Untrackable(f"userfaultfd in process {tracee.pid}: {os.strerror(-number)}")
    try:
        return Injected(_get(tracee, number), number)
    finally:
        tracee.call(here.sys_close, number)


def _with_more_descriptors(tracee: Tracee, flags: int) -> int:
    """All its descriptors are in use: its limit is raised for the moment."""
    soft, hard = resource.prlimit(tracee.pid, resource.RLIMIT_NOFILE)
    more = soft + _MORE_DESCRIPTORS
    try:
        resource.prlimit(tracee.pid, resource.RLIMIT_NOFILE, (more, max(more, hard)))
    except (OSError, ValueError) as error:
        raise Untrackable(
            f"process {tracee.pid} ({processes.name(tracee.pid)}) has all {soft} descriptors in use, "
            f"and its limit cannot be raised for the moment: {error}"
        ) from error
    try:
        return tracee.call(machine.this().sys_userfaultfd, flags)
    finally:
        resource.prlimit(tracee.pid, resource.RLIMIT_NOFILE, (soft, hard))


def _get(tracee: Tracee, number: int) -> int:
    """The descriptor at a number in the thread's table, which may not be the first thread's."""
    try:
        handle = os.pidfd_open(tracee.tid, _PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle = os.pidfd_open(tracee.pid)
    try:
        descriptor = int(_libc.syscall(_SYS_PIDFD_GETFD, handle, number, 0))
        if descriptor < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"pidfd_getfd: {os.strerror(code)}", f"descriptor {number} of process {tracee.pid}")
        return descriptor
    finally:
        os.close(handle)


def _is_userfaultfd(pid: int, number: int) -> bool:
    try:
        return str(Path(f"/proc/{pid}/fd/{number}").readlink()) == _NAME
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return False
        raise
