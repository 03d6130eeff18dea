"""What CRIU reads of /proc/PID/smaps, made without what takes long there.

CRIU needs the mappings and their flags. For the rest of that file the kernel walks through all pages: 15 ms for 1 GiB,
while the container stands still (Linux 6.18). The mappings are in /proc/PID/maps, and a BPF iterator tells the flags.
It also tells how the file of a mapping is open, for which CRIU looks at each link of /proc/PID/map_files: 6 us each.
`scripts/criu-shim.c` gives CRIU what is written here. See proc_pid_smaps(5), Documentation/bpf/bpf_iterators.rst.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from itertools import starmap
from pathlib import Path

import structlog

from blockdev import bpf, btf
from migrator.errors import ExecutionError
from migrator.memory import ProcessGone, mappings
from migrator.memory.own import address_of

FOLDER = "MIGRATOR_SMAPS"
"""In CRIU's environment: where it finds two files for each process, by pid: of lines, and of mappings with modes."""

# Bits of vm_flags in linux/mm.h with their names in smaps: these since Linux 4.14, the last since 6.11.
_NAMES = {
    0: "rd", 1: "wr", 2: "ex", 3: "sh", 4: "mr", 5: "mw", 6: "me", 7: "ms", 8: "gd", 9: "um", 10: "pf", 12: "uw",
    13: "lo", 14: "io", 15: "sr", 16: "rr", 17: "dc", 18: "de", 20: "ac", 21: "nr", 22: "ht", 23: "sf", 25: "wf",
    26: "dd", 27: "sd", 28: "mm", 29: "hg", 30: "nh", 31: "mg", 40: "dp",
}  # fmt: skip
_KNOWN = sum(1 << bit for bit in _NAMES)
# The kernel's own, at an address of its own: in maps, and no part of the process' memory.
_VSYSCALL, _EXECUTABLE = b"[vsyscall]", 1 << 2
_MAPPING, _MODE = struct.Struct("=QQQQ"), struct.Struct("=QQQ")
# What map_files shows for the two lowest bits of f_mode, to read and to write (linux/fs.h, fs/proc/base.c).
_SHOWN = (0, 0o400, 0o200, 0o600)
# MAP_DROPPABLE (linux/mman.h): glibc 2.41 has such a mapping for its random numbers.
_DROPPABLE = mmap.MAP_ANONYMOUS | 0x08
_PRIVATE, _NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x4000
_KINDS = [
    (mmap.MAP_SHARED, None),
    (_PRIVATE | _NORESERVE, None),
    (_PRIVATE, mmap.MADV_SEQUENTIAL),
    (_PRIVATE, mmap.MADV_RANDOM),
    (_PRIVATE, mmap.MADV_DONTFORK),
    (_PRIVATE, mmap.MADV_DONTDUMP),
    (_PRIVATE, mmap.MADV_NOHUGEPAGE),
    (_PRIVATE, mmap.MADV_HUGEPAGE),
    (_PRIVATE, None),
]
_TRIES = 5
_DIGITS = [b"%x" % digit for digit in range(16)]

log = structlog.get_logger()


class Smaps:
    """The iterator, loaded. Close it. Raises OSError and BlockError where it cannot be, and ExecutionError where it
    tells something else than the kernel itself."""

    def __init__(self) -> None:
        self._iterator = bpf.TaskIterator("task_vma", _program())
        try:
            self._try()
        except BaseException:
            self.close()
            raise

    def read(self, pid: int) -> bytes:
        """What the iterator tells of a process."""
        return self._iterator.read(pid)

    def close(self) -> None:
        """Unload it."""
        self._iterator.close()

    def _try(self) -> None:
        """On this process, with mappings of many kinds. Its threads may change others meanwhile."""
        with ExitStack() as stack:
            with suppress(OSError):  # before Linux 6.11
                stack.enter_context(mmap.mmap(-1, mmap.PAGESIZE, _DROPPABLE))
            for how, advice in _KINDS:
                made = stack.enter_context(mmap.mmap(-1, mmap.PAGESIZE, how))
                if advice is not None:
                    made.madvise(advice)
            locked = ctypes.c_void_p(address_of(made)), ctypes.c_size_t(mmap.PAGESIZE)
            ctypes.CDLL(None).mlock(*locked)
            for _ in range(_TRIES):
                told = _composed(mappings.text(os.getpid()), self.read(os.getpid()))
                if told is not None and _agrees(*told):
                    return
        raise ExecutionError("a BPF iterator tells other flags of mappings than /proc/PID/smaps")


