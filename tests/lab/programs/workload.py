"""What runs inside a container and tells whether it has survived; standard library only.

workload.py FEATURE        threads, tree, sockets, timers, signals, deleted, shm, pool or lines; a number may follow

It answers each line that comes to TCP port 7000 with one JSON object:
- wrong: what is not as it must be, in words; empty in a healthy process
- same: values that nothing but a bug changes
- grows: counters that go on
"""

import array
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PORT = 7000
PAGE = 4096
Facts = dict[str, object]
MULTIPLIER, INCREMENT, MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1


def generated(seed: int, length: int) -> bytes:
    """The same bytes for the same seed."""
    return random.Random(seed).randbytes(length)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def after_steps(state: int, steps: int) -> int:
    """A linear congruential generator's state after so many steps, without taking them."""
    multiplier, increment, result, offset = MULTIPLIER, INCREMENT, 1, 0
    while steps:
        if steps & 1:
            result, offset = result * multiplier & MASK, (offset * multiplier + increment) & MASK
        increment = (multiplier + 1) * increment & MASK
        multiplier = multiplier * multiplier & MASK
        steps >>= 1
    return (state * result + offset) & MASK


def threads() -> Callable[[], Facts]:
    """Twelve threads, each with a chain of numbers and memory of its own, and one lock that they all take."""

    class Worker(threading.Thread):
        def __init__(self, number: int) -> None:
            super().__init__(daemon=True)
            self.number, self.steps, self.state = number, 0, number
            self.memory = bytearray(generated(number, 1 << 20))

        def run(self) -> None:
            while True:
                with lock:
                    self.state = (self.state * MULTIPLIER + INCREMENT) & MASK
                    self.steps += 1
                time.sleep(0.001)

    lock = threading.Lock()
    workers = [Worker(number) for number in range(12)]
    for worker in workers:
        worker.start()

    def facts() -> Facts:
        with lock:
            wrong = [f"thread {w.number} ended" for w in workers if not w.is_alive()]
            wrong += [f"chain of {w.number}" for w in workers if after_steps(w.number, w.steps) != w.state]
            wrong += [
                f"memory of {w.number}" for w in workers if digest(w.memory) != digest(generated(w.number, 1 << 20))
            ]
            return {
                "wrong": wrong,
                "same": {"ids": [w.native_id for w in workers]},
                "grows": {str(w.number): w.steps for w in workers},
            }

    return facts


def tree() -> Callable[[], Facts]:
    """Thirty processes with this one: a ring of pipes hands a number on; some have sessions and groups of their own."""
    count = 29
    pipes = [os.pipe() for _ in range(count + 1)]
    # Between the first and the second member, never read before the end: what a full pipe holds must stay.
    parked = os.pipe()
    content = generated(7, 65536)
    os.write(parked[1], content)
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            if number % 5 == 1:
                os.setsid()
            elif number % 5 == 2:
                os.setpgid(0, 0)
            os.chdir("/tmp" if number % 2 else "/etc")
            while True:
                (value,) = struct.unpack("Q", os.read(pipes[number][0], 8))
                os.write(pipes[number + 1][1], struct.pack("Q", value + 1))
        children.append(pid)
    rounds, wrong_values = [0], [0]

    def turn() -> None:
        value = 0
        while True:
            os.write(pipes[0][1], struct.pack("Q", value))
            (back,) = struct.unpack("Q", os.read(pipes[count][0], 8))
            wrong_values[0] += back != value + count
            value = back
            rounds[0] += 1
            time.sleep(0.002)

    threading.Thread(target=turn, daemon=True).start()

    def peek_parked() -> str:
        data = os.read(parked[0], 65536)
        os.write(parked[1], data)
        return digest(data)

    def facts() -> Facts:
        wrong = [f"{wrong_values[0]} rounds came back wrong"] if wrong_values[0] else []
        if peek_parked() != digest(content):
            wrong.append("the content of the full pipe")
        processes = []
        for pid in children:
            if os.waitpid(pid, os.WNOHANG)[0]:
                wrong.append(f"process {pid} ended")
            folder = str(Path(f"/proc/{pid}/cwd").readlink())
            processes.append([pid, os.getpgid(pid), os.getsid(pid), folder])
        return {"wrong": wrong, "same": {"processes": processes}, "grows": {"rounds": rounds[0]}}

    return facts


