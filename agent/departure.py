"""A container on its way out: what `migrator.source` asks of this host (`migrator.ports.LeavingContainer`)."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import structlog

from agent import guard, neighbours, oci, shm_folder
from agent.assembly import interfaces, volume_name
from agent.backlog import Backlog
from agent.breakpoints import Breakpoints
from agent.container_records import Record, State
from agent.dump import LEFT_OUT, SMAPS, Dump
from agent.journal import Incomings
from agent.managers import Managers
from agent.processes import Process, note, pid_inside
from agent.resumption import CRIU_PROCESS, resume
from agent.runtime import environment, find_program
from blockdev import filesystem, tracker
from blockdev.tracker import WriteTracker
from blockdev.volume import MountedVolume
from migrator import memory, smaps
from migrator.criu import Criu, DumpRequest
from migrator.errors import ExecutionError
from migrator.memory import MemoryTracker
from migrator.network import Neighbour
from migrator.ports import Checkpoint, LeavingVolume
from migrator.shm import left_out
from migrator.snapshots import LeavingSnapshot
from migrator.v1 import container_pb2, migration_pb2, peer_pb2

WARM_UP_TIMEOUT_S = 60.0
REHEARSAL_S = 0.003
# While the container stands still.
STOPPED_FREEZE_S = 20.0
# What takes so long has not gained from the rehearsal before; once it may be a busy processor.
SLOW_REHEARSAL_S = 0.025
SLOW_REHEARSALS = 3
# A busy listener is found empty after a few tries; one that nobody accepts from never is.
ACCEPT_PATIENCE_S = 0.1
ACCEPT_S = 0.002
CRIU_CONFIGURATION = "dump.conf"

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

    def early_images(self) -> Sequence[Path]:
        """What /dev/shm holds."""
        folder = self._folder / "early"
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            shm_folder.pack(self._paths.shm, folder)
        except (OSError, ExecutionError) as error:
            # A file that was removed at this moment, say: then it is sent when the container stands still.
            log.info("packing /dev/shm early", container=self.name, reason=str(error))
            return []
        return [folder / shm_folder.DATA]

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
        writes, why = tracker.start(volume.device, volume.image)
        with closing(writes):
            if why is not None:
                log.warning("the disk is read whole in the freeze, to compare it", container=self.name, because=why)
            yield writes

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See LeavingContainer. One that was paused before stays so."""
        if self._record.state is not State.RUNNING:
            yield
            return
        with self._between_rehearsals:
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
        files = {smaps.FOLDER: str(self._folder / SMAPS), left_out.FILE: str(self._folder / LEFT_OUT)}
        try:
            with (
                Criu(find_program("criu"), environment() | files, self._paths.netns, pageless) as criu,
                closing(Backlog(self.name)) as self._backlog,
                closing(Breakpoints()),
            ):
                note(criu.pid, self._folder / CRIU_PROCESS)
                criu.warm_up(WARM_UP_TIMEOUT_S)
                request = self._request(None if pageless is None else parent)
                known = self._managers.smaps
                told = None if known is None else smaps.SmapsFolder(known, self._folder / SMAPS)
                yield Dump(criu, request, self._cgroup, self._paths.shm, pageless, told)
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
            filesystem.freeze(mount.at, STOPPED_FREEZE_S)

    def thaw_volumes(self) -> None:
        """Repeatable."""
        for mount in self._mounted():
            filesystem.thaw(mount.at)

    def resume(self) -> None:
        """Repeatable, and right from every state of the freeze."""
        if self._record.state.is_live:
            resume(self._record, self._folder, self._managers.runtime, self._managers.networks)

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
