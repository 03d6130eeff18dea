"""Mechanism over runc and conmon: how one container is made, started, looked at and taken away. No policy.

conmon is the parent of the container's first process and the other end of its pipes; it lives in a session and a
control group of its own, so that it outlives the agent. It makes the container by `runc create`, or takes a restored
one by `runc restore`; everything else is the same for both.
"""

import errno
import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cgroup import Cgroup
from agent.processes import Process
from blockdev import filesystem
from migrator.errors import ExecutionError, InvalidArgument
from migrator.waiting import readable

CREATE_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 30.0
PRIVATE_PROGRAMS = "/usr/local/lib/migrator/bin"
# Below runc's folder of a container that it restores: where it mounts the root for CRIU.
_CRIU_ROOT = "criu-root"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class ContainerPaths:
    """Where the parts of one container are on the host."""

    bundle: Path
    rootfs: Path
    shm: Path
    volumes: Path
    log: Path
    netns: Path
    run: Path
    init_pid: Path
    conmon_pid: Path
    exit_file: Path
    runc_log: Path


@dataclass(frozen=True)
class Restore:
    """CRIU's images, and a folder that comes first on runc's PATH: it finds its criu there."""

    images: Path
    programs: Path


@dataclass(frozen=True)
class Launched:
    """A container that was created or restored: its first process and its conmon."""

    init: Process
    conmon: Process


class Launch:
    """conmon at work on create or restore; `result` waits for it."""

    def __init__(self, runtime: "Runtime", name: str, pipe: int) -> None:
        self._runtime = runtime
        self._name = name
        self._pipe: int | None = pipe

    def fileno(self) -> int:
        """Readable when `result` will not wait, for select."""
        if self._pipe is None:
            raise ExecutionError(f"the result of launching {self._name} was already taken")
        return self._pipe

    def close(self) -> None:
        """Do without the result; repeatable."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def result(self, timeout_s: float = CREATE_TIMEOUT_S) -> Launched:
        """The processes, once runc has finished. Raises ExecutionError with runc's own last words."""
        if self._pipe is None:
            raise ExecutionError(f"the result of launching {self._name} was already taken")
        try:
            answer = _read_line(self._pipe, timeout_s)
        finally:
            os.close(self._pipe)
            self._pipe = None
        pid, message = int(answer.get("pid", -1)), str(answer.get("message", "")).strip()
        if pid <= 0:
            reason = self._runtime.last_words(self._name) or message or "it ended without a word; was it killed?"
            # runc's words where everything is there but the program that was asked for.
            if "unable to start container process: exec: " in reason:
                wrong = reason.partition("container process: exec: ")[2]
                raise InvalidArgument(f"the command of {self._name} cannot be run: {wrong}", reason="COMMAND")
            raise ExecutionError(f"runc could not make {self._name}: {reason}")
        found = self._runtime.launched(self._name)
        if found is None:
            raise ExecutionError(f"{self._name} ended while it was made; its log may tell: migrator logs {self._name}")
        return found


