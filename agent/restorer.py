"""Between runc and CRIU: what runc takes for `criu` when it restores a container that arrives.

runc speaks CRIU's RPC (criu.org/RPC) with what it has started as `criu swrk FD`. This program hands the messages on to
a CRIU of its own and keeps two of them back: the request to restore, until everything has arrived, and runc's answer to
"post-restore", when every task is there and none has run, until the verdict. So all that runc prepares is done before
the freeze, and CRIU needs no action script, which it would start six times.

What it needs is in its folder (`Orders`, and named pipes): it outlives the agent, and the next one can speak to it. Any
verdict but `go`, and its own end, have CRIU kill what it has restored. After `go` CRIU lets go of the tasks, and the
freezer takes them over: whether they ever run does not depend on CRIU and runc any more.
"""

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pycriu import rpc_pb2 as rpc

from agent import namespaces, read_ahead
from agent.cgroup import Cgroup
from agent.processes import note
from blockdev import kernel
from migrator.criu import LOG_LEVEL
from migrator.waiting import readable

GO, VERDICT, SAID = "go", "verdict", "said"
MOUNTED = "mounted"
"""Said before "go": the volumes are there, and CRIU's images."""
RESTORER, HOLDING, CRIU, RUNC = "restorer.pid", "holding.pid", "criu.pid", "runc.pid"
"""Where it notes itself, when runc has asked for the restore and when every task is held; and where it notes others."""
GIVEN_UP = "given-up"
"""There when nobody will ever answer: it may only come to ask afterwards."""
INHERIT = "inherit"
"""The list of what CRIU opens when it is asked to restore: see scripts/criu-shim.c."""

# In CRIU's environment: the folder. There it says that it waits to be asked.
_FOLDER, _WAITS = "MIGRATOR_RESTORE", "waits-{pid}"
_START_S = 10.0
_MESSAGE_BYTES = 1 << 20
_DESCRIPTORS = 4
_MS_PRIVATE = 1 << 18  # of mount(2)
_ORDERS = "orders.json"
_CREDENTIALS = struct.Struct("=iII")


@dataclass(frozen=True)
class Orders:
    """What it is told beforehand."""

    criu: str
    # The folder of CRIU's images.
    images: str
    # Where the container's root will be mounted: runc has bound the folder as it was before.
    root: str
    # The name of the container's network namespace: CRIU was there, too, when it dumped.
    network: str
    # Where its volumes will be mounted, by their mount points in the container.
    volumes: Mapping[str, str]
    # The container's control group, and that of the processes that watch containers.
    group: str
    watchers: str

    def write(self, folder: Path) -> None:
        """For `read`."""
        (folder / _ORDERS).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Orders":
        """What was written there."""
        return cls(**json.loads((folder / _ORDERS).read_text()))


class Criu:
    """CRIU, to be asked one thing, in the container's network namespace. When it is asked it gets mounts of its own and
    what it is to inherit; until then it can be moved into control groups, at some 10 ms each.

    It has all descriptors of this process that are inheritable: runc's requests name some by number.
    """

    def __init__(self, orders: Orders, folder: Path) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                namespaces.enter(orders.network)
                os.set_inheritable(theirs.fileno(), True)
                environment = os.environ | {_FOLDER: str(folder)}
                os.execve(orders.criu, ["criu", "swrk", str(theirs.fileno())], environment)
            finally:
                os._exit(127)
        theirs.close()
        self._waits = folder / _WAITS.format(pid=self.pid)

    def await_start(self) -> bool:
        """Wait until it waits. False if it has ended, or scripts/criu-shim.c is not in front of it."""
        deadline = time.monotonic() + _START_S
        while not self._waits.exists():
            if time.monotonic() > deadline or readable([self.socket.fileno()], 0.001):
                return False
        return True

    def answer(self, message: bytes) -> bytes:
        """Ask it something else than to restore."""
        self.socket.send(message)
        return self.socket.recv(_MESSAGE_BYTES)

    def end(self) -> int:
        """Leave it alone, have it undo what it has done, and wait for it; its exit code."""
        self.socket.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def main(folder: str, runc: socket.socket) -> int:
    """Serve one request of runc's. Returns CRIU's exit code."""
    orders = Orders.read(Path(folder))
    message = runc.recv(_MESSAGE_BYTES)
    request = rpc.criu_req.FromString(message)
    if request.type == rpc.RESTORE:
        return _Restore(Path(folder), orders, runc).run(request)
    criu = Criu(orders, Path(folder))
    runc.send(criu.answer(message))
    return criu.end()


