"""Just enough of bpf(2) to mark the blocks that a device has written, and to read what the kernel knows of mappings: an
assembler, a map, programs on tracepoints, and iterators.

Documents: Documentation/bpf/standardization/instruction-set.rst and include/uapi/linux/bpf.h.
"""

import ctypes
import mmap
import os
import platform
import struct
from contextlib import ExitStack, suppress
from typing import Self

from blockdev import btf
from blockdev.errors import BlockError

_SYSCALL = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _PROG_LOAD, _INFO_BY_FD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE, _ITER_CREATE = 0, 5, 15, 17, 28, 33
_NAMES = {
    _MAP_CREATE: "BPF_MAP_CREATE",
    _PROG_LOAD: "BPF_PROG_LOAD",
    _INFO_BY_FD: "BPF_OBJ_GET_INFO_BY_FD",
    _RAW_TRACEPOINT_OPEN: "BPF_RAW_TRACEPOINT_OPEN",
    _LINK_CREATE: "BPF_LINK_CREATE",
    _ITER_CREATE: "BPF_ITER_CREATE",
}
_ARRAY_MAP, _MMAPABLE = 2, 1 << 10
_TRACING_PROGRAM, _TRACE_RAW_TRACEPOINT, _TRACE_ITERATOR = 26, 23, 28
# struct bpf_prog_info up to recursion_misses, which is its last u64 here (Linux 5.12)
_INFO_BYTES, _MISSES_AT = 216, 208
_LOG_BYTES = 1 << 16
_LOAD_TRIES = 8
_READ_BYTES = 1 << 16

# Opcodes, named by what they do.
LOAD32, LOAD64, LOAD_IMMEDIATE64 = 0x61, 0x79, 0x18
STORE8_IMMEDIATE, STORE32, STORE64 = 0x72, 0x63, 0x7B
SET, SET32, SET_IMMEDIATE, ADD, ADD_IMMEDIATE, AND_IMMEDIATE = 0xBF, 0xBC, 0xB7, 0x0F, 0x07, 0x57
SUBTRACT, SHIFT_LEFT_IMMEDIATE, SHIFT_RIGHT_IMMEDIATE = 0x1F, 0x67, 0x77
JUMP, JUMP_EQUAL, JUMP_EQUAL_IMMEDIATE, JUMP_NOT_EQUAL, JUMP_NOT_EQUAL_IMMEDIATE = 0x05, 0x1D, 0x15, 0x5D, 0x55
JUMP_NOT_EQUAL32_IMMEDIATE = 0x56
JUMP_AT_LEAST, JUMP_AT_LEAST_IMMEDIATE, JUMP_ABOVE, JUMP_BELOW, JUMP_BELOW_IMMEDIATE = 0x3D, 0x35, 0x2D, 0xAD, 0xA5
CALL, EXIT = 0x85, 0x95
FRAME = 10  # the register with the end of the stack
# bpf_map_lookup_elem, bpf_get_smp_processor_id, bpf_seq_write
LOOKUP, PROCESSOR, WRITE = 1, 8, 127
# Source registers of LOAD_IMMEDIATE64: a map, and the address of a byte in the value of a map that has only one.
_MAP, _MAP_VALUE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


class Assembler:
    """Instructions with jumps to labels."""

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

    def map(self, target: int, map_descriptor: int) -> None:
        """A map, as helpers take it."""
        self.emit(LOAD_IMMEDIATE64, target, _MAP, value=map_descriptor)
        self.emit(0)

    def map_value(self, target: int, map_descriptor: int, offset: int = 0) -> None:
        """The address of a byte in the only value of an array map."""
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
    """An array map of `count` values of `length` bytes, one after the other, that this process and BPF programs share.

    `length` is a multiple of 8, or `count` is 1. Raises OSError.
    """

    def __init__(self, length: int, count: int = 1) -> None:
        attributes = struct.pack("=5I", _ARRAY_MAP, 4, length, count, _MMAPABLE) + bytes(28)
        self.descriptor = _bpf(_MAP_CREATE, attributes)
        try:
            self.bytes = mmap.mmap(self.descriptor, length * count)
        except BaseException:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        """The kernel frees it when no program uses it any more."""
        self.bytes.close()
        os.close(self.descriptor)


