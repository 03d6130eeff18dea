"""What differs between processors: registers, and how a system call is made and restarted. x86-64 so far."""

import ctypes
import errno
import os
from typing import Protocol

from migrator.memory.errors import Untrackable


class Machine(Protocol):
    """One kind of processor."""

    syscall_instruction: bytes
    sys_close: int
    sys_userfaultfd: int

    def registers(self) -> ctypes.Structure:
        """An empty set of general registers, as PTRACE_GETREGSET NT_PRSTATUS fills it in."""

    def aim(self, registers: ctypes.Structure, instruction: int, number: int, arguments: tuple[int, ...]) -> None:
        """Have them make a system call at an instruction."""

    def result(self, registers: ctypes.Structure) -> int:
        """Of a system call that has returned: below 0 a negated errno."""

    def position(self, registers: ctypes.Structure) -> int:
        """The address of the next instruction."""

    def move(self, registers: ctypes.Structure, address: int) -> None:
        """Set the address of the next instruction."""

    def was_cut_short(self, registers: ctypes.Structure) -> bool:
        """Whether they are those of a call that returns EINTR because of a stop, and can be made again with the
        same effect. Calls that the kernel restarts by itself are not meant: it does so with unchanged registers."""

    def make_again(self, registers: ctypes.Structure) -> None:
        """Have them make that call again."""


class _Registers(ctypes.Structure):
    # struct user_regs_struct of asm/user_64.h.
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


class X86:
    """x86-64."""

    syscall_instruction = b"\x0f\x05"
    sys_close = 3
    sys_userfaultfd = 323

    # Those of signal(7) that end with EINTR at a stop, though no handler ran, and have done nothing by then: epoll_wait
    # and its kin, semop, semtimedop, sigtimedwait, io_getevents, and on sockets with a timeout accept and those that
    # send and receive. Not connect, which goes on by itself.
    _AGAIN = frozenset((0, 1, 19, 20, 43, 44, 45, 46, 47, 65, 128, 208, 220, 232, 281, 288, 333, 441))

    def registers(self) -> ctypes.Structure:
        return _Registers()

    def aim(self, registers: ctypes.Structure, instruction: int, number: int, arguments: tuple[int, ...]) -> None:
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, value)
        # No call is being returned from: otherwise the kernel would move rip back to restart it.
        registers.rax, registers.orig_rax, registers.rip = number, 2**64 - 1, instruction

    def result(self, registers: ctypes.Structure) -> int:
        return ctypes.c_int64(registers.rax).value

    def position(self, registers: ctypes.Structure) -> int:
        return int(registers.rip)

    def move(self, registers: ctypes.Structure, address: int) -> None:
        registers.rip = address

    def was_cut_short(self, registers: ctypes.Structure) -> bool:
        return self.result(registers) == -errno.EINTR and registers.orig_rax in self._AGAIN

    def make_again(self, registers: ctypes.Structure) -> None:
        registers.rax, registers.orig_rax = registers.orig_rax, 2**64 - 1
        registers.rip -= len(self.syscall_instruction)


_MACHINES: dict[str, type[X86]] = {"x86_64": X86}


def this() -> Machine:
    """Raises Untrackable where nothing is known of this processor."""
    name = os.uname().machine
    if name not in _MACHINES:
        raise Untrackable(f"memory cannot be tracked by write protection on {name}, only on {', '.join(_MACHINES)}")
    return _MACHINES[name]()
