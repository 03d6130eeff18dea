"""Just enough of bpf(2) to mark the blocks that a device has written: an assembler, a map, a program, an attachment.

Documents: Documentation/bpf/standardization/instruction-set.rst, include/uapi/linux/bpf.h and perf_event.h.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import re
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from blockdev.errors import BlockError

_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
_MAP_CREATE, _PROG_LOAD = 0, 5
_ARRAY_MAP, _TRACEPOINT_PROGRAM, _MMAPABLE = 2, 5, 1 << 10
_PERF_TRACEPOINT = 2
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400
_FD_CLOEXEC = 8

# Opcodes, named by what they do.
LOAD8, LOAD32, LOAD64, LOAD_IMMEDIATE64 = 0x71, 0x61, 0x79, 0x18
STORE8_IMMEDIATE = 0x72
SET, SET_IMMEDIATE, ADD, ADD_IMMEDIATE, SUBTRACT = 0xBF, 0xB7, 0x0F, 0x07, 0x1F
SHIFT_LEFT_IMMEDIATE, SHIFT_RIGHT_IMMEDIATE = 0x67, 0x77
JUMP_EQUAL_IMMEDIATE, JUMP_NOT_EQUAL_IMMEDIATE, JUMP_AT_LEAST, JUMP_AT_LEAST_IMMEDIATE = 0x15, 0x56, 0x3D, 0x35
JUMP_BELOW_IMMEDIATE, JUMP_AT_MOST_IMMEDIATE, EXIT = 0xA5, 0xB5, 0x95
_MAP_VALUE = 2  # source register of LOAD_IMMEDIATE64: the address of a map's value, with an offset into it

_libc = ctypes.CDLL(None, use_errno=True)


class Assembler:
    """Instructions with forward jumps to labels."""

    def __init__(self) -> None:
        self._code: list[bytes] = []
        self._jumps: dict[int, str] = {}
        self._labels: dict[str, int] = {}

    def emit(
        self, opcode: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0, to: str = ""
    ) -> None:
        """One instruction; `to` names the label that it jumps to."""
        if to:
            self._jumps[len(self._code)] = to
        self._code.append(struct.pack("<BBhi", opcode, source << 4 | target, offset, value))

    def here(self) -> int:
        """The number of the next instruction."""
        return len(self._code)

    def map_value(self, target: int, map_descriptor: int, offset: int = 0) -> None:
        """The address of a byte in the first value of an array map."""
        self.emit(LOAD_IMMEDIATE64, target, _MAP_VALUE, value=map_descriptor)
        self.emit(0, value=offset)

    def label(self, name: str) -> None:
        """The place of the next instruction."""
        self._labels[name] = len(self._code)

    def code(self) -> bytes:
        """The finished program."""
        code = [bytearray(instruction) for instruction in self._code]
        for at, name in self._jumps.items():
            struct.pack_into("<h", code[at], 2, self._labels[name] - at - 1)
        return b"".join(code)


class ByteMap:
    """An array map of bytes that this process and BPF programs share. Raises OSError, E2BIG for more than 4 MiB on
    kernels that allow a value no more than kmalloc gives."""

    def __init__(self, length: int) -> None:
        self.length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = _bpf(_MAP_CREATE, struct.pack("=5I", _ARRAY_MAP, 4, self.length, 1, _MMAPABLE) + bytes(28))
        try:
            self.bytes = mmap.mmap(self.descriptor, self.length)
        except BaseException:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        """The kernel frees it when no program uses it any more."""
        self.bytes.close()
        os.close(self.descriptor)


class TracepointProgram:
    """A program on a tracepoint, from now until `close`. Raises OSError, and BlockError on kernels before 5.12."""

    def __init__(self, tracepoint: str, code: bytes) -> None:
        text, license_ = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
        attributes = struct.pack(
            "=IIQQIIQII", _TRACEPOINT_PROGRAM, len(code) // 8, ctypes.addressof(text), ctypes.addressof(license_),
            0, 0, 0, 0, 0,
        )  # fmt: skip
        with ExitStack() as undo:
            self._program = _bpf(_PROG_LOAD, attributes)
            undo.callback(os.close, self._program)
            self.missed()
            self._event = _perf_event(int((_events() / tracepoint / "id").read_text()))
            undo.callback(os.close, self._event)
            fcntl.ioctl(self._event, _PERF_SET_BPF, self._program)
            fcntl.ioctl(self._event, _PERF_ENABLE, 0)
            undo.pop_all()

    def missed(self) -> int:
        """Events that found the processor inside another BPF program and were skipped. Raises BlockError where the
        kernel does not count them."""
        for line in Path(f"/proc/self/fdinfo/{self._program}").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "recursion_misses":
                return int(value)
        raise BlockError("this kernel does not count what a BPF program misses (recursion_misses): it takes Linux 5.12")

    def close(self) -> None:
        """Detach and unload."""
        os.close(self._event)
        os.close(self._program)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fields(tracepoint: str) -> dict[str, int]:
    """Offsets of a tracepoint's fields by name, from its format file (Documentation/trace/events.rst)."""
    text = (_events() / tracepoint / "format").read_text()
    return {m[1]: int(m[2]) for m in re.finditer(r"field:[^;]*?(\w+)(?:\[\w*\])?;\s+offset:(\d+)", text)}


def _events() -> Path:
    for root in (Path("/sys/kernel/tracing/events"), Path("/sys/kernel/debug/tracing/events")):
        if root.is_dir():
            return root
    from blockdev import kernel

    kernel.mount("tracefs", Path("/sys/kernel/tracing"), "tracefs")
    return Path("/sys/kernel/tracing/events")


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return _syscall(0, f"bpf command {command}", command, buffer, len(attributes))


def _perf_event(identity: int) -> int:
    attributes = struct.pack("=IIQQQQ", _PERF_TRACEPOINT, 112, identity, 1, 0, 0) + bytes(72)
    # Any one processor serves: the program is attached to the tracepoint itself, which all of them share.
    return _syscall(1, "perf_event_open", ctypes.create_string_buffer(attributes), -1, 0, -1, _FD_CLOEXEC)


def _syscall(which: int, name: str, *arguments: object) -> int:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise OSError(f"{name}: unknown processor architecture {platform.machine()}")
    result = int(_libc.syscall(numbers[which], *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