def sockets() -> Callable[[], Facts]:
    """UNIX sockets of three types in pairs, a listener with a name, and one in the abstract space."""
    types = {"stream": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
    pairs = {name: socket.socketpair(socket.AF_UNIX, kind) for name, kind in types.items()}
    waiting = {name: generated(number, 4000) for number, name in enumerate(pairs)}
    for name, (left, _) in pairs.items():
        left.send(waiting[name])
    listeners = {}
    for address in ("/tmp/workload.sock", "\0workload"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(5)
        listeners[address] = listener
    kept = {}
    for address, listener in listeners.items():
        client = socket.socket(socket.AF_UNIX)
        client.connect(address)
        kept[address] = (client, listener.accept()[0])
    served = [0]

    def facts() -> Facts:
        wrong = []
        for name, (left, right) in pairs.items():
            if right.recv(8000, socket.MSG_DONTWAIT) != waiting[name]:
                wrong.append(f"what waited in the {name} socket")
            left.send(waiting[name])
        for address, (client, server) in kept.items():
            client.sendall(b"there")
            if server.recv(100) != b"there":
                wrong.append(f"the old connection to {address!r}")
        for address, listener in listeners.items():
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(address)
                with listener.accept()[0] as server:
                    server.sendall(b"back")
                    if client.recv(100) != b"back":
                        wrong.append(f"a new connection to {address!r}")
        served[0] += 1
        return {"wrong": wrong, "same": {}, "grows": {"served": served[0]}}

    return facts


class _SignalEvent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_int * 12),
    ]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


def timers() -> Callable[[], Facts]:
    """A POSIX timer, an interval timer, a timer in a descriptor, and one far in the future."""
    libc = ctypes.CDLL(None, use_errno=True)
    counts = {"posix": 0, "interval": 0, "descriptor": 0}

    def counted(name: str) -> Callable[[int, object], None]:
        def handler(_number: int, _frame: object) -> None:
            counts[name] += 1

        return handler

    def posix_timer(number: int, period: _TimerSpec) -> ctypes.c_void_p:
        timer = ctypes.c_void_p()
        event = _SignalEvent(None, number, 0)
        if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            raise OSError(ctypes.get_errno(), "timer_create")
        if libc.timer_settime(timer, 0, ctypes.byref(period), None):
            raise OSError(ctypes.get_errno(), "timer_settime")
        return timer

    signal.signal(signal.SIGRTMIN, counted("posix"))
    signal.signal(signal.SIGALRM, counted("interval"))
    signal.signal(signal.SIGRTMIN + 1, counted("far"))
    posix_timer(signal.SIGRTMIN, _TimerSpec(0, 20_000_000, 0, 20_000_000))
    far = posix_timer(signal.SIGRTMIN + 1, _TimerSpec(0, 0, 5000, 0))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    descriptor = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    libc.timerfd_settime(descriptor, 0, ctypes.byref(_TimerSpec(0, 20_000_000, 0, 20_000_000)), None)

    def read_descriptor() -> None:
        while True:
            counts["descriptor"] += struct.unpack("Q", os.read(descriptor, 8))[0]

    threading.Thread(target=read_descriptor, daemon=True).start()

    def facts() -> Facts:
        left = _TimerSpec()
        libc.timer_gettime(far, ctypes.byref(left))
        # Between the calls of a test lie seconds, not minutes.
        wrong = [] if 4800 < left.value_s <= 5000 else [f"the far timer has {left.value_s} s left"]
        return {"wrong": wrong, "same": {}, "grows": dict(counts)}

    return facts


def signals() -> Callable[[], Facts]:
    """A child that has blocked its signals, with some pending, three of them queued with values."""
    blocked = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 2}
    out = os.pipe()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked | {signal.SIGHUP})
        os.write(out[1], b"r")
        signal.sigwait({signal.SIGHUP})
        libc = ctypes.CDLL(None)
        taken = []
        info = (ctypes.c_int * 32)()
        mask = (ctypes.c_ulong * 16)(sum(1 << (int(number) - 1) for number in blocked))
        for _ in range(5):
            limit = (ctypes.c_long * 2)(1, 0)
            number = libc.sigtimedwait(mask, info, limit)
            # si_value is the sixth int of siginfo_t on 64-bit Linux.
            taken.append([number, info[6] if number >= signal.SIGRTMIN else 0])
        os.write(out[1], json.dumps(sorted(taken)).encode())
        signal.pause()
    os.read(out[0], 1)
    libc = ctypes.CDLL(None)
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    for value in (11, 12, 13):
        libc.sigqueue(child, signal.SIGRTMIN + 2, value)
    os.kill(child, signal.SIGUSR1)
    os.kill(child, signal.SIGUSR2)
    questions = [0]

    def pending() -> str:
        lines = Path(f"/proc/{child}/status").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith("ShdPnd:"))

    def facts() -> Facts:
        questions[0] += 1
        return {"wrong": [], "same": {"pending": pending()}, "grows": {"questions": questions[0]}}

    def take() -> Facts:
        os.kill(child, signal.SIGHUP)
        return {"taken": json.loads(os.read(out[0], 4096))}

    ANSWERS["take"] = take
    return facts