class _Restore:
    def __init__(self, folder: Path, orders: Orders, runc: socket.socket) -> None:
        self._folder = folder
        self._orders = orders
        self._runc = runc
        self._criu = Criu(orders, folder)
        credentials = runc.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self._runc_pid, _, _ = _CREDENTIALS.unpack(credentials)
        self._stand_in = os.getppid()
        self._beside = ThreadPoolExecutor(1)
        self._moved: Future[None] | None = None
        self._letting_go = False

    def run(self, request: rpc.criu_req) -> int:
        """Until CRIU has ended."""
        if self._prepare(Path(request.opts.root)):
            self._amend(request.opts)
            self._criu.socket.send(request.SerializeToString())
            while self._relay():
                pass
        return self._criu.end()

    def _prepare(self, bound: Path) -> bool:
        """Wait until everything is there. `bound` is runc's mount of the folder as it is now."""
        # What is mounted on the folder next would be mounted there, too, where mounts are shared, and be left behind.
        kernel.mount("none", bound, "", _MS_PRIVATE)
        self._warm_up()
        note(self._criu.pid, self._folder / CRIU)
        note(self._runc_pid, self._folder / RUNC)
        for folder in Cgroup(self._orders.group).folders():
            (folder / "cgroup.procs").write_text(str(self._criu.pid))
        if not self._criu.await_start():
            _say(self._folder, "CRIU cannot be asked: run scripts/setup on this host")
            return False
        answers = ask(self._folder, "warm", GO, RESTORER)
        if (answer := next(answers, "")) == MOUNTED:
            read_ahead.begin(Path(self._orders.images), self._orders.volumes)
            answer = next(answers, "")
        return answer == "go"

    def _warm_up(self) -> None:
        """Have CRIU probe the kernel, for 40 ms; what it finds it keeps in /run/criu.kdat until the next boot."""
        first = Criu(self._orders, self._folder)
        question = rpc.criu_req(type=rpc.FEATURE_CHECK, features=rpc.criu_features(mem_track=False))
        first.answer(question.SerializeToString())
        first.end()

    def _amend(self, options: rpc.criu_opts) -> None:
        """CRIU looks for its folders among the descriptors of the process that has made its socket: now this one."""
        options.root = self._orders.root
        options.log_level = LOG_LEVEL
        for name in ("images_dir_fd", "work_dir_fd"):
            if options.HasField(name):
                theirs = f"/proc/{self._runc_pid}/fd/{getattr(options, name)}"
                setattr(options, name, os.open(theirs, os.O_RDONLY | os.O_DIRECTORY))

    def _relay(self) -> bool:
        """Hand on one message of CRIU's, and runc's answer to it; False when there is nothing more."""
        message, descriptors, _, _ = socket.recv_fds(self._criu.socket, _MESSAGE_BYTES, _DESCRIPTORS)
        if not message:
            if self._letting_go:
                # It was killed, and the kernel lets the tasks go that it had stopped.
                Cgroup(self._orders.group).begin_to_freeze()
            return False
        socket.send_fds(self._runc, [message], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        response = rpc.criu_resp.FromString(message)
        if response.type != rpc.NOTIFY:
            return False
        answer = self._runc.recv(_MESSAGE_BYTES)
        if not answer or not self._may_go_on(response.notify.script):
            return False
        self._criu.socket.send(answer)
        return True

    def _may_go_on(self, moment: str) -> bool:
        if moment == "setup-namespaces":
            # The first task is there, and the others will be its children.
            self._moved = self._beside.submit(self._leave_the_tasks)
        if moment == "post-restore":
            if next(ask(self._folder, "held", VERDICT, HOLDING), "") != "go":
                return False
            # Any of them that has ended meanwhile: nobody is to wait until the others have noticed.
            if os.getppid() != self._stand_in or readable([self._criu.socket.fileno(), self._runc.fileno()], 0):
                _say(self._folder, "broken")
                return False
            self._letting_go = True
        if moment == "pre-resume":
            (self._moved or self._beside.submit(self._leave_the_tasks)).result()
            Cgroup(self._orders.group).begin_to_freeze()
        if moment == "post-resume":
            _say(self._folder, "resumed")
        return True

    def _leave_the_tasks(self) -> None:
        """CRIU and the stand-in that runc waits for are not to be frozen with them. 10 ms, beside CRIU's work."""
        for pid in (self._criu.pid, self._stand_in):
            (Cgroup(self._orders.watchers).freezer / "cgroup.procs").write_text(str(pid))


def ask(folder: Path, word: str, pipe: str, asking: str) -> Iterator[str]:
    """Say the word and wait for what is answered; a note, `asking`, tells a later agent that an answer is awaited.

    Nothing is if the agent has given up before.
    """
    # Opened to write as well: it does not end when an agent does.
    with (folder / pipe).open("r+b", buffering=0) as answers:
        note(os.getpid(), folder / asking)
        if (folder / GIVEN_UP).exists():
            return
        _say(folder, word)
        for line in answers:
            yield line.decode().rstrip("\n")


def _say(folder: Path, word: str) -> None:
    with (folder / SAID).open("r+b", buffering=0) as said:
        said.write(f"{word}\n".encode())


if __name__ == "__main__":
    _, _folder, _verb, _descriptor = sys.argv
    os.set_inheritable(int(_descriptor), False)  # not for CRIU: it has a socket of its own
    _stand_in = os.getppid()
    _ended = main(_folder, socket.socket(fileno=int(_descriptor)))
    # runc waits for the stand-in, which need not wait until the kernel has taken this program's memory apart, for 3 ms.
    if _ended == 0 and os.getppid() == _stand_in:
        os.kill(_stand_in, signal.SIGUSR1)
    # By now nothing is left to be tidied up.
    os._exit(_ended)
