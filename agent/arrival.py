"""A container on its way in: what `migrator.destination` asks of this host (`migrator.ports.ArrivalHost`)."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from agent import admission, examination, oci, shm_folder
from agent.arriving_memory import ArrivingMemory
from agent.arriving_snapshots import ArrivingSnapshots
from agent.assembly import interfaces, volume_name
from agent.breakpoints import Breakpoints
from agent.container_records import State
from agent.journal import Incomings
from agent.managers import Managers
from agent.neighbours import Neighbours
from agent.network import hold_name, host_end
from agent.peers import why_silent
from agent.restore import HeldRestore
from agent.restorer import Orders
from agent.rootfs import User
from agent.runtime import Launch, Restore, find_program
from agent.specs import check_binds
from blockdev import durable
from blockdev.blocks import Piece
from migrator.errors import AlreadyExists, ExecutionError, NotFound, Precondition
from migrator.hold import TrafficHold
from migrator.network import Neighbour
from migrator.shm import images as shared_images
from migrator.shm.store import SharedStore
from migrator.source import FEATURES, Here
from migrator.v1 import container_pb2, peer_pb2

REQUEST = "arrival.pb"
RESTORE_LOG = "restore.log"
PROGRAMS = "programs"
LAUNCH_TIMEOUT_S = 30.0

log = structlog.get_logger()


class Arriving:
    """Everything of one container that exists here before it is this host's own."""

    def __init__(self, managers: Managers, request: peer_pb2.PrepareRequest) -> None:
        self._managers = managers
        self._request = request
        self._name: str = request.container
        self._spec: container_pb2.ContainerSpec = request.spec
        self._links = interfaces(request.spec)
        self._paths = managers.runtime.paths(self._name)
        self._folder = managers.migration_folder(request.migration)
        cgroup = managers.runtime.cgroup(self._name).freezer
        self.shared = SharedStore()
        self._memory = ArrivingMemory(self._folder, self._paths.bundle, cgroup)
        self._restore = HeldRestore(self._folder, self._memory.images, self._paths.bundle / PROGRAMS)
        self._state = State(container_pb2.ContainerState.Name(request.state).removeprefix("CONTAINER_STATE_").lower())
        self._launch: Launch | None = None
        self._hold: TrafficHold | None = None
        self._neighbours: Neighbours | None = None
        self._breakpoints: Breakpoints | None = None
        self._amended: shared_images.Amended | None = None
        self.has_base = False
        self._snapshots = ArrivingSnapshots(managers.snapshots, request)

    # -- what it consists of ----------------------------------------------------------------------------------------

    @property
    def volumes(self) -> Sequence[Path]:
        """The image files, in the order of the spec."""
        names = [volume_name(self._name, index) for index in range(len(self._spec.volumes))]
        return [self._managers.volumes.open(name).path for name in names]

    @property
    def images(self) -> Path:
        """On a tmpfs."""
        return self._restore.images

    @property
    def memory(self) -> Path:
        """A tmpfs of its own."""
        return self._memory.store

    @property
    def log(self) -> Path:
        """The file that conmon will go on writing."""
        return self._paths.log

    def reserve(self) -> None:
        """Take name and room, make empty volumes, the bundle and the network; undone if that fails."""
        if self._folder.exists():
            raise AlreadyExists(f"migration {self._request.migration} is another one here")
        with ExitStack() as undo:
            self._managers.containers.reserve(self._name, self._spec, self._request.create_time_ms)
            undo.callback(self.discard)
            self._paths.bundle.mkdir(parents=True, mode=0o700, exist_ok=True)
            durable.write(self._paths.bundle / REQUEST, self._request.SerializeToString())
            durable.sync(self._paths.bundle.parent)
            for index, volume in enumerate(self._spec.volumes):
                base = self._base(volume) if index == 0 else None
                self.has_base = self.has_base or base is not None
                self._managers.volumes.receive(
                    volume_name(self._name, index), volume.size_bytes, volume.filesystem, base
                )
            self._folder.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            if self._state.is_live:
                self._folder.mkdir(mode=0o700)
                if self._request.memory_bytes:
                    self._memory.mount(self._request.memory_bytes)
                self._prepare_restore()
                if self._request.memory_bytes:
                    self._memory.launch()
            undo.pop_all()

    def _base(self, volume: container_pb2.Volume) -> Path | None:
        """The image that the container was made of, if one of that name is here; it need not be the same."""
        try:
            image = self._managers.images.get(self._spec.image)
        except NotFound:
            return None
        return image.path if image.size_bytes <= volume.size_bytes else None

    def _prepare_restore(self) -> None:
        runtime = self._managers.runtime
        orders = Orders(
            criu=find_program("criu"),
            images=str(self._memory.images),
            root=str(self._paths.rootfs),
            network=self._name,
            volumes={
                volume.mount_point: str(at)
                for volume, at in zip(
                    self._spec.volumes, self._managers.assembly.mount_points(self._name, self._spec), strict=True
                )
            },
            group=runtime.cgroup(self._name).path,
            watchers=runtime.monitors.path,
        )
        self._restore.prepare(orders, self._request.stdio, lazy=self._request.memory_bytes > 0)
        config = oci.config(
            self._name,
            self._spec,
            User(),
            shm=self._paths.shm,
            volumes=self._paths.volumes,
            cgroup=orders.group,
            netns=self._paths.netns,
        )
        config["annotations"] = {"org.criu.config": str(self._restore.configuration)}
        (self._paths.bundle / "config.json").write_text(json.dumps(config, indent=1))
        # runc looks for them before it waits; they are mounted before CRIU goes on.
        for folder in self._managers.assembly.mount_points(self._name, self._spec):
            folder.mkdir(parents=True)
        shm_folder.mount(self._paths.shm, self._spec.shm_bytes)
        self._managers.networks.create(self._name, self._links)
        self._neighbours = Neighbours(self._name, self._links)
        self._hold = TrafficHold(hold_name(self._name), self._links)

    # -- the phases -------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """runc has started and waits for `restore`."""
        self._breakpoints = Breakpoints()
        restore = Restore(self._restore.images, programs=self._restore.programs)
        self._launch = self._managers.runtime.launch(self._name, restore)
        self._restore.wait_warm(self._launch)

    def write_snapshot(self, name: str, piece: Piece) -> None:
        """Store a piece of a snapshot."""
        self._snapshots.write(name, piece)

    def keep_snapshots(self) -> None:
        """The snapshots are complete; the volumes begin as the current one."""
        self._snapshots.keep(list(zip(self.volumes, (v.size_bytes for v in self._spec.volumes), strict=True)))

    def hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        """The switch sends the container's frames here from now on."""
        if self._launch is not None:
            self._restore.expect_waiting()
        if self._hold is not None and self._neighbours is not None:
            self._hold.take()
            self._neighbours.learn(neighbours)

    def mount(self) -> None:
        """Attach the image files and mount them."""
        self._managers.assembly.mount(self._name, self._spec)
        if self._state.is_live:
            self._restore.read_ahead()

    def amend_images(self) -> None:
        """What the fill maps is left out, and shared memory is the store's."""
        if self._request.memory_bytes:
            self._memory.prepare()
        shm_folder.unpack(self._restore.images, self._paths.shm)
        self._amended = shared_images.amend(self._restore.images, self.shared)
        self._restore.inherit(self._amended)

    def restore(self) -> Mapping[str, float]:
        """Every task is there and held on return."""
        if self._launch is None or self._amended is None:
            raise ExecutionError(f"the restore of {self._name} was not prepared")
        began = time.monotonic()
        self._restore.restore(self._launch, self._paths.bundle / RESTORE_LOG)
        self._amended.seal()
        self.shared.close()
        return {"restore": (time.monotonic() - began) * 1000}

    def is_held(self) -> bool:
        """Whether the restored tasks wait for their verdict."""
        return self._restore.is_held() and self._managers.runtime.has_conmon(self._name)

    def complete(self) -> Mapping[str, float]:
        """The tasks are there, frozen, and need neither CRIU nor runc any more. They may send, and hear nothing yet."""
        began = time.monotonic()
        if self._hold is not None:
            # Before their sockets are back: what these send at once, an ARP request, would be lost and repeated after
            # 1 s. What is sent to them goes to the hold.
            self._managers.networks.connect(self._name, self._links, learning=False)
        connected = time.monotonic()
        if not self._restore.is_over:
            # An earlier life of the agent may have said the word already; then the restorer has ended, or is about to.
            if self._launch is not None or self._restore.is_held():
                self._restore.let_go(self._launch)
            self._await_launched()
            self._restore.end()
        elif self._managers.runtime.launched(self._name) is None:
            raise ExecutionError(f"the restored copy of {self._name} has ended before it could run")
        resumed = time.monotonic()
        return {"connect": (connected - began) * 1000, "resume": (resumed - connected) * 1000}

    def run(self) -> Mapping[str, float]:
        """The tasks run, connected, and have got what was held for them."""
        if not self._state.is_live or self._is_settled() or self._is_lost():
            return {}
        if not self._restore.is_over:
            self.complete()  # an operator has resolved it to be here
        began = time.monotonic()
        if self._hold is None:
            self._managers.networks.connect(self._name, self._links)
        if self._state is not State.PAUSED:
            self._managers.runtime.cgroup(self._name).thaw()
        thawed = time.monotonic()
        if self._hold is not None:
            held = self._hold.replay([host_end(self._name, number) for number in range(len(self._links))])
            log.info("replayed", container=self._name, frames=held, dropped=self._hold.frames_dropped)
        self._managers.networks.announce(self._name, self._links)
        replayed = time.monotonic()
        return {"thaw": (thawed - began) * 1000, "replay": (replayed - thawed) * 1000}

    def missing_bytes(self) -> int:
        """Of its memory, what is at the source yet."""
        return self._memory.missing_bytes()

    def lose(self, why: str) -> None:
        """What is missing will never come."""
        self._memory.lose(why)

    def settle(self) -> bool:
        """The container is this host's own, and its memory is where it belongs."""
        if not self._is_settled():
            times = {
                "create_time_ms": self._request.create_time_ms,
                "start_time_ms": self._request.start_time_ms,
            }
            if self._state.is_live and self._is_lost():
                # A reboot, say, after the handover and before this: as any container whose host was rebooted.
                self._managers.containers.adopt_lost(self._name, **times)
            else:
                if self._state.is_live:
                    self._publish()
                # Last: what is its own already is not settled again.
                self._managers.containers.adopt(self._name, self._state, **times)
        if not self._memory.is_filled():
            return False
        self._clean_up()
        return True

    def _publish(self) -> None:
        try:
            self._managers.assembly.publish(self._name, self._spec)
        except Precondition as error:
            # A port that was free at the preflight: nothing of the container waits for it.
            log.error("ports are not published", container=self._name, reason=str(error))

    def _is_settled(self) -> bool:
        """Whether the container is this host's own already, or was and is gone."""
        try:
            return self._managers.containers.record(self._name).state is not State.ARRIVING
        except NotFound:
            return True

    def _is_lost(self) -> bool:
        """Whether there is nothing any more that runs or waits to run."""
        return not self._managers.runtime.has_conmon(self._name)

    def _await_launched(self) -> None:
        """runc has finished, also with a restore that an earlier life of the agent began."""
        if self._launch is not None:
            launch, self._launch = self._launch, None
            launch.result()
            return
        runtime = self._managers.runtime
        deadline = time.monotonic() + LAUNCH_TIMEOUT_S
        while runtime.launched(self._name) is None:
            if not runtime.has_conmon(self._name) or time.monotonic() > deadline:
                raise ExecutionError(f"runc has not finished restoring {self._name}")
            time.sleep(0.01)

    def give_up(self) -> None:
        """Nothing of it runs, is heard or draws traffic any more."""
        # Cut off first: a reset that its sockets send as they end is not for the client to see.
        self._managers.networks.disconnect(self._name, self._links)
        self._end_hold()
        self._managers.runtime.cgroup(self._name).kill()

    def discard(self) -> None:
        """Nothing of it is here on return."""
        if self._is_settled():
            # It was discarded before, perhaps in part. By now the name may be another container's, the folder is not.
            self._remove_folder()
            return
        self.give_up()
        self._restore.give_up()
        self._close()
        self._managers.runtime.delete(self._name)
        self._memory.discard()
        self._managers.containers.unreserve(self._name)
        self._clean_up()

    def _end_hold(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    def _clean_up(self) -> None:
        self._close()
        (self._paths.bundle / REQUEST).unlink(missing_ok=True)
        (self._paths.bundle / RESTORE_LOG).unlink(missing_ok=True)
        self._memory.release()
        self._remove_folder()
        if self._restore.programs.exists():
            shutil.rmtree(self._restore.programs)

    def _remove_folder(self) -> None:
        self._memory.unmount()
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _close(self) -> None:
        self.shared.close()
        self._restore.close()
        self._snapshots.close()
        if self._launch is not None:
            self._launch.close()
        if self._neighbours is not None:
            self._neighbours.close()
        if self._breakpoints is not None:
            self._breakpoints.close()
        self._end_hold()


class ArrivingHost:
    """This host as a destination."""

    def __init__(self, managers: Managers, here: Here, incomings: Incomings) -> None:
        self._managers = managers
        self._here = here
        self._incomings = incomings

    def examine(self, source: str, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        """Read-only."""
        admission.check_container(self._managers.config, request.container, request.spec)
        return peer_pb2.ExamineResponse(
            host=self._here.host,
            objections=[*self._objections(request), *self._deafness(source)],
            kernel=self._here.kernel,
            criu_version=self._here.criu_version,
            features=FEATURES,
            last_epoch=self._incomings.last_epoch(request.container),
        )

    def _objections(self, request: peer_pb2.ExamineRequest) -> Iterator[peer_pb2.Objection]:
        flags = frozenset(self._here.cpu_flags)
        return examination.objections(self._managers, request, flags, self._here.criu_version)

    def _deafness(self, source: str) -> Iterator[peer_pb2.Objection]:
        """It is asked what it has decided if a link breaks, and for memory that was left behind."""
        if why := why_silent(self._managers.config, source):
            message = f"{self._here.host} cannot ask {source} back, as it may have to: {why}"
            yield peer_pb2.Objection(reason="SOURCE_UNREACHABLE", message=message)

    def check(self, request: peer_pb2.PrepareRequest) -> None:
        """Read-only; the container must not be in the way of another one either, whoever has asked before."""
        admission.check(self._managers.config, request)
        check_binds(request.spec)
        asked = peer_pb2.ExamineRequest(
            container=request.container, spec=request.spec, memory_bytes=request.memory_bytes
        )
        for objection in self._objections(asked):
            raise Precondition(objection.message, reason=objection.reason)

    def reserve(self, request: peer_pb2.PrepareRequest) -> Arriving:
        """Undone by itself if it fails."""
        arriving = Arriving(self._managers, request)
        arriving.reserve()
        return arriving

    def reserved(self, migration: str, container: str) -> tuple[Arriving, container_pb2.ContainerState]:
        """From the request as it was stored; one that was never stored left nothing but perhaps its record."""
        path = self._managers.runtime.paths(container).bundle / REQUEST
        request = peer_pb2.PrepareRequest.FromString(path.read_bytes() if path.exists() else b"")
        if request.migration != migration:  # by now the name may be another's
            request = peer_pb2.PrepareRequest(
                migration=migration, container=container, state=container_pb2.CONTAINER_STATE_STOPPED
            )
        return Arriving(self._managers, request), request.state
