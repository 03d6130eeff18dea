"""Control groups of containers: freeze, count, kill, remove; version 1, version 2 and both side by side.

A container's group is `/<parent>/<name>` in each hierarchy; runc makes it (cgroupfs driver), this module uses it.
Documents: Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst and cgroup-v2.rst of the kernel.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from blockdev import stuck
from migrator.errors import ExecutionError

CPU_PERIOD_US = 100_000

FREEZE_TIMEOUT_S = 5.0
REMOVE_TIMEOUT_S = 5.0
POLL_S = 0.001
# A task that forks while the group freezes can leave version 1 in FREEZING until it is told again.
REFREEZE_POLLS = 20
# A task that calls execve waits for its other threads to die, and version 1 freezes these with their SIGKILL pending:
# only a moment of thaw lets it get on.
RETHAW_POLLS = 100
RETHAW_S = 0.002
# Thaws that give a child of vfork the time to call execve.
VFORK_TRIES = 20


@dataclass(frozen=True)
class Hierarchies:
    """Where the control groups are mounted: version 1 by controller, and version 2."""

    controllers: Mapping[str, Path] = field(default_factory=dict)
    unified: Path | None = None

    def roots(self) -> list[Path]:
        """Every hierarchy once."""
        roots = [*self.controllers.values(), *([self.unified] if self.unified else [])]
        return list(dict.fromkeys(roots))


def parse_hierarchies(mountinfo: str) -> Hierarchies:
    """From the text of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    controllers: dict[str, Path] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = Path(before.split(" ")[4])
        if kind == "cgroup2":
            unified = unified or point
        elif kind == "cgroup":
            for option in options.split(" ")[-1].split(","):
                if option not in ("rw", "ro", "xattr", "noprefix", "clone_children"):
                    controllers.setdefault(option.removeprefix("name="), point)
    return Hierarchies(controllers, unified)


@cache
def hierarchies() -> Hierarchies:
    """The hierarchies of this host."""
    return parse_hierarchies(Path("/proc/self/mountinfo").read_text())


