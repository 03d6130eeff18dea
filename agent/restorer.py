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
import socket
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pycriu import rpc_pb2 as rpc

from agent import namespaces
from agent.cgroup import Cgroup
from agent.processes import note
from blockdev import kernel
from migrator.criu import LOG_LEVEL
from migrator.waiting import readable

GO, VERDICT, SAID = "go", "verdict", "said"
RESTORER, HOLDING, CRIU = "restorer.pid", "holding.pid", "criu.pid"
"""Where it notes itself, when runc has asked for the restore and when every task is held; and where it notes CRIU."""
GIVEN_UP = "given-up"
"""There when nobody will ever answer: it may only come to ask afterwards."""
INHERIT = "inherit"
"""A script that opens what CRIU inherits and becomes the command that it is given, where there is one by then."""

_MESSAGE_BYTES = 1 << 20
_DESCRIPTORS = 4
_MS_PRIVATE = 1 << 18  # of mount(2)
_ORDERS = "orders.json"
_CREDENTIALS = struct.Struct("=iII")


@dataclass(frozen=True)
class Orders:
    """What it is told beforehand."""

    criu: str
    # Where the container's root will be mounted: runc has bound the folder as it was before.
    root: str
    # The name of the container's network namespace: CRIU was there, too, when it dumped.
    network: str
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
    """A process that becomes CRIU when it is let: until then it can be moved into control groups, at some 10 ms each.

    It has all descriptors of this process that are inheritable: runc's requests name some by number.
    """

    def __init__(self, network: str) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        waiting, self._letting = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._letting)
                namespaces.enter(network)
                os.set_inheritable(theirs.fileno(), True)
                command = json.loads(os.read(waiting, _MESSAGE_BYTES))
                # Not before: by now all is mounted. Killed, CRIU would leave its working mounts behind.
                namespaces.own_mounts()
                os.execvp(command[0], [*command, "swrk", str(theirs.fileno())])
            finally:
                os._exit(127)
        os.close(waiting)
        theirs.close()

    def become(self, command: Sequence[str]) -> None:
        """Let it."""
        os.write(self._letting, json.dumps(command).encode())

    def answer(self, program: str, message: bytes) -> bytes:
        """Let it, and have it answer one request."""
        self.become([program])
        self.socket.send(message)
        return self.socket.recv(_MESSAGE_BYTES)

    def end(self) -> int:
        """Leave it alone, have it undo what it has done, and wait for it; its exit code."""
        os.close(self._letting)
        self.socket.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def main(folder: str, runc: socket.socket) -> int:
    """Serve one request of runc's. Returns CRIU's exit code."""
    orders = Orders.read(Path(folder))
    criu = Criu(orders.network)
    message = runc.recv(_MESSAGE_BYTES)
    request = rpc.criu_req.FromString(message)
    if request.type == rpc.RESTORE:
        return _Restore(Path(folder), orders, runc, criu).run(request)
    runc.send(criu.answer(orders.criu, message))
    return criu.end()


class _Restore:
    def __init__(self, folder: Path, orders: Orders, runc: socket.socket, criu: Criu) -> None:
        self._folder = folder
        self._orders = orders
        self._runc = runc
        self._criu = criu
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
        """Wait until everything is there, and start CRIU. `bound` is runc's mount of the folder as it is now."""
        # What is mounted on the folder next would be mounted there, too, where mounts are shared, and be left behind.
        kernel.mount("none", bound, "", _MS_PRIVATE)
        self._warm_up()
        note(self._criu.pid, self._folder / CRIU)
        for folder in Cgroup(self._orders.group).folders():
            (folder / "cgroup.procs").write_text(str(self._criu.pid))
        if ask(self._folder, "warm", GO, RESTORER) != "go":
            return False
        inherit = self._folder / INHERIT
        # Not /bin/sh, which may not know descriptors of two digits.
        self._criu.become([*(["bash", str(inherit)] if inherit.exists() else []), self._orders.criu])
        return True

    def _warm_up(self) -> None:
        """Have CRIU probe the kernel, for 40 ms; what it finds it keeps in /run/criu.kdat until the next boot."""
        first = Criu(self._orders.network)
        question = rpc.criu_req(type=rpc.FEATURE_CHECK, features=rpc.criu_features(mem_track=False))
        first.answer(self._orders.criu, question.SerializeToString())
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
            if ask(self._folder, "held", VERDICT, HOLDING) != "go":
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


def ask(folder: Path, word: str, pipe: str, asking: str) -> str:
    """Say the word and wait for what is answered; a note, `asking`, tells a later agent that an answer is awaited.

    Empty if the agent has given up before.
    """
    # Opened to write as well: it does not end when an agent does.
    with (folder / pipe).open("r+b", buffering=0) as answers:
        note(os.getpid(), folder / asking)
        if (folder / GIVEN_UP).exists():
            return ""
        _say(folder, word)
        return answers.readline().decode().rstrip("\n")


def _say(folder: Path, word: str) -> None:
    with (folder / SAID).open("r+b", buffering=0) as said:
        said.write(f"{word}\n".encode())


if __name__ == "__main__":
    _, _folder, _verb, _descriptor = sys.argv
    # Not for CRIU: it has a socket of its own.
    os.set_inheritable(int(_descriptor), False)
    # runc waits for its end, and by then nothing is left to be tidied up.
    os._exit(main(_folder, socket.socket(fileno=int(_descriptor))))
