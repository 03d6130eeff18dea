"""A container on its way out: what `migrator.source` asks of this host (`migrator.ports.LeavingContainer`)."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import structlog

from agent import guard, neighbours, oci, shm_folder
from agent.assembly import interfaces, volume_name
from agent.backlog import Backlog
from agent.cgroup import Cgroup
from agent.container_records import Record, Records, State
from agent.database import Database
from agent.journal import Incomings
from agent.managers import Managers
from agent.network import Networks
from agent.processes import Process, pid_inside
from agent.runtime import Runtime, environment, find_program
from blockdev import filesystem, tracker
from blockdev.tracker import WriteTracker
from blockdev.volume import MountedVolume
from migrator import memory
from migrator.criu import Criu, DumpRequest
from migrator.memory import MemoryTracker
from migrator.network import Neighbour
from migrator.pageless import Pageless
from migrator.ports import Checkpoint, LeavingVolume
from migrator.snapshots import LeavingSnapshot
from migrator.v1 import container_pb2, migration_pb2, peer_pb2

DUMP_TIMEOUT_S = 120.0
WARM_UP_TIMEOUT_S = 10.0
REHEARSAL_S = 0.003
# What takes so long has not gained from the rehearsal before; once it may be a busy processor.
SLOW_REHEARSAL_S = 0.025
SLOW_REHEARSALS = 3
# A busy listener is found empty after a few tries; one that nobody accepts from never is.
ACCEPT_PATIENCE_S = 0.1
ACCEPT_S = 0.002
CRIU_CONFIGURATION = "dump.conf"
CRIU_PROCESS = "criu.pid"
CRIU_ROLLBACK_S = 10.0

log = structlog.get_logger()


class Departing:
    """One container under a lease for its migration."""

    def __init__(
        self, managers: Managers, record: Record, folder: Path, snapshots: migration_pb2.SnapshotHandling
    ) -> None:
        self.name = record.name
        self.spec: container_pb2.ContainerSpec = record.spec
        self.state = record.state.message
        self.create_time_ms = record.create_time_ms
        self.start_time_ms = record.start_time_ms
        self._managers = managers
        self._record = record
        self._folder = folder
        self._paths = managers.runtime.paths(self.name)
        self._cgroup = managers.runtime.cgroup(self.name)
        self._snapshot_handling = snapshots
        self._backlog: Backlog
        self._between_rehearsals = threading.Lock()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def volumes(self) -> Sequence[LeavingVolume]:
        """The volumes in the order of the spec."""
        names = [volume_name(self.name, index) for index in range(len(self.spec.volumes))]
        images = [self._managers.volumes.open(name) for name in names]
        if not self._record.state.is_live:
            return [LeavingVolume(volume.path, volume.size_bytes, None, None) for volume in images]
        mounted = self._mounted()
        return [
            LeavingVolume(volume.path, volume.size_bytes, mount.device.path, mount.at)
            for volume, mount in zip(images, mounted, strict=True)
        ]

    @property
    def snapshots(self) -> Sequence[LeavingSnapshot]:
        """Those that are to move with it, if so was asked."""
        if self._snapshot_handling != migration_pb2.SNAPSHOT_HANDLING_MOVE:
            return []
        return self._managers.snapshots.leaving(self.name)

    @property
    def images(self) -> Path:
        """On the run folder's tmpfs."""
        return self._folder / "images"

    @property
    def log(self) -> Path:
        """The file that conmon writes."""
        return self._paths.log

    @property
    def memory_bytes(self) -> int:
        """As the control group counts it."""
        return self._cgroup.memory_bytes()

    @property
    def unwritten_bytes(self) -> int:
        """As the control group counts it."""
        return self._cgroup.unwritten_bytes()

    def stdio(self) -> Sequence[str]:
        """As runc noted it when the first process began: it may have closed or moved its own descriptors since."""
        if not self._record.state.is_live:
            return []
        state = json.loads((self._managers.runtime.root / self.name / "state.json").read_text())
        return [str(name) for name in state["external_descriptors"]]

    def objections(self) -> Sequence[peer_pb2.Objection]:
        """What a live migration cannot carry."""
        found = []
        if self._record.state.is_live:
            for pid, command in self._managers.containers.exec_sessions(self.name):
                found.append(
                    peer_pb2.Objection(
                        reason="EXEC_SESSION",
                        message=f"an exec session is open in {self.name} (process {pid}: {command}); end it first",
                    )
                )
        count = len(self._managers.snapshots.records.of(self.name))
        if count and not self._snapshot_handling:
            found.append(
                peer_pb2.Objection(
                    reason="SNAPSHOTS",
                    message=f"{self.name} has {count} snapshot{'s' if count > 1 else ''}: --with-snapshots takes them "
                    "along, --without-snapshots deletes them with the copy on this host",
                )
            )
        for bind in self.spec.binds:
            if not bind.shared:
                found.append(
                    peer_pb2.Objection(
                        reason="BIND_MOUNT",
                        message=f"{bind.source} is a folder of this host; if every host has the same, create the "
                        "container with `shared` on that bind mount",
                    )
                )
        return found

    def is_settled(self) -> bool:
        """Whether no arrival of it is unfinished."""
        return all(record.container != self.name for record in Incomings(self._managers.database).unfinished())

    def has_ended(self) -> bool:
        """Whether the first process is gone."""
        return not Process(self._record.init_pid, self._record.init_ticks).is_alive()

    # -- tools ------------------------------------------------------------------------------------------------------

    @contextmanager
    def track_writes(self, volume: LeavingVolume) -> Iterator[WriteTracker]:
        """A started tracker on the volume's loop device: by eBPF, or by comparing where that does not work."""
        assert volume.device is not None
        if (why := tracker.probe()) is not None:
            log.warning("the disk is read whole in the freeze, to compare it", container=self.name, because=why)
        with closing(tracker.make(volume.device, volume.image)) as writes:
            writes.start()
            yield writes

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See LeavingContainer. One that was paused before stays so."""
        if self._record.state is not State.RUNNING:
            yield
            return
        try:
            self._cgroup.freeze()
            yield
        finally:
            self._cgroup.thaw()

    @contextmanager
    def track_memory(self) -> Iterator[tuple[MemoryTracker | None, str]]:
        """By the best way that this kernel has, if CRIU can be kept from dumping memory."""
        if self._managers.pageless is None:
            yield None, "memory is dumped by CRIU while the container stands still: see migrator doctor"
            return
        method, why = memory.choose(self._managers.config.memory_tracker or None)
        with closing(memory.make(self._cgroup.pids, method)) as tracker:
            tracker.start()
            yield tracker, f"memory is tracked by {method}: {why}"

    def pid_inside(self, pid: int) -> int:
        """See LeavingContainer."""
        return pid_inside(pid)

    @contextmanager
    def prepare_checkpoint(self, *, with_memory: bool) -> Iterator[Checkpoint]:
        """A CRIU that waits."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.images.mkdir(parents=True, mode=0o700)
        (self._folder / CRIU_CONFIGURATION).write_text("file-validation filesize\n")
        pageless = None if with_memory else self._managers.pageless
        parent = self._folder / "parent"
        try:
            with (
                Criu(find_program("criu"), environment(), self._paths.netns, pageless) as criu,
                closing(Backlog(self.name)) as self._backlog,
            ):
                if (process := Process.find(criu.pid)) is not None:
                    process.note(self._folder / CRIU_PROCESS)
                criu.warm_up(WARM_UP_TIMEOUT_S)
                request = self._request(None if pageless is None else parent)
                yield _Dump(criu, request, self._cgroup, self._paths.shm, pageless)
        finally:
            shutil.rmtree(self._folder)

    def guard(self, migration: str) -> AbstractContextManager[None]:
        """See `agent.guard`."""
        return guard.guarding(self._managers.config_file, migration, self.name)

    # -- freeze and undo --------------------------------------------------------------------------------------------

    def throttle(self, share: float | None) -> None:
        """By the control group's quota."""
        limit = self.spec.cpu_millis or 1000 * (os.cpu_count() or 1)
        self._cgroup.limit_cpu(self.spec.cpu_millis if share is None else max(10, int(limit * share)))

    def freeze(self) -> None:
        """Every task is stopped on return, and what its kernel still sends no longer draws the traffic back here."""
        with self._between_rehearsals:
            self.throttle(None)  # a task needs the processor to come to where it stops
            self._cgroup.freeze()
            self._accept_all()
        self._managers.networks.give_way(self.name, interfaces(self.spec))

    def go_on(self) -> None:
        """See LeavingContainer."""
        links = interfaces(self.spec)
        self._managers.networks.connect(self.name, links)
        self._managers.networks.announce(self.name, links)
        if self._record.state is not State.PAUSED:
            self._cgroup.thaw()

    def _accept_all(self) -> None:
        """Let it run for moments until it has accepted every connection, so that none is lost; within limits."""
        deadline = time.monotonic() + (ACCEPT_PATIENCE_S if self._record.state is State.RUNNING else 0)
        while (waiting := self._backlog.waiting()) and time.monotonic() < deadline:
            self._cgroup.thaw()
            time.sleep(ACCEPT_S)
            self._cgroup.freeze()
        if waiting:
            log.warning("connections that it has not accepted are reset", container=self.name, connections=waiting)

    def neighbours(self) -> Sequence[Neighbour]:
        """As its kernel knows them now."""
        return neighbours.read(self.name, interfaces(self.spec))

    def disconnect(self) -> None:
        """Nothing reaches or leaves the container any more."""
        self._managers.networks.disconnect(self.name, interfaces(self.spec))

    @contextmanager
    def volumes_ready(self) -> Iterator[None]:
        """Freeze and thaw the file systems again and again while the block runs: freezing them then takes no time.

        A first FIFREEZE writes out the journal and waits for three RCU grace periods, some 40 ms; the next one takes a
        fifth of a millisecond if it comes before another grace period has passed (rcu_sync_enter in the kernel).

        Not while the tasks are being frozen: one that waits to write is given the file system's lock by the thaw,
        would keep it while it is frozen, and no later freeze of the file system would come to an end.
        """
        mounts = {mount.at: 0 for mount in self._mounted()}
        once, enough = threading.Event(), threading.Event()

        def rehearse() -> None:
            try:
                for at in mounts:
                    filesystem.freeze(at)
                    filesystem.thaw(at)
                once.set()
                while mounts and not enough.wait(REHEARSAL_S):
                    with self._between_rehearsals:
                        for at in list(mounts):
                            began = time.monotonic()
                            filesystem.freeze(at)
                            filesystem.thaw(at)
                            is_slow = time.monotonic() - began > SLOW_REHEARSAL_S
                            mounts[at] = mounts[at] + 1 if is_slow else 0
                            if mounts[at] == SLOW_REHEARSALS:
                                del mounts[at]  # XFS writes its log each time: there is nothing to gain
            finally:
                once.set()

        with ThreadPoolExecutor(1) as beside:
            rehearsal = beside.submit(rehearse)
            once.wait()
            try:
                yield
            finally:
                enough.set()
            rehearsal.result()

    def freeze_volumes(self) -> None:
        """What is on the image files is whole on return, and stays so."""
        for mount in self._mounted():
            filesystem.freeze(mount.at)

    def thaw_volumes(self) -> None:
        """Repeatable."""
        for mount in self._mounted():
            filesystem.thaw(mount.at)

    def resume(self) -> None:
        """Repeatable, and right from every state of the freeze."""
        if self._record.state.is_live:
            _resume(self._record, self._folder, self._managers.runtime, self._managers.networks)

    # -- after the handover -----------------------------------------------------------------------------------------

    def kill(self) -> None:
        """The signal waits for each task before the thaw: it runs nothing more."""
        if self._record.state.is_live:
            self._cgroup.kill()
            self._cgroup.thaw()

    def remove(self) -> None:
        """Nothing of the container is here on return."""
        self._managers.containers.forget(self.name)

    def _mounted(self) -> Sequence[MountedVolume]:
        return self._managers.containers.mounted_volumes(self.name)

    def _request(self, parent: Path | None) -> DumpRequest:
        external = {oci.SHM: oci.SHM}
        external |= {volume.mount_point: volume.mount_point for volume in self.spec.volumes[1:]}
        external.update({bind.target: bind.target for bind in self.spec.binds})
        root = Path(f"/proc/{self._record.init_pid}/root")
        external.update({file: "/dev/null" for file in oci.MASKED_FILES if (root / file.lstrip("/")).exists()})
        return DumpRequest(
            pid=self._record.init_pid,
            images=self.images,
            work=self._folder,
            configuration=self._folder / CRIU_CONFIGURATION,
            root=self._paths.rootfs,
            freezer=self._cgroup.freezer,
            external_mounts=external,
            parent=parent,
        )