class Cgroup:
    """One group by its path below the hierarchies' roots, for example `/migrator/ct101`."""

    def __init__(self, path: str, mounted: Hierarchies | None = None) -> None:
        self.path = path
        self._mounted = mounted or hierarchies()

    def _at(self, root: Path) -> Path:
        return root / self.path.lstrip("/")

    def folders(self) -> list[Path]:
        """The group's folder in each hierarchy that has one."""
        return [folder for root in self._mounted.roots() if (folder := self._at(root)).is_dir()]

    @property
    def freezer(self) -> Path:
        """The folder whose freezer stops the group's tasks; the one that CRIU is told."""
        root = self._mounted.controllers.get("freezer") or self._mounted.unified
        if root is None:
            raise ExecutionError(
                "no control group hierarchy with a freezer is mounted: mount cgroup2 at /sys/fs/cgroup"
            )
        return self._at(root)

    @property
    def _is_v1(self) -> bool:
        return "freezer" in self._mounted.controllers

    def is_frozen(self) -> bool:
        """Whether every task of the group is stopped by the freezer; False if there is no such group."""
        try:
            if self._is_v1:
                return (self.freezer / "freezer.state").read_text().strip() == "FROZEN"
            return "frozen 1" in (self.freezer / "cgroup.events").read_text().splitlines()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return False
            raise

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Stop all tasks and wait until all are stopped, looking each millisecond; thaws again if it takes too long."""
        deadline = time.monotonic() + timeout_s
        for _ in range(VFORK_TRIES):
            self._freeze(deadline, timeout_s)
            if not self._is_midway():
                return
            self._set(frozen=False)
            time.sleep(RETHAW_S)
        self._freeze(deadline, timeout_s)

    def _is_midway(self) -> bool:
        """Whether a task waits for a child of vfork to call execve, and counts as frozen there (kernel/fork.c). It
        cannot be seized while the child is stopped: CRIU tries in vain for 10 s."""
        threads = "tasks" if self._is_v1 else "cgroup.threads"
        return any(
            _waits_in(task, "kernel_clone")
            for folder in _tree(self.freezer)
            for task in _text(folder / threads).split()
        )

    def _freeze(self, deadline: float, timeout_s: float) -> None:
        polls = 0
        self._set(frozen=True)
        while not self.is_frozen():
            if time.monotonic() > deadline:
                hanging = stuck.words(self.pids())
                self._set(frozen=False)
                raise ExecutionError(
                    f"control group {self.path}: its tasks did not freeze within {timeout_s:g} s and run on; {hanging}"
                )
            polls += 1
            if self._is_v1 and polls % RETHAW_POLLS == 0:
                self._set(frozen=False)
                time.sleep(RETHAW_S)
            if self._is_v1 and polls % REFREEZE_POLLS == 0:
                self._set(frozen=True)
            time.sleep(POLL_S)

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Let the tasks run again; right also if they were not frozen or the group is gone."""
        if not self.freezer.is_dir():
            return
        deadline = time.monotonic() + timeout_s
        self._set(frozen=False)
        while self._is_v1 and self._state() != "THAWED":
            if time.monotonic() > deadline:
                raise ExecutionError(f"control group {self.path} is still {self._state()} after {timeout_s:g} s")
            time.sleep(POLL_S)

    def _state(self) -> str:
        try:
            return (self.freezer / "freezer.state").read_text().strip()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return "THAWED"
            raise

    def begin_to_freeze(self) -> None:
        """Have each task stop as soon as it can; does not wait for it."""
        self._set(frozen=True)

    def doors(self) -> list[Path]:
        """To write a pid to that is to be watched like this group's, and neither frozen nor charged with another's; the
        group is made if need be."""
        roots = {self._mounted.controllers.get(name) for name in ("freezer", "memory", "systemd")}
        folders = [self._at(root) for root in roots | {self._mounted.unified} if root is not None]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return [folder / "cgroup.procs" for folder in sorted(folders)]

    def _set(self, *, frozen: bool) -> None:
        if self._is_v1:
            name, value = "freezer.state", "FROZEN" if frozen else "THAWED"
        else:
            name, value = "cgroup.freeze", "1" if frozen else "0"
        path = self.freezer / name
        try:
            path.write_text(value)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV) and not frozen:
                return
            raise ExecutionError(f"write {value} to {path}: {error.strerror}") from error

    def pids(self) -> list[int]:
        """Pids of the group and the groups below it, as the caller's pid namespace has them; empty if it is gone."""
        found: list[int] = []
        for folder in _tree(self.freezer):
            try:
                found += [int(line) for line in (folder / "cgroup.procs").read_text().split()]
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
        # A zero is a process of another pid namespace that we cannot name.
        return sorted({pid for pid in found if pid})

    def limit_cpu(self, millis: int) -> None:
        """Thousandths of a processor that the group may use; 0 is no limit. Nothing if the group is gone."""
        quota = millis * CPU_PERIOD_US // 1000
        v1 = self._mounted.controllers.get("cpu")
        if v1 is not None:
            self._write(self._at(v1) / "cpu.cfs_quota_us", str(quota or -1))
        elif self._mounted.unified is not None:
            self._write(self._at(self._mounted.unified) / "cpu.max", f"{quota or 'max'} {CPU_PERIOD_US}")

    def _write(self, path: Path, value: str) -> None:
        try:
            path.write_text(value)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise ExecutionError(f"write {value} to {path}: {error.strerror}") from error

    def memory_bytes(self) -> int:
        """Memory charged to the group without cached file pages that are not in use; 0 if it cannot be told."""
        v1, folder = self._memory()
        statistics = _statistics(folder)
        if folder is None or not statistics:
            return 0
        usage, cached = ("memory.usage_in_bytes", "total_inactive_file") if v1 else ("memory.current", "inactive_file")
        return max(0, int(_text(folder / usage) or 0) - statistics.get(cached, 0))

    def unwritten_bytes(self) -> int:
        """Of the page cache what is still to be written to a disk, as far as it is charged to the group."""
        v1, folder = self._memory()
        names = ("total_dirty", "total_writeback") if v1 else ("file_dirty", "file_writeback")
        statistics = _statistics(folder)
        return sum(statistics.get(name, 0) for name in names)

    def _memory(self) -> tuple[bool, Path | None]:
        """Whether memory is counted by version 1, and the group's folder there."""
        v1 = self._mounted.controllers.get("memory")
        root = v1 or self._mounted.unified
        return v1 is not None, None if root is None else self._at(root)

    def join(self, pid: int) -> None:
        """Move a process of the host into the group, through its doors."""
        for door in self.doors():
            try:
                door.write_text(str(pid))
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """Send SIGKILL to every task. Frozen ones of version 1 die when thawed, without running first."""
        everything = self.freezer / "cgroup.kill"
        if not self._is_v1 and everything.exists():  # Linux 5.14
            everything.write_text("1")
            return
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def destroy(self, timeout_s: float = REMOVE_TIMEOUT_S) -> None:
        """Kill what is left, wait for it and remove the group from every hierarchy; right also if nothing is there."""
        deadline = time.monotonic() + timeout_s
        while self.freezer.is_dir() and self.pids():
            self.kill()
            self.thaw()
            if time.monotonic() > deadline:
                pids = self.pids()
                raise ExecutionError(f"processes {pids} of control group {self.path} do not die; {stuck.words(pids)}")
            time.sleep(POLL_S)
        for top in self.folders():
            for folder in reversed(list(_tree(top))):
                self._remove(folder, deadline)

    def _remove(self, folder: Path, deadline: float) -> None:
        while True:
            try:
                folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                # The last task has left the list before it has left the group.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise ExecutionError(f"rmdir {folder}: {error.strerror}") from error
            time.sleep(POLL_S)


def _tree(top: Path) -> Iterator[Path]:
    """The folder and all below it, parents first."""
    if not top.is_dir():
        return
    yield top
    for child in sorted(path for path in top.iterdir() if path.is_dir()):
        yield from _tree(child)


def _statistics(folder: Path | None) -> dict[str, int]:
    """The group's memory.stat; empty if there is none."""
    lines = [] if folder is None else _text(folder / "memory.stat").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _text(path: Path) -> str:
    """What a file of a group says; empty if the group is not there, or is removed while it is read."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return ""
        raise


def _waits_in(task: str, function: str) -> bool:
    """By /proc/PID/wchan (proc(5)); False also where the kernel does not tell."""
    try:
        descriptor = os.open(f"/proc/{task}/wchan", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(descriptor, 64) == function.encode()
    except OSError:
        return False
    finally:
        os.close(descriptor)