def deleted() -> Callable[[], Facts]:
    """Deleted open files of 1 KiB and 100 MiB, and one that is deleted but has another name."""
    sizes = {"/root/small": 1 << 10, "/root/large": 100 << 20}
    files = {}
    piece = generated(3, 1 << 20)
    for name, size in sizes.items():
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        for offset in range(0, size, len(piece)):
            os.pwrite(descriptor, piece[: size - offset], offset)
        os.lseek(descriptor, 77, os.SEEK_SET)
        Path(name).unlink()
        files[name] = descriptor
    linked = os.open("/root/first", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(linked, b"linked")
    os.link("/root/first", "/root/second")
    Path("/root/first").unlink()
    questions = [0]

    def facts() -> Facts:
        wrong = []
        for name, descriptor in files.items():
            found = os.fstat(descriptor)
            if found.st_nlink or found.st_size != sizes[name]:
                wrong.append(f"{name}: {found.st_nlink} links, {found.st_size} bytes")
            if os.lseek(descriptor, 0, os.SEEK_CUR) != 77:
                wrong.append(f"{name}: its position")
            for offset in range(0, sizes[name], len(piece)):
                data = os.pread(descriptor, len(piece), offset)
                if data != piece[: sizes[name] - offset]:
                    wrong.append(f"{name}: its content at {offset}")
                    break
        if os.pread(linked, 100, 0) != Path("/root/second").read_bytes():
            wrong.append("the file with another name")
        os.pwrite(linked, str(questions[0]).encode(), 6)
        if Path("/root/second").stat().st_ino != os.fstat(linked).st_ino:
            wrong.append("the file with another name is not the open one any more")
        left = sorted(path.name for path in Path("/root").iterdir() if not path.name.startswith("."))
        questions[0] += 1
        return {"wrong": wrong, "same": {"in /root": left}, "grows": {"questions": questions[0]}}

    return facts


def shm() -> Callable[[], Facts]:
    """Files in /dev/shm: one closed, one mapped by two processes, one deleted but mapped; shared anonymous memory."""
    content = generated(5, 4 << 20)
    Path("/dev/shm/closed").write_bytes(content)
    mapped = os.open("/dev/shm/mapped", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(mapped, 1 << 20)
    shared = mmap.mmap(mapped, 1 << 20)
    gone = os.open("/dev/shm/gone", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(gone, content)
    unlinked = mmap.mmap(gone, len(content))
    Path("/dev/shm/gone").unlink()
    anonymous = mmap.mmap(-1, 1 << 20)
    anonymous[4096:8192] = content[:4096]
    child = os.fork()
    if child == 0:
        while True:
            for memory in (shared, anonymous):
                (value,) = struct.unpack_from("Q", memory, 0)
                struct.pack_into("Q", memory, 0, value + 1)
            time.sleep(0.002)

    def facts() -> Facts:
        wrong = []
        if Path("/dev/shm/closed").read_bytes() != content:
            wrong.append("the closed file")
        if unlinked[:] != content:
            wrong.append("the deleted file's mapping")
        if anonymous[4096:8192] != content[:4096]:
            wrong.append("anonymous shared memory")
        # The child counts on while they are read.
        counts = [os.pread(mapped, 8, 0), Path("/dev/shm/mapped").read_bytes()[:8], os.pread(mapped, 8, 0)]
        if counts != sorted(counts, key=lambda count: struct.unpack("Q", count)):
            wrong.append("the mapped file and its name are not the same")
        if os.waitpid(child, os.WNOHANG)[0]:
            wrong.append("the child ended")
        return {
            "wrong": wrong,
            "same": {
                "files": sorted(path.name for path in Path("/dev/shm").iterdir()),
                "size": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
            },
            "grows": {
                "mapped": struct.unpack_from("Q", shared, 0)[0],
                "anonymous": struct.unpack_from("Q", anonymous, 0)[0],
            },
        }

    return facts


def pool(mebibytes: int = 24) -> Callable[[], Facts]:
    """Shared memory of every kind, written by mapping, by children that end, and by write(2).

    What each page has to be is kept in private memory: one that is older than that shows.
    """
    pages = (mebibytes << 20) // 3 // PAGE
    buffer = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(buffer, 2 * pages * PAGE)  # half of it stays a hole
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(sealed, b"to be kept")
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    reader = os.open(f"/proc/self/fd/{buffer}", os.O_RDONLY)
    os.lseek(reader, 12345, os.SEEK_SET)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    system_v = (ctypes.c_char * (pages * PAGE)).from_address(libc.shmat(libc.shmget(0, pages * PAGE, 0o1600), None, 0))
    memories: list[mmap.mmap | ctypes.Array[ctypes.c_char]]
    memories = [mmap.mmap(-1, pages * PAGE), system_v, mmap.mmap(buffer, pages * PAGE)]
    turns = [array.array("Q", [0]) * pages for _ in memories]
    turn, lock = [0], threading.Lock()

    def content(page: int, at: int) -> bytes:
        return struct.pack("QQ", page, at) * (PAGE // 16)

    for page in range(pages):
        for memory in memories:
            memory[page * PAGE : (page + 1) * PAGE] = content(page, 0)

    def write_some() -> None:
        turn[0] += 1
        chosen = [[random.randrange(pages) for _ in range(20)] for _ in memories]
        child = os.fork() if turn[0] % 20 == 0 else -1
        if child <= 0:
            for memory, some in zip(memories, chosen, strict=True):
                for page in some:
                    memory[page * PAGE : (page + 1) * PAGE] = content(page, turn[0])
            os.pwrite(buffer, content(chosen[2][0], turn[0]), chosen[2][0] * PAGE)
            if child == 0:
                os._exit(0)
        else:
            os.waitpid(child, 0)
        for known, some in zip(turns, chosen, strict=True):
            for page in some:
                known[page] = turn[0]

    def write() -> None:
        while True:
            with lock:
                write_some()
            time.sleep(0.002)

    threading.Thread(target=write, daemon=True).start()

    def facts() -> Facts:
        wrong = []
        with lock:
            for name, memory, known in zip(("anonymous", "System V", "memfd"), memories, turns, strict=True):
                bad = sum(
                    memory[page * PAGE : (page + 1) * PAGE] != content(page, known[page]) for page in range(pages)
                )
                if bad:
                    wrong.append(f"{bad} of {pages} pages of {name} memory")
            if os.pread(buffer, PAGE, 0) != memories[2][:PAGE]:
                wrong.append("the memfd and its mapping are not the same")
        if os.pread(sealed, 100, 0) != b"to be kept":
            wrong.append("the sealed memfd")
        return {
            "wrong": wrong,
            "same": {
                "seals": fcntl.fcntl(sealed, fcntl.F_GET_SEALS),
                "blocks": os.fstat(buffer).st_blocks,
                "size": os.fstat(buffer).st_size,
                "position": os.lseek(reader, 0, os.SEEK_CUR),
                "flags": fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_ACCMODE,
                "name": str(Path(f"/proc/self/fd/{buffer}").readlink()),
            },
            "grows": {"turn": turn[0]},
        }

    return facts


def lines() -> Callable[[], Facts]:
    """Numbered lines to standard output and error, without a break."""
    written = [0]

    def write() -> None:
        while True:
            os.write(1, f"line {written[0]}\n".encode())
            if written[0] % 10 == 0:
                os.write(2, f"error {written[0]}\n".encode())
            written[0] += 1
            time.sleep(0.001)

    threading.Thread(target=write, daemon=True).start()
    return lambda: {"wrong": [], "same": {}, "grows": {"written": written[0]}}


FEATURES: dict[str, Callable[..., Callable[[], Facts]]] = {
    "threads": threads, "tree": tree, "sockets": sockets, "timers": timers, "signals": signals, "deleted": deleted,
    "shm": shm, "pool": pool, "lines": lines,
}  # fmt: skip
ANSWERS: dict[str, Callable[[], Facts]] = {}


def main(feature: str, *numbers: str) -> None:
    ANSWERS["facts"] = FEATURES[feature](*map(int, numbers))
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
                continue
            words = ready.recv(100).decode().split()
            if not words:
                connections.remove(ready)
                ready.close()
            for word in words:
                ready.sendall(json.dumps(ANSWERS[word]()).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