class SmapsFolder:
    """The files for CRIU of one container's processes. They may be written while it runs: when it stands still only
    those of processes whose mappings have changed are written again."""

    def __init__(self, smaps: Smaps, folder: Path) -> None:
        self._smaps, self._folder = smaps, folder
        # By a hash that nobody can foresee: what it is of may be much.
        self._written: dict[int, int] = {}
        folder.mkdir(mode=0o700, exist_ok=True)

    def write(self, pids: Iterable[int]) -> None:
        """Where it cannot be told, or a mapping has a flag that is not known here, CRIU asks the kernel."""
        for pid in pids:
            try:
                told = mappings.text(pid), self._smaps.read(pid)
                if self._written.get(pid) != hash(told):
                    self._remove(pid)
                    self._write(pid, *told)
            except (ProcessGone, OSError) as error:
                self._remove(pid)
                log.info("flags of mappings", pid=pid, reason=str(error))

    def _write(self, pid: int, text: bytes, rows: bytes) -> None:
        if (composed := _composed(text, rows)) is not None:
            lines, modes = composed
            (self._folder / f"{pid}.modes").write_bytes(b"".join(starmap(_MODE.pack, modes)))
            (self._folder / str(pid)).write_bytes(lines)
            self._written[pid] = hash((text, rows))

    def _remove(self, pid: int) -> None:
        self._written.pop(pid, None)
        # Also what could be written only in part: CRIU would dump as many mappings.
        (self._folder / str(pid)).unlink(missing_ok=True)


def _composed(text: bytes, rows: bytes) -> tuple[bytes, list[tuple[int, int, int]]] | None:
    """Of /proc/PID/maps and of what the iterator tells: the lines for CRIU, and mappings with the modes of their links
    in map_files, 0 for those without."""
    found = list(_MAPPING.iter_unpack(rows))
    modes = [(start, end, _SHOWN[how & 3]) for start, end, _, how in found]
    flags = {start: (end, bits) for start, end, bits, _ in found}
    texts: dict[int, bytes] = {}
    lines = []
    for line in filter(None, text.split(b"\n")):
        start, end = (int(word, 16) for word in line[: line.index(b" ")].split(b"-"))
        stop, bits = (end, _EXECUTABLE) if line.endswith(_VSYSCALL) else flags.pop(start, (0, 0))
        if stop != end or bits & ~_KNOWN:
            return None
        if bits not in texts:
            words = "".join(f"{name} " for bit, name in _NAMES.items() if bits >> bit & 1)
            texts[bits] = f"\nVmFlags: {words}\n".encode()
        lines += [line, texts[bits]]
    return None if flags else (b"".join(lines), modes)


def _is_read(line: bytes) -> bool:
    """By CRIU, of the lines of smaps."""
    return line[:1] in _DIGITS or line.startswith(b"VmFlags")


def _agrees(lines: bytes, modes: list[tuple[int, int, int]]) -> bool:
    """Whether the kernel itself says the same of this process."""
    smaps = Path("/proc/self/smaps").read_bytes().split(b"\n")
    links = {link.name: link.lstat().st_mode & _SHOWN[-1] for link in Path("/proc/self/map_files").iterdir()}
    told = {f"{start:x}-{end:x}": mode for start, end, mode in modes if mode}
    return lines.split(b"\n")[:-1] == [*filter(_is_read, smaps)] and told == links


def _program() -> bytes:
    """For each mapping: its start, its end, its flags, and f_mode of its file."""
    a, types = bpf.Assembler(), btf.kernel()
    a.emit(bpf.LOAD64, 6, 1, 0)  # struct bpf_iter__task_vma: what it is about, the task, the mapping or none
    a.emit(bpf.LOAD64, 7, 1, 16)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 7, value=0, to="out")
    for place, member in enumerate(("vm_start", "vm_end", "vm_flags")):
        a.emit(bpf.LOAD64, 2, 7, types.offset("vm_area_struct", member))
        a.emit(bpf.STORE64, bpf.FRAME, 2, 8 * place - _MAPPING.size)
    a.emit(bpf.LOAD64, 3, 7, types.offset("vm_area_struct", "vm_file"))
    a.emit(bpf.SET_IMMEDIATE, 2)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 3, value=0, to="no file")
    a.emit(bpf.LOAD32, 2, 3, types.offset("file", "f_mode"))
    a.label("no file")
    a.emit(bpf.STORE64, bpf.FRAME, 2, -8)
    a.emit(bpf.LOAD64, 1, 6, types.offset("bpf_iter_meta", "seq"))
    a.emit(bpf.SET, 2, bpf.FRAME)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=-_MAPPING.size)
    a.emit(bpf.SET_IMMEDIATE, 3, value=_MAPPING.size)
    a.emit(bpf.CALL, value=bpf.WRITE)
    a.label("out")
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
    return a.code()
