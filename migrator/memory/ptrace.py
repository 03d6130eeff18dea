"""ptrace(2) as typed calls. A tracee belongs to the thread that seized it: only that thread may call these for it.

When that thread ends, the kernel lets go of what it still traces. Nothing in the program may wait for any child
(`waitpid(-1)`): it would take the reports of tracees away.
"""

import ctypes
import errno
import os
import time

from migrator.memory.errors import NotNow, ProcessGone

SEIZE, INTERRUPT, CONT, SYSCALL, DETACH = 0x4206, 0x4207, 7, 24, 17
GET_REGISTER_SET, SET_REGISTER_SET = 0x4204, 0x4205
GET_SIGNAL_MASK, SET_SIGNAL_MASK = 0x420A, 0x420B
GET_RSEQ = 0x420F
SET_DISPATCH, GET_DISPATCH = 0x4210, 0x4211

OPTION_SYSCALL_GOOD, OPTION_SUSPEND_SECCOMP = 1, 1 << 21
EVENT_STOP = 128
SYSCALL_STOP = 5 | 0x80

_NT_PRSTATUS = 1
_WALL = 0x40000000
_SPINS = 200

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def call(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Raises ProcessGone where the thread is gone or not stopped, else an OSError that names the request."""
    result = int(_libc.ptrace(request, tid, address, data))
    if result < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise ProcessGone(f"thread {tid} is gone")
        raise OSError(number, f"ptrace({request:#x}): {os.strerror(number)}", f"thread {tid}")
    return result


def get_registers(tid: int, into: ctypes.Structure) -> bool:
    """Fill in the general registers. False if the thread has another set of them (32-bit)."""
    vector = _Vector(ctypes.addressof(into), ctypes.sizeof(into))
    call(GET_REGISTER_SET, tid, _NT_PRSTATUS, ctypes.addressof(vector))
    return int(vector.length) == ctypes.sizeof(into)


def set_registers(tid: int, registers: ctypes.Structure) -> None:
    vector = _Vector(ctypes.addressof(registers), ctypes.sizeof(registers))
    call(SET_REGISTER_SET, tid, _NT_PRSTATUS, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> int:
    """The blocked signals; of a call with a mask of its own (ppoll, sigsuspend) those to be restored after it."""
    mask = ctypes.c_uint64()
    call(GET_SIGNAL_MASK, tid, 8, ctypes.addressof(mask))
    return int(mask.value)


def set_signal_mask(tid: int, mask: int) -> None:
    data = ctypes.c_uint64(mask)
    call(SET_SIGNAL_MASK, tid, 8, ctypes.addressof(data))


def wait(tid: int, deadline: float) -> int:
    """The next stop of a tracee, as waitpid's status. Raises NotNow at the deadline (time.monotonic)."""
    tries = 0
    while True:
        try:
            done, status = os.waitpid(tid, os.WNOHANG | _WALL)
        except ChildProcessError as error:
            raise ProcessGone(f"thread {tid} is gone") from error
        if done:
            if not os.WIFSTOPPED(status):
                raise ProcessGone(f"thread {tid} has ended")
            return status
        tries += 1
        if time.monotonic() > deadline:
            raise NotNow(f"thread {tid} does not stop: it may be waiting for a disk, or be frozen")
        # It stops within microseconds, unless it waits inside the kernel.
        time.sleep(0 if tries < _SPINS else 0.001)
