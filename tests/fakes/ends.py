"""Both hosts of a migration without a kernel: containers are a few booleans and real files, calls fail as told.

A fault is a call's name, which call of that name it hits, whether it strikes before the call has had its effect or
after, and what is raised. What exists at a host is a set of words, so that a test can say that nothing is left.
"""

import itertools
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pycriu.images import mm_pb2

from agent.journal import Incomings, Outgoings
from blockdev import blocks, extents
from blockdev.blocks import Batch, Piece
from blockdev.extents import Range
from migrator import images
from migrator.arrivals import Arrivals
from migrator.errors import ExecutionError, Unreachable
from migrator.files import write_file
from migrator.fill import missing
from migrator.handover import Incoming, Keep, Outgoing, Stage
from migrator.memory import Collected, Moment, ObjectKey, ProcessChange, ProcessKey, SharedChange, mappings
from migrator.network import Neighbour
from migrator.numbered import Outbound
from migrator.ports import LeavingVolume
from migrator.shm import targets
from migrator.shm.store import SharedStore
from migrator.snapshots import LeavingSnapshot
from migrator.source import FEATURES
from migrator.v1 import container_pb2, peer_pb2
from migrator.verify import BLOCK_BYTES
from migrator.wire import check_migration

VOLUME_BYTES = 1 << 20
# An image before the freeze and after it: something has changed, become zeros, and come after it.
EARLY_SHM = bytes(range(256)) * 1024
SHM = EARLY_SHM[: 64 << 10] + bytes(64 << 10) + b"x" * 1000 + EARLY_SHM[(128 << 10) + 1000 :] + b"y" * 70_000
NEIGHBOUR = Neighbour("eth0", "10.77.0.1", "02:00:00:00:00:01")
LIVE = container_pb2.CONTAINER_STATE_RUNNING


class Died(BaseException):
    """The agent is killed here: nothing of it runs any more."""


@dataclass(frozen=True)
class Fault:
    """Strikes the `number`th call of this name, counted from 0, and every one after it if it lasts."""

    call: str
    number: int
    after: bool
    error: Callable[[str], BaseException] = ExecutionError
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.call}#{self.number}-{'after' if self.after else 'before'}"


@dataclass
class Calls:
    """Every call of both ends goes through here."""

    fault: Fault | None = None
    seen: list[tuple[str, int]] = field(default_factory=list)
    struck: bool = False
    # Told of each moment: the call, its number, and whether it has had its effect.
    witness: Callable[[str, int, bool], None] = lambda *_: None
    at_strike: Callable[[], None] = lambda: None
    _counts: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        number = self._counts[name]
        self._counts[name] += 1
        self.seen.append((name, number))
        self._strike(name, number, after=False)
        yield
        self._strike(name, number, after=True)

    def _strike(self, name: str, number: int, *, after: bool) -> None:
        self.witness(name, number, after)
        fault = self.fault
        if fault is None or fault.call != name or fault.after != after:
            return
        if number == fault.number or (fault.lasting and number > fault.number):
            self.struck = True
            self.at_strike()
            raise fault.error(f"{fault} as asked for")


class World:
    """What runs where; two copies that run at once are the failure that nothing may cause."""

    def __init__(self) -> None:
        self.source_runs = True
        self.destination_runs = False

    def check(self) -> None:
        assert not (self.source_runs and self.destination_runs), "two copies run"


