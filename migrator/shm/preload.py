"""CRIU kept from dumping shared memory that was sent before: it is told that there is nothing but a hole.

CRIU asks by lseek(2) with SEEK_DATA where an object of shared memory has data, and copies that inside the freeze, of
the whole object, whatever its parent dump has (criu/shmem.c, 4.2). So a library that is loaded before the C library
(ld.so(8), LD_PRELOAD) answers this question with ENXIO for the objects in a table: it has CRIU ask for what is behind
the object's end. The library is this module's own, made for one dump, since it has a dozen instructions; the table is a
part of its file, which is mapped and filled in later.

seccomp cannot do it: who has a filter may not suspend those of the processes that it dumps (PTRACE_O_SUSPEND_SECCOMP).
"""

import os
import platform
import struct
from collections.abc import Iterable

MACHINE = "x86_64"
MOST = 4096

# Where the parts of the library are, in its file as in memory: three mappings of whole pages.
_CODE, _DYNAMIC, _TABLE = 0x800, 0x2000, 0x3000
_GOT = _DYNAMIC + 0x800
# st_dev, st_ino, st_ctim; a device of 0 is the end.
_ENTRY = struct.Struct("<QQqq")

# lseek64(edi: descriptor, rsi: offset, edx: whence). Offsets in struct stat: st_dev 0, st_ino 8, st_ctim 104.
_BEFORE_TABLE = bytes.fromhex(
    "83fa03"  # cmp edx, SEEK_DATA
    "7572"  # jne out
    "57 56 52"  # push rdi, rsi, rdx
    "4881ec90000000"  # sub rsp, sizeof(struct stat)
    "b805000000 4889e6 0f05"  # mov eax, SYS_fstat; mov rsi, rsp; syscall
    "85c0 7550"  # test eax, eax; jne restore
    "4c8d05"  # lea r8, [rip + table]
)
_AFTER_TABLE = bytes.fromhex(
    "498b00 4885c0 7441"  # next: mov rax, [r8]; test rax, rax; je restore
    "483b0424 7535"  # cmp rax, [rsp]; jne skip
    "498b4008 483b442408 752a"  # mov rax, [r8 + 8]; cmp rax, [rsp + 8]; jne skip
    "498b4010 483b442468 751f"  # mov rax, [r8 + 16]; cmp rax, [rsp + 104]; jne skip
    "498b4018 483b442470 7514"  # mov rax, [r8 + 24]; cmp rax, [rsp + 112]; jne skip
    "48b80000000000000040 4889842498000000"  # mov rax, 1 << 62; mov [rsp + 152], rax: the pushed offset
    "eb06"  # jmp restore
    "4983c020 ebb7"  # skip: add r8, 32; jmp next
    "4881c490000000"  # restore: add rsp, sizeof(struct stat)
    "5a 5e 5f"  # pop rdx, rsi, rdi
    "ff25"  # out: jmp [rip + lseek]
)

# Of elf.h.
_LOAD, _IS_DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_HASH, _STRTAB, _SYMTAB, _RELA, _RELASZ, _RELAENT, _STRSZ, _SYMENT = 4, 5, 6, 7, 8, 9, 10, 11
_GLOBAL_FUNCTION, _R_X86_64_GLOB_DAT = 0x12, 6


class LeaveOut:
    """The library in a memfd of its own. It works from when `tell` was called on, in what was started with it.

    `descriptor` has to be passed on to the command, and `environment` is to be added to the command's.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("migrator-criu")
        os.pwrite(self.descriptor, _library(), 0)
        os.ftruncate(self.descriptor, _TABLE + (MOST + 1) * _ENTRY.size)
        self.environment = {"LD_PRELOAD": f"/proc/self/fd/{self.descriptor}"}

    def tell(self, objects: Iterable[os.stat_result]) -> None:
        """Which objects have nothing but a hole, by their state as it is then: they must not change any more."""
        entries = [_ENTRY.pack(item.st_dev, item.st_ino, *divmod(item.st_ctime_ns, 10**9)) for item in objects]
        if len(entries) > MOST:
            raise ValueError(f"{len(entries)} objects; {MOST} is the limit")
        os.pwrite(self.descriptor, b"".join(entries), _TABLE)

    def close(self) -> None:
        """What was started keeps it."""
        os.close(self.descriptor)


def works() -> bool:
    """Whether the library is for this machine."""
    return platform.machine() == MACHINE


def _library() -> bytes:
    """A shared object with lseek64, which needs the C library's lseek."""
    names = b"\0lseek64\0lseek\0"
    symbols = [
        bytes(24),
        struct.pack("<IBBHQQ", 1, _GLOBAL_FUNCTION, 0, 1, _CODE, 0),
        struct.pack("<IBBHQQ", 9, _GLOBAL_FUNCTION, 0, 0, 0, 0),
    ]
    relocation = struct.pack("<QQq", _GOT, 2 << 32 | _R_X86_64_GLOB_DAT, 0)
    # One bucket with both names.
    table = struct.pack("<7I", 1, 3, 1, 0, 2, 0, 0)
    parts: dict[int, bytes] = {}
    at = 0x400
    places = []
    for part in (b"".join(symbols), names, table, relocation):
        parts[at] = part
        places.append(at)
        at += -(-len(part) // 16) * 16
    symbols_at, names_at, table_at, relocation_at = places
    dynamic = [
        (_HASH, table_at), (_STRTAB, names_at), (_SYMTAB, symbols_at), (_STRSZ, len(names)), (_SYMENT, 24),
        (_RELA, relocation_at), (_RELASZ, len(relocation)), (_RELAENT, 24), (0, 0),
    ]  # fmt: skip
    parts[_DYNAMIC] = b"".join(struct.pack("<QQ", *item) for item in dynamic)
    code_end = _CODE + len(_BEFORE_TABLE) + 4
    code = _BEFORE_TABLE + struct.pack("<i", _TABLE - code_end) + _AFTER_TABLE
    parts[_CODE] = code + struct.pack("<i", _GOT - (_CODE + len(code) + 4))
    table_bytes = (MOST + 1) * _ENTRY.size
    segments = [
        (_LOAD, _READ | _EXECUTE, 0, _CODE + 0x100, 0x1000),
        (_LOAD, _READ | _WRITE, _DYNAMIC, 0x1000, 0x1000),
        (_LOAD, _READ, _TABLE, table_bytes, 0x1000),
        (_IS_DYNAMIC, _READ | _WRITE, _DYNAMIC, len(parts[_DYNAMIC]), 8),
        (_GNU_STACK, _READ | _WRITE, 0, 0, 16),
    ]
    # ET_DYN for EM_X86_64; program headers follow at once, there are no sections.
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    parts[0] = header + b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, start, start, start, size, size, align)
        for kind, flags, start, size, align in segments
    )
    result = bytearray(_TABLE)
    for start, part in parts.items():
        result[start : start + len(part)] = part
    return bytes(result)
