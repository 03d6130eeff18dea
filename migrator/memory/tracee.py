"""One thread of another process, stopped for a moment to make system calls of ours, and let go as if nothing had been.

What the thread may notice is kept away from it. Signals are blocked meanwhile: they stay pending. Its registers are put
back in a stop where the kernel itself then restarts an interrupted call, with the time that is left of it; a call that
a stop ends with EINTR, though no signal came, is made again. A restartable sequence (rseq(2)) in which it was is
aborted, which may happen to it at any time. Its memory is not written.
"""

import ctypes
import errno
import os
import struct
import time
from types import TracebackType

from migrator.memory import machine, mappings, processes, ptrace
from migrator.memory.errors import NotNow, ProcessGone, Untrackable
from migrator.memory.processes import Thread
from migrator.memory.remote import read_bytes

_ALL_SIGNALS = 2**64 - 1
_RSEQ_CS_OFFSET = 8
# Once its registers are changed the thread has to be brought back, however busy the machine is. Our calls do not wait.
_BACK_SECONDS = 60.0
# Where the system call instruction was found last: the vDSO is the same in all processes, at different addresses.
_known_offset: list[int] = []


class Tracee:
    """A context manager: in it the thread is stopped. Enter, use and leave it in one thread.

    Raises Untrackable for what cannot be helped (a tracer, 32-bit code), NotNow at the deadline (time.monotonic), and
    ProcessGone. After NotNow the calling thread must end: only then does the kernel let go of a thread that never
    stopped.
    """

    def __init__(self, pid: int, thread: Thread, deadline: float) -> None:
        self.pid, self.tid = pid, thread.tid
        self._thread, self._deadline, self._machine = thread, deadline, machine.this()
        self._saved = self._machine.registers()
        self._used = False
        self._stopped = False

    def __enter__(self) -> "Tracee":
        if self._thread.tracer:
            raise Untrackable(_traced_by(self.pid, self._thread.tracer))
        options = ptrace.OPTION_SYSCALL_GOOD | (ptrace.OPTION_SUSPEND_SECCOMP if self._thread.seccomp else 0)
        try:
            ptrace.call(ptrace.SEIZE, self.tid, 0, options)
        except OSError as error:
            raise self._refusal(error) from error
        ptrace.call(ptrace.INTERRUPT, self.tid)
        self._wait_for_stop()
        try:
            self._save()
        except BaseException:
            ptrace.call(ptrace.DETACH, self.tid)
            raise
        return self

    def call(self, number: int, *arguments: int) -> int:
        """Make a system call in the thread: its result, below 0 a negated errno."""
        registers = type(self._saved).from_buffer_copy(self._saved)
        self._machine.aim(registers, self._instruction, number, arguments)
        self._used = True
        self._deadline = time.monotonic() + _BACK_SECONDS
        ptrace.set_registers(self.tid, registers)
        self._step()
        self._step()
        ptrace.get_registers(self.tid, registers)
        return self._machine.result(registers)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """A thread that ended in the meantime is nobody's loss."""
        try:
            if self._used:
                # A stop from which the kernel goes on as from an interrupted call, for it to be restarted.
                ptrace.call(ptrace.INTERRUPT, self.tid)
                self._deadline = time.monotonic() + _BACK_SECONDS
                if self._stopped:
                    ptrace.call(ptrace.CONT, self.tid)
                self._wait_for_stop()
                ptrace.set_registers(self.tid, self._saved)
            self._switch_dispatch(self._dispatch)
            ptrace.set_signal_mask(self.tid, self._mask)
            ptrace.call(ptrace.DETACH, self.tid)
        except ProcessGone:
            if kind is None:
                raise

    def _save(self) -> None:
        if not ptrace.get_registers(self.tid, self._saved):
            raise Untrackable(
                f"process {self.pid} ({processes.name(self.pid)}) runs 32-bit code, which is not supported"
            )
        self._mask = ptrace.get_signal_mask(self.tid)
        self._dispatch = self._dispatch_now()
        self._instruction = _find_instruction(self.pid, self._machine.syscall_instruction)
        self._leave_sequence()
        # With a signal waiting EINTR is what it has to be. One that comes after this look finds the call made again.
        if self._machine.was_cut_short(self._saved):
            now = processes.thread(self.pid, self.tid)
            if not now.signals.deliverable():
                self._machine.make_again(self._saved)
                self._used = True
        ptrace.set_signal_mask(self.tid, _ALL_SIGNALS)
        self._switch_dispatch((0, 0, 0, 0))

    def _leave_sequence(self) -> None:
        """The kernel would forget a restartable sequence at our call and not abort it any more: abort it now."""
        configuration = ctypes.create_string_buffer(24)
        try:
            size = ptrace.call(ptrace.GET_RSEQ, self.tid, 24, ctypes.addressof(configuration))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EINVAL):  # a kernel without it
                raise
            return
        (area,) = struct.unpack_from("Q", configuration.raw)
        if size < 8 or not area:
            return
        descriptor = self._words(area + _RSEQ_CS_OFFSET, 1)
        sequence = self._words(descriptor[0] + 8, 3) if descriptor and descriptor[0] else ()
        if not sequence:
            return
        start, length, abort = sequence
        if 0 <= self._machine.position(self._saved) - start < length:
            self._machine.move(self._saved, abort)
            self._used = True

    def _words(self, address: int, count: int) -> tuple[int, ...]:
        """Empty where nothing is, whatever the program has said of it."""
        data = read_bytes(self.pid, address, 8 * count)
        return struct.unpack(f"{count}Q", data) if len(data) == 8 * count else ()

    def _dispatch_now(self) -> tuple[int, ...]:
        """Where prctl(PR_SET_SYSCALL_USER_DISPATCH) is on, our calls would be its signal. Zeros where it is off."""
        configuration = ctypes.create_string_buffer(32)
        try:
            ptrace.call(ptrace.GET_DISPATCH, self.tid, 32, ctypes.addressof(configuration))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EINVAL):  # a kernel before 6.4
                raise
        return struct.unpack("4Q", configuration.raw)

    def _switch_dispatch(self, configuration: tuple[int, ...]) -> None:
        if any(self._dispatch):
            data = ctypes.create_string_buffer(struct.pack("4Q", *configuration))
            ptrace.call(ptrace.SET_DISPATCH, self.tid, 32, ctypes.addressof(data))

    def _wait_for_stop(self) -> None:
        """Until it is in the stop that was asked for, or in that of a stopped process (SIGSTOP)."""
        while True:
            status = ptrace.wait(self.tid, self._deadline)
            if status >> 16 == ptrace.EVENT_STOP:
                self._stopped = True
                return
            # A signal that was under way: it takes its course, and the stop follows.
            signal = os.WSTOPSIG(status)
            ptrace.call(ptrace.CONT, self.tid, 0, 0 if signal == ptrace.SYSCALL_STOP else signal)

    def _step(self) -> None:
        """On to the entry or the exit of our system call."""
        give = 0
        while True:
            self._stopped = False
            ptrace.call(ptrace.SYSCALL, self.tid, 0, give)
            status = ptrace.wait(self.tid, self._deadline)
            self._stopped = True
            if os.WSTOPSIG(status) == ptrace.SYSCALL_STOP:
                return
            # SIGSTOP cannot be blocked: given back, it makes a stop of the process out of which we go on.
            give = 0 if status >> 16 == ptrace.EVENT_STOP else os.WSTOPSIG(status)

    def _refusal(self, error: OSError) -> Exception:
        if not processes.threads(self.pid):
            return ProcessGone(f"process {self.pid} is gone")
        now = processes.thread(self.pid, self.tid)
        if now.tracer:
            return Untrackable(_traced_by(self.pid, now.tracer))
        if now.state in "ZX":
            return NotNow(f"thread {self.tid} of process {self.pid} is ending")
        return Untrackable(f"process {self.pid} ({processes.name(self.pid)}) cannot be traced: {error}")


def _traced_by(pid: int, tracer: int) -> str:
    return (
        f"process {pid} ({processes.name(pid)}) is being traced by process {tracer} ({processes.name(tracer)}): "
        "end the debugger or strace first"
    )


def _find_instruction(pid: int, wanted: bytes) -> int:
    """Where the process has a system call instruction: in the vDSO, else in any code."""
    code = [area for area in mappings.read(pid) if "x" in area.permissions and area.name != "[vsyscall]"]
    for area in sorted(code, key=lambda area: area.name != "[vdso]"):
        if area.name == "[vdso]" and _known_offset:
            at = area.start + _known_offset[0]
            if at < area.end and read_bytes(pid, at, len(wanted)) == wanted:
                return at
        for start in range(area.start, area.end, 1 << 20):
            content = read_bytes(pid, start, min(area.end - start, 1 << 20))
            offset = content.find(wanted)
            if offset >= 0:
                if area.name == "[vdso]":
                    _known_offset[:] = [start + offset - area.start]
                return start + offset
    raise Untrackable(f"process {pid} ({processes.name(pid)}) has no system call instruction in its memory")