class FakeTracker:
    """Reports one range once."""

    reads_all = False

    def __init__(self) -> None:
        self._left = [[Range(0, 65536)], [Range(65536, 131072)]]

    def start(self) -> None:
        pass

    def collect(self, check: Callable[[], None] = lambda: None) -> list[Range]:
        return self._left.pop() if self._left else []

    def observe(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        return iter(pieces)

    def close(self) -> None:
        pass


class FakeMemory:
    """One process (`migrator.memory.MemoryTracker`): two pages, of which one is written again, the other goes; and an
    object of shared memory that it has all the time."""

    name = "fake"
    needs_pause = False
    # No machine has a process of this pid.
    process = ProcessKey(1 << 23, 1)
    pages = (Range(4096, 8192), Range(1 << 40, (1 << 40) + 4096))

    shared = SharedChange(
        ObjectKey(targets.internal_device(), 7), "/memfd:fake (deleted)", 8192, [Range(0, 4096)], [Range(4096, 8192)]
    )

    # More than could be sent while a container stands still: zeros.
    burst = Range(1 << 41, (1 << 41) + (1 << 30))

    # What one that writes faster than can be sent writes all the time.
    rush = Range(1 << 42, (1 << 42) + (5 << 20))

    def __init__(self, bursts: int = 0, *, writes_fast: bool = False) -> None:
        """The first `bursts` looks at the container that has stopped find a burst."""
        one, other = self.pages
        self._bursts = bursts
        self._writes_fast = writes_fast
        self._looks = [
            ProcessChange(self.process, [one], [other], True),
            ProcessChange(self.process, [*self.pages], [], True),
        ]

    def start(self) -> None:
        pass

    def collect(self, moment: Moment = Moment.RUNNING) -> Collected:
        if moment is Moment.STOPPED and self._bursts:
            self._bursts -= 1
            return Collected([ProcessChange(self.process, [self.burst], [], True)], [self.shared])
        if self._writes_fast:
            return Collected([ProcessChange(self.process, [*self.pages, self.rush], [], True)], [self.shared])
        return Collected([self._looks.pop()] if self._looks else [], [self.shared])

    def drain(self, seconds: float = 1.0) -> list[str]:
        return []

    @classmethod
    def contents(cls, ranges: Iterable[Range]) -> Iterator[Batch]:
        """As it is in the end, of what it writes all the time."""
        for part in ranges:
            assert cls.rush.start <= part.start < part.end <= cls.rush.end
            yield Batch([part.start, part.length], b"r" * part.length)

    def read(self, process: ProcessKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        for part in ranges:
            if part == self.rush:
                for piece in extents.pieces([part], blocks.PIECE_BYTES):
                    yield Batch([piece.start, piece.length], b"R" * piece.length)
                continue
            is_gone = part == self.pages[1] and not self._looks and not self._writes_fast
            if part == self.burst or is_gone:
                yield from blocks.zeros([part])
            else:
                yield Batch([part.start, part.length], b"m" * part.length)

    def read_shared(self, key: ObjectKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        assert key == self.shared.key
        yield Batch([0, 4096], b"s" * 4096)

    def populated(self, process: ProcessKey) -> list[Range]:
        assert process == self.process
        return [*self.pages]

    def areas(self, process: ProcessKey) -> list[mappings.Mapping]:
        assert process == self.process
        return []

    def get_ready(self) -> None:
        pass

    def compare(self) -> list[SharedChange]:
        return []

    def collect_ahead(self, process: ProcessKey) -> ProcessChange | None:
        assert process == self.process
        return None

    def status(self, key: ObjectKey) -> os.stat_result:
        assert key == self.shared.key
        return Path("/").stat()

    def close(self) -> None:
        pass


class FakeLeaving:
    """A container at the source (`migrator.ports.LeavingContainer`)."""

    PID = 7

    def __init__(
        self,
        folder: Path,
        world: World,
        calls: Calls,
        state: "container_pb2.ContainerState" = LIVE,
        *,
        ended: bool = False,
    ) -> None:
        folder.mkdir()
        self._folder = folder
        self.name = "ct"
        self.spec = container_pb2.ContainerSpec(image="i", volumes=[container_pb2.Volume(size_bytes=VOLUME_BYTES)])
        self.state = state
        self.create_time_ms = self.start_time_ms = 1
        self.memory_bytes = 4096
        self.unwritten_bytes = 0
        self.bursts = 0
        self.writes_fast = False
        self.log = folder / "log"
        self.log.write_text("a line\n")
        self.image = folder / "volume"
        self.image.write_bytes(bytes(range(256)) * (VOLUME_BYTES // 256))
        self._snapshot = folder / "snapshot"
        self._snapshot.write_bytes(b"s" * BLOCK_BYTES + self.image.read_bytes()[BLOCK_BYTES:])
        self.images = folder / "images"
        self.frozen = self.disconnected = self.fs_frozen = self.killed = self.removed = self.criu_holds = False
        self.guarded = False
        self.ended = ended
        self._world = world
        self._call = calls
        self._live = state == LIVE
        self._update()

    @property
    def volumes(self) -> Sequence[LeavingVolume]:
        return [LeavingVolume(self.image, VOLUME_BYTES, self.image if self._live else None, None)]

    @property
    def snapshots(self) -> Sequence[LeavingSnapshot]:
        """One of them, as the volume was before it was changed, and one like it that came after."""
        taken = [container_pb2.Volume(size_bytes=VOLUME_BYTES)]
        return [
            LeavingSnapshot(name, parent, 1, parent is not None, taken, [self._snapshot])
            for name, parent in (("one", None), ("two", 0))
        ]

    def stdio(self) -> Sequence[str]:
        return ["pipe:[1]"] * 3 if self._live else []

    def objections(self) -> Sequence[peer_pb2.Objection]:
        with self._call("source.objections"):
            return []

    @contextmanager
    def track_writes(self, volume: LeavingVolume) -> Iterator[FakeTracker]:
        with self._call("source.track"):
            pass
        yield FakeTracker()
        with self._call("source.untrack"):
            pass

    @contextmanager
    def pause(self) -> Iterator[None]:
        yield

    @contextmanager
    def track_memory(self) -> Iterator[tuple[FakeMemory, str]]:
        with self._call("source.track memory"):
            pass
        yield FakeMemory(self.bursts, writes_fast=self.writes_fast), "memory is tracked by a fake"
        with self._call("source.untrack memory"):
            pass

    def pid_inside(self, pid: int) -> int:
        return self.PID

    @contextmanager
    def prepare_checkpoint(self, *, with_memory: bool) -> Iterator["FakeLeaving"]:
        with self._call("source.checkpoint"):
            pass
        self.images.mkdir()
        try:
            yield self
        finally:
            # CRIU waits in a frozen file system, so the way back has to have thawed it.
            assert self.killed or not (self.criu_holds and self.fs_frozen), "CRIU would hang in a frozen file system"
            self.criu_holds = False
            for image in self.images.iterdir():
                image.unlink()
            self.images.rmdir()
            with self._call("source.end of CRIU"):
                pass

    def rehearse(self) -> None:
        with self._call("source.rehearse"):
            assert not self.frozen

    def prepare(self, sent: Sequence[os.stat_result]) -> None:
        assert self.frozen
        self.left_out = len(sent)

    def dump(self, check: Callable[[], None]) -> None:
        check()
        with self._call("source.dump"):
            assert self.frozen
            self.criu_holds = True
            (self.images / "core-1.img").write_bytes(b"core" * 100)
            (self.images / f"mm-{self.PID}.img").write_bytes(_mappings(FakeMemory.rush))
            (self.images / "shm.img").write_bytes(SHM)

    def early_images(self) -> Sequence[Path]:
        with self._call("source.early images"):
            path = self._folder / "shm.img"
            path.write_bytes(EARLY_SHM)
            return [path]

    @contextmanager
    def guard(self, migration: str) -> Iterator[None]:
        with self._call("source.guard"):
            pass
        self.guarded = True
        try:
            yield
        finally:
            self.guarded = False
            with self._call("source.stand down"):
                pass

    def throttle(self, share: float | None) -> None:
        raise AssertionError("nothing here writes fast")

    def freeze(self) -> None:
        with self._call("source.freeze"):
            self.frozen = True
            self._update()

    def go_on(self) -> None:
        with self._call("source.go on"):
            self.frozen = False
            self._update()

    def neighbours(self) -> Sequence[Neighbour]:
        with self._call("source.neighbours"):
            return [NEIGHBOUR]

    def disconnect(self) -> None:
        with self._call("source.disconnect"):
            self.disconnected = True

    @contextmanager
    def volumes_ready(self) -> Iterator[None]:
        with self._call("source.volumes ready"):
            pass
        yield
        with self._call("source.volumes not ready"):
            pass

    def freeze_volumes(self) -> None:
        with self._call("source.freeze volumes"):
            self.fs_frozen = True

    def thaw_volumes(self) -> None:
        with self._call("source.thaw volumes"):
            self.fs_frozen = False

    def resume(self) -> None:
        with self._call("source.resume"):
            self.frozen = self.disconnected = self.fs_frozen = False
            self._update()

    def is_settled(self) -> bool:
        return True

    def has_ended(self) -> bool:
        return self.ended

    def start_again(self) -> None:
        """As the agent or an operator starts a container that has ended."""
        self.ended = False
        self._update()

    def reboot(self) -> None:
        """Its host was rebooted: what is on the disk is there."""
        self.ended = True
        self.frozen = self.disconnected = self.fs_frozen = False
        self._update()

    def kill(self) -> None:
        with self._call("source.kill"):
            self.killed = True
            self._update()

    def remove(self) -> None:
        with self._call("source.remove"):
            self.killed = self.removed = True
            self.frozen = self.disconnected = self.fs_frozen = False
            self._update()

    def is_as_before(self) -> bool:
        """Untouched, as far as anybody can see."""
        stopped = self.frozen or self.disconnected or self.fs_frozen or self.killed
        return not (stopped or self.criu_holds or self.guarded)

    def _update(self) -> None:
        self._world.source_runs = self._live and not (self.frozen or self.killed or self.ended)
        self._world.check()


def _mappings(part: Range) -> bytes:
    """CRIU's image of them, with one that is private and anonymous: the fill maps that."""
    made = mm_pb2.mm_entry(
        mm_start_code=0, mm_end_code=0, mm_start_data=0, mm_end_data=0, mm_start_stack=0, mm_start_brk=0, mm_brk=0,
        mm_arg_start=0, mm_arg_end=0, mm_env_start=0, mm_env_end=0, exe_file_id=0,
    )  # fmt: skip
    made.vmas.add(
        start=part.start, end=part.end, pgoff=0, shmid=0, prot=3, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        status=1, fd=-1,
    )  # fmt: skip
    return bytes(images.HEADER_BYTES) + images.joined([made.SerializeToString()])


class FakeReservation:
    """A container on its way in (`migrator.ports.Reservation`); `left` is what exists of it."""

    def __init__(self, folder: Path, world: World, calls: Calls, live: bool) -> None:
        self._folder = folder
        self._world = world
        self._call = calls
        self._live = live
        self.left: set[str] = set()
        self.owned = False
        self.has_base = True
        self.lost = False
        self.shared = SharedStore()

    def reserve(self) -> None:
        with self._call("destination.reserve"):
            pass
        self._folder.mkdir()
        self.images.mkdir()
        with self.volumes[0].open("wb") as file:
            # As a clone of some image: one block is the source's, one is another, the rest is not there.
            file.write(bytes(range(256)) * (BLOCK_BYTES // 256) + b"z" * BLOCK_BYTES)
            file.truncate(VOLUME_BYTES)
        self.left |= {"name", "volume", "network"}

    @property
    def volumes(self) -> Sequence[Path]:
        return [self._folder / "volume"]

    @property
    def images(self) -> Path:
        return self._folder / "images"

    @property
    def memory(self) -> Path:
        return self._folder

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def warm_up(self) -> None:
        with self._call("destination.warm up"):
            self.left.add("runc")

    def write_snapshot(self, name: str, piece: Piece) -> None:
        assert name == "0/0"
        with self._call("destination.write snapshot"):
            (self._folder / "snapshot").touch()
            write_file(self._folder, "snapshot", piece)
            self.left.add("snapshot")

    def keep_snapshots(self) -> None:
        with self._call("destination.keep snapshots"):
            assert (self._folder / "snapshot").stat().st_size == VOLUME_BYTES
            with self.volumes[0].open("r+b") as volume:
                volume.write((self._folder / "snapshot").read_bytes())

    def hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        with self._call("destination.hold traffic"):
            assert neighbours == [NEIGHBOUR]
            self.left.add("tap")

    def mount(self) -> None:
        with self._call("destination.mount"):
            self.left.add("mount")

    def amend_images(self) -> None:
        with self._call("destination.amend"):
            self.left.add("amended")

    def restore(self) -> Mapping[str, float]:
        with self._call("destination.restore"):
            assert self.left >= {"mount", "amended"}
            assert (self.images / "shm.img").read_bytes()[: len(SHM)] == SHM
            self.left.add("held")
        return {"restore": 1.0}

    def is_held(self) -> bool:
        return "held" in self.left

    def complete(self) -> Mapping[str, float]:
        with self._call("destination.complete"):
            if not self.left & {"held", "complete"}:
                raise ExecutionError("there is no restored copy")
            self.left.discard("held")
            self.left.add("complete")
        return {"resume": 1.0}

    def run(self) -> Mapping[str, float]:
        with self._call("destination.run"):
            if self.lost:
                return {}
            if "held" in self.left:
                self.complete()
            assert not self._live or "complete" in self.left or self._world.destination_runs
            self.left.discard("complete")
            self._world.destination_runs = self._live
            self._world.check()
        return {"thaw": 1.0}

    def missing_bytes(self) -> int:
        return 0 if self.lost else missing.left_bytes(self.memory)

    def lose(self, why: str) -> None:
        """Killed: nothing waits for what is missing any more."""
        with self._call("destination.lose"):
            self.lost = True
            self._world.destination_runs = False

    def settle(self) -> bool:
        if self.missing_bytes():
            return False
        with self._call("destination.settle"):
            self.owned = True
            self.left.clear()
        return True

    def give_up(self) -> None:
        with self._call("destination.give up"):
            assert not self._world.destination_runs, "a container that runs was given up"
            self.left -= {"held", "complete", "tap"}

    def discard(self) -> None:
        with self._call("destination.discard"):
            assert not self._world.destination_runs, "a container that runs was discarded"
            self.left.clear()
            self.shared.close()

    def reboot(self) -> None:
        """Processes and mounts are gone; files are there."""
        self.left -= {"held", "complete", "runc", "tap", "mount"}
        self.shared.close()
        self.lost = True


class FakeArrivalHost:
    """A destination (`migrator.ports.ArrivalHost`)."""

    def __init__(self, folder: Path, world: World, calls: Calls) -> None:
        folder.mkdir()
        self._folder = folder
        self._world = world
        self._call = calls
        self._numbers = itertools.count()
        self._states: dict[str, container_pb2.ContainerState] = {}
        self.reservations: dict[str, FakeReservation] = {}
        self.features: Sequence[str] = FEATURES

    def examine(self, source: str, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        return peer_pb2.ExamineResponse(host="b", last_epoch=3, features=self.features)

    def check(self, request: peer_pb2.PrepareRequest) -> None:
        with self._call("destination.check"):
            check_migration(request.migration)

    def reserve(self, request: peer_pb2.PrepareRequest) -> FakeReservation:
        made = self._make(self._folder / str(next(self._numbers)), live=request.state == LIVE)
        made.reserve()
        self._states[request.migration] = request.state
        self.reservations[request.migration] = made
        return made

    def reserved(self, migration: str, container: str) -> tuple[FakeReservation, "container_pb2.ContainerState"]:
        nothing = self._make(self._folder / "nothing", live=False)
        state = self._states.get(migration, container_pb2.CONTAINER_STATE_STOPPED)
        return self.reservations.get(migration, nothing), state

    def _make(self, folder: Path, *, live: bool) -> FakeReservation:
        return FakeReservation(folder, self._world, self._call, live)

    def left(self) -> set[str]:
        return set().union(*(made.left for made in self.reservations.values()))

    def close(self) -> None:
        for made in self.reservations.values():
            made.shared.close()


class LoopbackPeer:
    """The destination in the same process (`migrator.ports.Peer`). A fault before is a lost question, one after a lost
    answer; while `reachable` is False nothing gets through. `intercept` is told of each call, and may raise."""

    def __init__(
        self, host: str, arrival_host: FakeArrivalHost, arrivals: Arrivals, calls: Calls, source: str = "a"
    ) -> None:
        self.host = host
        self._source = source
        self.reachable = True
        self.arrivals = arrivals
        self._arrival_host = arrival_host
        self._call = calls
        self.intercept: Callable[[str], None] = lambda _: None
        self.before_decide: Callable[[], None] = lambda: None
        self._check: Callable[[], None] = lambda: None
        self._streams = itertools.count(1)

    def watch(self, check: Callable[[], None]) -> None:
        self._check = check

    @contextmanager
    def _wire(self, name: str) -> Iterator[None]:
        self.intercept(name)
        if not self.reachable:
            raise Unreachable("the link is cut")
        if name != "decide":
            self._check()
        with self._call(f"peer.{name}"):
            yield

    def examine(self, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        with self._wire("examine"):
            return self._arrival_host.examine(self._source, request)

    def queue(self, migration: str, waited_s: float, *, leave: bool = False) -> int:
        with self._wire("queue"):
            request = peer_pb2.QueueRequest(migration=migration, waited_ms=int(waited_s * 1000), leave=leave)
            return self.arrivals.queue(self._source, request)

    def prepare(self, request: peer_pb2.PrepareRequest) -> peer_pb2.PrepareResponse:
        with self._wire("prepare"):
            return self.arrivals.prepare(self._source, request)

    def keep_snapshots(self, migration: str, epoch: int) -> None:
        with self._wire("keep snapshots"):
            self.arrivals.get(self._source, migration, epoch).keep_snapshots()

    def digest_volume(
        self, migration: str, epoch: int, target: str, chunk_bytes: int
    ) -> Iterator[peer_pb2.DigestVolumeResponse]:
        with self._wire("digest"):
            yield from self.arrivals.get(self._source, migration, epoch).digest(target, chunk_bytes)

    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None:
        with self._wire("send"):
            outbound = Outbound(next(self._streams), requests)
            pieces = self._pieces(outbound.attempt())
            first = next(pieces, None)
            if first is not None:
                for answer in self.arrivals.get(self._source, first.migration, first.epoch).send(pieces, first):
                    outbound.answered(answer)
            outbound.check_complete()

    def _pieces(self, requests: Iterator[peer_pb2.SendRequest]) -> Iterator[peer_pb2.SendRequest]:
        for request in requests:
            with self._wire("piece"):
                yield request

    def hold_traffic(self, migration: str, epoch: int, neighbours: Sequence[Neighbour]) -> None:
        with self._wire("hold traffic"):
            self.arrivals.get(self._source, migration, epoch).hold_traffic(neighbours)

    def restore(self, migration: str, epoch: int, digests: Mapping[str, bytes]) -> Sequence[peer_pb2.TimedStep]:
        with self._wire("restore"):
            steps = self.arrivals.get(self._source, migration, epoch).restore(digests)
        return [peer_pb2.TimedStep(name=name, duration_ms=ms) for name, ms in steps.items()]

    def stage(self, migration: str, epoch: int) -> "peer_pb2.ArrivalStage":
        with self._wire("stage"):
            name = self.arrivals.stage(self._source, migration, epoch).upper()
            return peer_pb2.GetArrivalResponse(stage=f"ARRIVAL_STAGE_{name}").stage

    def decide(self, migration: str, epoch: int, decision: "peer_pb2.Decision") -> peer_pb2.DecideResponse:
        with self._wire("decide"):
            self.before_decide()
            request = peer_pb2.DecideRequest(migration=migration, epoch=epoch, decision=decision)
            return self.arrivals.decide(self._source, request)


class FaultyOutgoings:
    """The source's records, whose steps may fail before or after they are durable."""

    def __init__(self, journal: Outgoings, calls: Calls) -> None:
        self._journal = journal
        self._call = calls

    def begin(self, migration: str, container: str, destination: str, above: int) -> Outgoing:
        with self._call("journal a.begin"):
            return self._journal.begin(migration, container, destination, above)

    def get(self, migration: str) -> Outgoing | None:
        return self._journal.get(migration)

    def release(self, migration: str) -> Outgoing:
        with self._call("journal a.release"):
            return self._journal.release(migration)

    def abort(self, migration: str) -> Outgoing:
        with self._call("journal a.abort"):
            return self._journal.abort(migration)

    def hear(self, migration: str, answer: Stage) -> Outgoing:
        with self._call("journal a.hear"):
            return self._journal.hear(migration, answer)

    def heard(self, migration: str, said: str) -> None:
        self._journal.heard(migration, said)

    def finish(self, migration: str) -> None:
        with self._call("journal a.finish"):
            self._journal.finish(migration)


class FaultyIncomings:
    """The destination's records, likewise."""

    def __init__(self, journal: Incomings, calls: Calls) -> None:
        self._journal = journal
        self._call = calls

    def begin(self, migration: str, container: str, source: str, epoch: int) -> Incoming:
        with self._call("journal b.begin"):
            return self._journal.begin(migration, container, source, epoch)

    def get(self, migration: str) -> Incoming | None:
        return self._journal.get(migration)

    def unfinished(self) -> list[Incoming]:
        return self._journal.unfinished()

    def make_ready(self, migration: str) -> Incoming:
        with self._call("journal b.ready"):
            return self._journal.make_ready(migration)

    def own(self, migration: str) -> Incoming:
        with self._call("journal b.own"):
            return self._journal.own(migration)

    def refuse(self, migration: str) -> Incoming:
        with self._call("journal b.refuse"):
            return self._journal.refuse(migration)

    def resolve(self, migration: str, keep: Keep) -> Incoming:
        with self._call("journal b.resolve"):
            return self._journal.resolve(migration, keep)

    def heard(self, migration: str, said: str) -> None:
        self._journal.heard(migration, said)

    def finish(self, migration: str) -> None:
        with self._call("journal b.finish"):
            self._journal.finish(migration)
