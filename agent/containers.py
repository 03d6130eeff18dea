"""The containers of this host: what may be done with one, in which state, and what is noted about it.

The database says what should be; at start `reconcile` compares that with what is. One operation at a time per
container, by leases.
"""

import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import structlog

from agent import oci, processes
from agent.assembly import Assembly
from agent.cgroup import FREEZE_TIMEOUT_S, Cgroup
from agent.container_needs import Addresses, Images, Snapshots
from agent.container_records import Record, Records, State
from agent.database import Database
from agent.executor import Execution
from agent.image_sizes import whole_mib
from agent.leases import Leases
from agent.lives import Lives, init_of, processes_of
from agent.rootfs import find_user
from agent.runtime import ContainerPaths, Runtime
from agent.salvage import tried
from agent.specs import check_name, complete
from blockdev.volume import MountedVolume
from migrator.destination import FAILURES
from migrator.errors import Busy, ExecutionError, InvalidArgument, NotFound, Precondition
from migrator.units import format_size
from migrator.v1.container_pb2 import ContainerSpec

STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0

log = structlog.get_logger()


class Containers:
    """All containers of this host; thread-safe. Call `reconcile` once before use, and `close`."""

    def __init__(
        self,
        database: Database,
        runtime: Runtime,
        assembly: Assembly,
        images: Images,
        addresses: Addresses,
        snapshots: Snapshots,
    ) -> None:
        self._records = Records(database)
        self._runtime = runtime
        self._assembly = assembly
        self._images = images
        self._addresses = addresses
        self._snapshots = snapshots
        self._leases = Leases()
        self._lives = Lives(self._records, self._leases, runtime, assembly, snapshots)
        self._assigning = threading.Lock()

    def close(self) -> None:
        """Stop watching; the containers run on."""
        self._lives.close()

    # What is there

    def record(self, name: str) -> Record:
        """Raises NotFound."""
        return self._records.get(name)

    def all(self) -> list[Record]:
        return self._records.all()

    def spec(self, name: str) -> ContainerSpec:
        return self._records.get(name).spec

    def paths(self, name: str) -> ContainerPaths:
        return self._runtime.paths(check_name(name))

    def cgroup(self, name: str) -> Cgroup:
        return self._runtime.cgroup(check_name(name))

    def init_pid(self, name: str) -> int:
        """The first process's pid; raises Precondition if the container does not run."""
        process = init_of(self._records.get(name))
        if process is None:
            raise Precondition(f"container {name} does not run: start it first", reason="NOT_RUNNING")
        return process.pid

    def has_ended(self, name: str) -> bool:
        """Whether the first process is gone, asked of the kernel and not of the record."""
        return init_of(self._records.get(name)) is None

    def mounted_volumes(self, name: str) -> list[MountedVolume]:
        """In the order of the spec; the container is running or paused."""
        return self._assembly.mounted(name, self.spec(name))

    def disk_bytes(self, name: str) -> list[int]:
        """What each volume takes on the host."""
        return self._assembly.disk_bytes(name, self.spec(name))

    def operation(self, name: str) -> str | None:
        """What the container is held for now."""
        return self._leases.operation(name)

    def exec_sessions(self, name: str) -> list[tuple[int, str]]:
        """(pid, command) of processes that are not the first one's descendants: a checkpoint cannot hold them."""
        return processes.strangers(self.init_pid(name), self.cgroup(name).pids())

    def execute(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Sequence[str] = (),
        working_directory: str = "",
        user: str = "",
        terminal: tuple[int, int] | None = None,
    ) -> Execution:
        """Run a command in the container; `terminal` is (rows, columns). Holds nothing: a migration may begin."""
        record = self._records.get(name)
        record.require("run a command in", State.RUNNING)
        operation = self._leases.operation(name)
        if operation is not None:
            raise Busy(f"container {name} is busy: {operation}; try again when that is done")
        if not command:
            raise InvalidArgument("there is no command to run")
        process = oci.process(
            record.spec,
            record.spec.hostname or name,
            find_user(self.paths(name).rootfs, user or record.spec.user),
            command=command,
            extra_environment=environment,
            working_directory=working_directory,
            terminal=terminal,
        )
        return Execution(self._runtime, name, process)

    @contextmanager
    def hold(self, name: str, operation: str, *, wait_s: float = 0.0, brief: bool = False) -> Iterator[None]:
        """No other operation on the container while the block runs; Busy if there is one. Ends wait to be noted."""
        with self._leases.hold(check_name(name), operation, wait_s=wait_s, brief=brief):
            yield

    # Life

    def create(self, name: str, spec: ContainerSpec) -> Record:
        """A new container with its volumes; it does not run."""
        with self.hold(name, "it is being created"):
            image = self._images.get(spec.image)
            full = complete(name, spec, image.filesystem)
            smallest = image.path.stat().st_size
            if full.volumes[0].size_bytes < smallest:
                given, least = format_size(full.volumes[0].size_bytes), format_size(whole_mib(smallest))
                raise InvalidArgument(f"a disk of {given} is too small for image {spec.image}: give at least {least}")
            with ExitStack() as undo:
                record = self._enter(name, full, State.ARRIVING)
                undo.callback(self._records.delete, name)
                self._assembly.create(name, record.spec, image.path)
                record = self._records.update(name, state=State.CREATED)
                undo.pop_all()
            return record

    def start(self, name: str) -> Record:
        """Let it run. Raises Precondition if it does already."""
        with self.hold(name, "it is being started"):
            record = self._records.get(name)
            record.refuse("start", State.RUNNING, State.PAUSED, State.ARRIVING)
            self._lives.let_be(name)
            self._records.heed_loss(name)
            return self._lives.start(record)

    def stop(self, name: str, timeout_s: float = STOP_TIMEOUT_S) -> Record:
        """SIGTERM, and SIGKILL after the timeout; returns when all is at rest. Nothing to do if it is stopped."""
        with self.hold(name, "it is being stopped"):
            self._lives.let_be(name)
            self._records.get(name).refuse("stop", State.ARRIVING)
            record = self._records.update(name, should_run=0)
            if not record.state.is_live:
                return record
            self.cgroup(name).thaw()
            init = init_of(record)
            if init is not None and not (init.signal(signal.SIGTERM) and init.wait(timeout_s)):
                init.signal(signal.SIGKILL)
                if not init.wait(KILL_TIMEOUT_S):
                    raise ExecutionError(f"process {init.pid} of {name} does not die: it is in an uninterruptible wait")
            return self._lives.end(record)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """One signal to the first process; its end, if it ends, is noted as any other."""
        if number not in signal.valid_signals():
            raise Precondition(f"{number} is not a signal", reason="INVALID_ARGUMENT")
        with self.hold(name, "it is being sent a signal"):
            record = self._records.get(name)
            record.refuse("send a signal to", State.ARRIVING)
            init = init_of(record) if record.state.is_live else None
            if init is None or not init.signal(number):
                raise Precondition(f"container {name} does not run: start it first", reason="NOT_RUNNING")
            if number == signal.SIGKILL:
                # The freezer holds even this one back in version 1.
                self._records.update(name, should_run=0)
                self.cgroup(name).thaw()

    def pause(self, name: str, *, again: bool = False, timeout_s: float = FREEZE_TIMEOUT_S) -> Record:
        """Stop its processes where they are, by the freezer; `again` also those of one that should be paused."""
        with self.hold(name, "it is being paused"):
            record = self._records.get(name)
            record.require("pause", *((State.RUNNING, State.PAUSED) if again else (State.RUNNING,)))
            self.cgroup(name).freeze(timeout_s)
            return self._records.update(name, state=State.PAUSED)

    def resume(self, name: str) -> Record:
        with self.hold(name, "it is being resumed"):
            record = self._records.get(name)
            record.require("resume", State.PAUSED)
            self.cgroup(name).thaw()
            return self._records.update(name, state=State.RUNNING)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete it with its volumes and log; a running one only with force."""
        with self.hold(name, "it is being deleted"):
            record = self._records.get(name)
            record.refuse("delete", State.ARRIVING)
            if record.state.is_live and not force:
                raise Precondition(
                    f"container {name} is {record.state}: stop it first, or use --force", reason="RUNNING"
                )
            self._remove(record)

    # For migrations, which hold the container meanwhile

    def reserve(self, name: str, spec: ContainerSpec, create_time_ms: int = 0) -> Record:
        """Take name and addresses for a container on its way in. The spec stays as it is."""
        check_name(name)
        with self._assigning:
            return self._records.insert(name, spec, State.ARRIVING, create_time_ms)

    def unreserve(self, name: str) -> None:
        """Give up a reservation and delete what there is of the container; repeatable."""
        try:
            record = self._records.get(name)
        except NotFound:
            return
        record.require("unreserve", State.ARRIVING)
        self._remove(record)

    def adopt(self, name: str, state: State, *, create_time_ms: int, start_time_ms: int, restarts: int = 0) -> Record:
        """A reserved container is this host's own now, in this state; a live one was launched by `Runtime.launch`."""
        if not state.is_live:
            self._assembly.down(name, self.spec(name))
            return self._records.update(name, state=state, create_time_ms=create_time_ms, restarts=restarts)
        launched = self._runtime.launched(name)
        values = {} if launched is None else processes_of(launched)
        record = self._records.update(
            name,
            state=state,
            should_run=1,
            create_time_ms=create_time_ms,
            start_time_ms=start_time_ms,
            restarts=restarts,
            **values,
        )
        self._lives.watch(record)
        return record

    def adopt_lost(self, name: str, *, create_time_ms: int, start_time_ms: int) -> None:
        """A reserved container is this host's own now, but its tasks are gone: the disk is what there is of it."""
        log.error("container lost: it ended before it was this host's own", container=name)
        self._runtime.delete(name)
        self._assembly.down(name, self.spec(name))
        self._records.note_loss(name)
        times = {"create_time_ms": create_time_ms, "start_time_ms": start_time_ms}
        self._lives.after_end(self._records.update(name, state=State.STOPPED, should_run=1, **times))

    def forget(self, name: str) -> None:
        """The container lives elsewhere now: end its frozen tasks without running them, delete all that is theirs."""
        try:
            record = self._records.get(name)
        except NotFound:
            return
        self._remove(record)

    # After a start of the agent

    def reconcile(self, arriving: Collection[str] = ()) -> None:
        """Compare the records with what is: adopt what runs, note what has ended, remove what should not be.

        `arriving` are those whose migration to this host is not finished; others that look so were being created.
        """
        for record in self._records.all():
            if record.state is State.ARRIVING:
                if record.name not in arriving:
                    log.warning("remove container whose creation was interrupted", container=record.name)
                    with tried(f"container {record.name}"):
                        self._remove(record)
                continue
            if record.state.is_live:
                self._lives.watch(self._settle_pause(record))
                continue
            try:
                with self.hold(record.name, "it is being looked at after a start of the agent"):
                    try:
                        self._lives.take_down(record)
                    finally:
                        if record.should_run:
                            self._lives.start_later(record, 0.0)
            except FAILURES as error:
                log.error("reconcile", container=record.name, error=str(error))
        recorded = {record.name for record in self._records.all()}
        for name in self._runtime.known():
            if name not in recorded:
                log.warning("remove unknown container", container=name)
                self._runtime.delete(name)

    # Inside

    def _settle_pause(self, record: Record) -> Record:
        """The agent died between the freezer and the record: what was not recorded was not done. Or it was resumed."""
        group, paused = self.cgroup(record.name), record.state is State.PAUSED
        if group.is_frozen() == paused or init_of(record) is None:
            return record
        try:
            with self.hold(record.name, "it is being looked at after a start of the agent"):
                log.warning("pause or resume was interrupted: it runs on", container=record.name)
                group.thaw()
                return self._records.update(record.name, state=State.RUNNING)
        except Busy:
            return record  # its migration decides

    def _enter(self, name: str, spec: ContainerSpec, state: State) -> Record:
        """Addresses and the record in one step, so that two containers never get the same."""
        with self._assigning:
            self._addresses.assign(name, spec, [record.spec for record in self._records.all() if record.name != name])
            return self._records.insert(name, spec, state)

    def _remove(self, record: Record) -> None:
        self._lives.let_be(record.name)
        self._lives.take_down(record)
        self._assembly.delete(record.name, record.spec)
        self._snapshots.delete_all(record.name)
        self._records.delete(record.name)