class Runtime:
    """runc and conmon with this agent's folders."""

    def __init__(self, state_dir: Path, run_dir: Path, cgroup_parent: str) -> None:
        self._state = state_dir
        self._run = run_dir
        self._cgroup_parent = cgroup_parent.strip("/")
        self.root = run_dir / "runc"
        self.exits = run_dir / "exits"
        for folder in (self.root, self.exits):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def paths(self, name: str) -> ContainerPaths:
        bundle, run = self._state / "containers" / name, self._run / "containers" / name
        return ContainerPaths(
            bundle=bundle,
            rootfs=bundle / "rootfs",
            shm=bundle / "shm",
            volumes=bundle / "volumes",
            log=bundle / "log",
            netns=Path("/run/netns") / name,
            run=run,
            init_pid=run / "init.pid",
            conmon_pid=run / "conmon.pid",
            exit_file=self.exits / name,
            runc_log=run / "runc.log",
        )

    def cgroup(self, name: str) -> Cgroup:
        return Cgroup(f"/{self._cgroup_parent}/{name}")

    @property
    def monitors(self) -> Cgroup:
        """Where the containers' conmons are. Container names begin with a letter or digit: this one cannot be taken."""
        return Cgroup(f"/{self._cgroup_parent}/_conmon")

    def runc_command(self, name: str, *arguments: str) -> list[str]:
        log = str(self.paths(name).runc_log)
        return ["runc", "--root", str(self.root), "--log", log, "--log-format", "json", *arguments]

    def conmon_command(self, name: str, restore: Restore | None = None) -> list[str]:
        """The command line that makes the container of the bundle, or restores it."""
        paths = self.paths(name)
        command = ["conmon", "--cid", name, "--cuuid", name, "--name", name, "--bundle", str(paths.bundle)]
        command += ["--runtime", find_program("runc")]
        command += [f"--runtime-arg={argument}" for argument in self.runc_command(name)[1:]]
        command += ["--container-pidfile", str(paths.init_pid), "--conmon-pidfile", str(paths.conmon_pid)]
        command += ["--log-path", f"k8s-file:{paths.log}", "--log-level", "error", "--no-sync-log"]
        command += ["--exit-dir", str(self.exits), "--persist-dir", str(paths.run)]
        command += ["--socket-dir-path", str(paths.run)]
        if restore is not None:
            command += ["--restore", str(restore.images)]
        return command

    def launch(self, name: str, restore: Restore | None = None) -> Launch:
        """Start conmon; the bundle, its mounts and the network namespace are there. Does not wait for runc."""
        paths = self.paths(name)
        paths.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in (paths.exit_file, paths.init_pid, paths.conmon_pid, paths.runc_log, paths.run / "exit"):
            stale.unlink(missing_ok=True)
        variables = environment()
        if restore is not None:
            variables["PATH"] = f"{restore.programs}:{variables['PATH']}"
        ours, writing = os.pipe()
        # Both ends: conmon dies of a word that nobody can read any more, and it must survive this agent.
        theirs = os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_CLOEXEC)
        os.close(writing)
        try:
            done = subprocess.run(
                self.conmon_command(name, restore),
                env={**variables, "_OCI_SYNCPIPE": str(theirs)},
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=paths.bundle,
                start_new_session=True,
                check=False,
                timeout=COMMAND_TIMEOUT_S,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if done.returncode != 0:
            os.close(ours)
            raise ExecutionError(
                f"conmon for {name} exited with code {done.returncode}: is it installed and runc with it?"
            )
        conmon = _read_pid(paths.conmon_pid)
        if conmon is not None:
            self.monitors.join(conmon)
        return Launch(self, name, ours)

    def launched(self, name: str) -> Launched | None:
        """The processes by the pid files; None if one of them is gone."""
        paths = self.paths(name)
        pids = _read_pid(paths.init_pid), _read_pid(paths.conmon_pid)
        init, conmon = (None if pid is None else Process.find(pid) for pid in pids)
        return Launched(init, conmon) if init and conmon else None

    def has_conmon(self, name: str) -> bool:
        """Whether the container's conmon lives, which it does from `launch` until the container has ended."""
        conmon = _read_pid(self.paths(name).conmon_pid)
        return conmon is not None and self._is_conmon(conmon, name) and Process.find(conmon) is not None

    def start(self, name: str) -> None:
        """Let a created container run."""
        self.runc(name, "start", name)

    def state(self, name: str) -> dict[str, Any] | None:
        """What `runc state` says; None if runc knows no such container."""
        if not (self.root / name).is_dir():
            return None
        result: dict[str, Any] = json.loads(self.runc(name, "state", name))
        return result

    def known(self) -> list[str]:
        """Names of the containers that runc keeps a state of."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def delete(self, name: str) -> None:
        """Kill and delete whatever there is of the container's processes, and of runc's and conmon's state."""
        paths = self.paths(name)
        conmon = _read_pid(paths.conmon_pid)
        process = None if conmon is None or not self._is_conmon(conmon, name) else Process.find(conmon)
        group = self.cgroup(name)
        # Before runc: a frozen container does not die of its signals.
        group.kill()
        group.thaw()
        if (self.root / name).is_dir():
            with suppress(ExecutionError):
                # It refuses a state file that a crash has cut short, and sees nothing where there is none yet.
                self.runc(name, "delete", "--force", name)
        group.destroy()
        self._delete_state(self.root / name)
        if process is not None and not process.wait(2.0):
            process.signal(9)
            process.wait(2.0)
        shutil.rmtree(paths.run, ignore_errors=True)
        paths.exit_file.unlink(missing_ok=True)

    def _delete_state(self, folder: Path) -> None:
        """What a runc that was killed has left."""
        if not folder.is_dir():
            return
        # Its second view of the container's root: what is in there must not be deleted through it.
        view = folder / _CRIU_ROOT
        if view.is_dir():
            try:
                filesystem.unmount(view)
            except OSError as error:
                if error.errno != errno.EINVAL:  # it had not been mounted yet
                    raise
            view.rmdir()
        shutil.rmtree(folder)

    def _is_conmon(self, pid: int, name: str) -> bool:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return arguments[0].endswith(b"conmon") and name.encode() in arguments

    def exit_code(self, name: str) -> int | None:
        """What conmon noted at the end: the code, 128 + signal if killed; None if it noted nothing."""
        try:
            text = self.paths(name).exit_file.read_text().strip()
        except FileNotFoundError:
            return None
        return int(text) if text.isdecimal() else None

    def runc(self, name: str, *arguments: str) -> str:
        """Run runc to its end and return its standard output. Raises ExecutionError with runc's own last words."""
        self.paths(name).run.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            done = subprocess.run(
                self.runc_command(name, *arguments),
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=COMMAND_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ExecutionError(f"runc {arguments[0]} {name} did not finish within {COMMAND_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            words = self.last_words(name) or done.stderr.strip()
            raise ExecutionError(f"runc {arguments[0]} {name} exited with code {done.returncode}: {words}")
        return done.stdout

    def last_words(self, name: str) -> str:
        """The last error in runc's log; empty if there is none."""
        return last_error(self.paths(name).runc_log)


def last_error(log: Path) -> str:
    """The last error in a log that runc wrote with --log-format json; empty if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", ""))
    return ""


def environment() -> dict[str, str]:
    """What children get: our own CRIU is found before any other."""
    return {"PATH": f"{PRIVATE_PROGRAMS}:{SYSTEM_PATH}", "LANG": "C.UTF-8"}


def find_program(name: str) -> str:
    """Absolute path of a program on the path that children get."""
    found = shutil.which(name, path=f"{PRIVATE_PROGRAMS}:{SYSTEM_PATH}")
    if found is None:
        raise ExecutionError(f"{name} is not installed: run scripts/setup")
    return found


def _read_pid(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def _read_line(pipe: int, timeout_s: float) -> dict[str, Any]:
    """One JSON object on a line; an empty one if the writer ended before it wrote one."""
    deadline = time.monotonic() + timeout_s
    text = b""
    while b"\n" not in text:
        left = deadline - time.monotonic()
        if left <= 0 or not readable([pipe], left):
            raise ExecutionError(f"conmon has not answered within {timeout_s:g} s")
        piece = os.read(pipe, 65536)
        if not piece:
            break
        text += piece
    if not text.strip():
        return {}
    result: dict[str, Any] = json.loads(text)
    return result