class RawTracepointProgram:
    """A program on a tracepoint's own arguments (tp_btf), from now until `close`. It does not outlive this process.

    Its first argument's type is the kernel's, so that it reads through pointers without a helper and the verifier
    checks each access. Needs CAP_BPF and CAP_PERFMON, and a kernel with BTF and a BPF JIT. Raises OSError, BlockError.
    """

    def __init__(self, tracepoint: str, code: bytes) -> None:
        with ExitStack() as undo:
            traced = btf.kernel().find(btf.TYPEDEF, f"btf_trace_{tracepoint}")
            self._program = _load(code, "block_writes", _TRACE_RAW_TRACEPOINT, traced)
            undo.callback(os.close, self._program)
            self.missed()
            self._link = _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QII", 0, self._program, 0))
            undo.pop_all()

    def missed(self) -> int:
        """Events that came while this very program ran on the same processor, and were skipped.

        Of this program type the kernel skips no others, and counts each of these, from Linux 6.1 on (__bpf_trace_run);
        before that it skips none. Raises BlockError where it has no such counter: before 5.12.
        """
        info = ctypes.create_string_buffer(_INFO_BYTES)
        request = bytearray(struct.pack("=IIQ", self._program, _INFO_BYTES, ctypes.addressof(info)))
        buffer = (ctypes.c_char * len(request)).from_buffer(request)
        _call(_INFO_BY_FD, buffer, len(request))
        filled = struct.unpack_from("=I", request, 4)[0]
        if filled < _INFO_BYTES:
            raise BlockError("this kernel does not count what a BPF program misses (recursion_misses): it takes 5.12")
        (missed,) = struct.unpack_from("=Q", info, _MISSES_AT)
        return int(missed)

    def close(self) -> None:
        """Detach and unload."""
        os.close(self._link)
        os.close(self._program)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TaskIterator:
    """A program that is run for each part of a task, such as a mapping (bpf_iter_task_vma, Linux 5.12).

    Of one task from Linux 6.1 on. Needs what RawTracepointProgram needs. Raises OSError, BlockError.
    """

    def __init__(self, parts: str, code: bytes) -> None:
        iterated = btf.kernel().find(btf.FUNCTION, f"bpf_iter_{parts}")
        self._program = _load(code, parts, _TRACE_ITERATOR, iterated)

    def read(self, tid: int) -> bytes:
        """What the program has written (WRITE) for a thread; nothing if that is gone."""
        task = ctypes.create_string_buffer(struct.pack("=4I", tid, 0, 0, 0))
        where = ctypes.addressof(task), 16
        link = _bpf(_LINK_CREATE, struct.pack("=IIIIQII", self._program, 0, _TRACE_ITERATOR, 0, *where, 0))
        try:
            iterator = _bpf(_ITER_CREATE, struct.pack("=II", link, 0))
        finally:
            os.close(link)
        found = []
        try:
            while part := os.read(iterator, _READ_BYTES):
                found.append(part)
        finally:
            os.close(iterator)
        return b"".join(found)

    def close(self) -> None:
        """Unload it."""
        os.close(self._program)


def _load(code: bytes, name: str, attachment: int, type_number: int) -> int:
    text, license_ = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")

    def attributes(log: "ctypes.Array[ctypes.c_char] | None") -> bytes:
        logging = (1, _LOG_BYTES, ctypes.addressof(log)) if log else (0, 0, 0)
        return struct.pack(
            "=IIQQIIQII16sIIIIQIIQIIII",
            _TRACING_PROGRAM, len(code) // 8, ctypes.addressof(text), ctypes.addressof(license_), *logging,
            0, 0, name.encode()[:15], 0, attachment, 0, 0, 0, 0, 0, 0, 0, type_number, 0, 0,
        )  # fmt: skip

    try:
        return _load_once(attributes(None))
    except OSError as error:
        # What the verifier has to say costs time and a buffer, so it is asked only if there is something to say.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return _load_once(attributes(log))
        except OSError:
            said = log.value.decode(errors="replace").strip().splitlines()[-3:]
            raise OSError(error.errno, "; ".join([str(error.strerror), *said])) from error


def _load_once(attributes: bytes) -> int:
    """The verifier gives up when its process gets a signal (EAGAIN); there are not many of them in a row."""
    for _ in range(_LOAD_TRIES - 1):
        with suppress(BlockingIOError):
            return _bpf(_PROG_LOAD, attributes)
    return _bpf(_PROG_LOAD, attributes)


def _bpf(command: int, attributes: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes))


def _call(command: int, buffer: object, length: int) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise BlockError(f"eBPF is not known for {platform.machine()}")
    result = int(_libc.syscall(number, command, buffer, length))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{_NAMES[command]}: {os.strerror(ctypes.get_errno())}")
    return result