class _Dump:
    """CRIU lets the control group go while it works: it is frozen again before anything else happens."""

    def __init__(self, criu: Criu, request: DumpRequest, cgroup: Cgroup, shm: Path, pageless: Pageless | None) -> None:
        self._criu = criu
        self._request = request
        self._cgroup = cgroup
        self._shm = shm
        self._pageless = pageless

    def dump(self, sent: Sequence[os.stat_result], check: Callable[[], None]) -> None:
        """Write the images; on return the tasks are stopped by CRIU and by the control group."""
        if self._request.parent is not None and self._pageless is not None:
            self._pageless.prepare(self._request.parent, {pid: pid_inside(pid) for pid in self._cgroup.pids()})
        self._criu.dump(self._request, DUMP_TIMEOUT_S, sent, check)
        self._cgroup.freeze()
        shm_folder.pack(self._shm, self._request.images)


def resume_at_source(name: str, folder: Path, database: Database, runtime: Runtime, networks: Networks) -> None:
    """Thaw and reconnect a container whose migration was aborted, from nothing but the database and the host.

    `folder` is the migration's.
    """
    record = Records(database).get(name)
    if record.state.is_live:
        _resume(record, folder, runtime, networks)


def _resume(record: Record, folder: Path, runtime: Runtime, networks: Networks) -> None:
    """Every step is tried, whatever became of those before; the first failure is raised at the end."""
    paths = runtime.paths(record.name)
    links = interfaces(record.spec)
    with ExitStack() as steps:  # it runs them from the last to the first
        cgroup = runtime.cgroup(record.name)
        steps.callback(cgroup.limit_cpu, record.spec.cpu_millis)
        if record.state is not State.PAUSED:
            steps.callback(cgroup.thaw)
        # After a reboot, say, there is nothing to connect.
        if Process(record.init_pid, record.init_ticks).is_alive():
            steps.callback(networks.announce, record.name, links)
            steps.callback(networks.connect, record.name, links)
        steps.callback(_await_criu, folder)
        # Before CRIU: it takes away the links that it has made, and waits for ever in a frozen file system.
        for at in (paths.rootfs, *(paths.volumes / str(index) for index in range(1, len(record.spec.volumes)))):
            steps.callback(filesystem.thaw, at)


def _await_criu(folder: Path) -> None:
    """Wait until the CRIU of a dead agent has rolled back: it ends with the control group as it found it, frozen.

    Killed half-way it would leave its own code in the tasks, so that is for one that does not come to an end.
    """
    process = Process.noted(folder / CRIU_PROCESS)
    if process is not None and not process.wait(CRIU_ROLLBACK_S):
        process.signal(signal.SIGKILL)
        process.wait(CRIU_ROLLBACK_S)
