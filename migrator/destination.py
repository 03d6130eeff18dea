"""The destination's end of a migration: a state machine that a stranger's messages drive.

    prepared --restore--> ready --decide(released)--> owner --> settled
       |                    |
       +--decide(aborted)---+--> refused --> discarded

A message that does not fit the state is refused and changes nothing. Between `ready` and the source's word this end
neither runs nor deletes what it holds; it asks. `tend` is that asking, and the end of what nobody wants any more.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import structlog

from blockdev import blocks
from blockdev.errors import BlockError
from migrator import faults, verify, wire
from migrator.errors import ExecutionError, MigratorError, PeerError
from migrator.files import write_file
from migrator.handover import HandoverError, Incoming, IncomingJournal, Keep, Stage
from migrator.memory_copy import ADDRESS_END
from migrator.network import Neighbour
from migrator.numbered import Inbound
from migrator.ports import Reservation
from migrator.shm import targets
from migrator.stream import Digests, Receiver
from migrator.v1 import container_pb2, peer_pb2

# A source that is silent for so long is asked what it has decided.
SILENCE_S = 3.0
# Nothing was promised before `ready`: a source that cannot be asked for so long is given up.
GIVE_UP_S = 30.0
# A stream that the source has broken off, or that its silence has ended, is over by then.
STREAM_END_S = 10.0
# Of a container that may have been another's pid before each; each has a file open here.
MAX_PROCESSES = 8192
PID = re.compile(r"[1-9][0-9]{0,9}")

FAILURES = (MigratorError, BlockError, OSError)

log = structlog.get_logger()

AskSource = Callable[[Incoming], "peer_pb2.Decision"]


class Arrival:
    """One container on its way in."""

    def __init__(self, record: Incoming, reservation: Reservation, journal: IncomingJournal, live: bool) -> None:
        self.record = record
        self.heard_at = time.monotonic()
        self._reservation = reservation
        self._journal = journal
        self._live = live
        self._digests = Digests()
        self._receiver = Receiver(self._digests)
        self._inbound = Inbound(self._store)
        self._lock = threading.RLock()
        self._streams = 0
        self._cuts: list[Callable[[], object]] = []
        self._stands_still = False
        self._streams_ended = threading.Condition(self._lock)
        self._volumes: dict[str, tuple[int, int]] = {}
        self._memory: dict[str, int] = {}
        self._stack = ExitStack()

    # -- what the source asks for -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the volumes and start the restore as far as it goes without images. Undone if it fails."""
        with self._lock:
            try:
                # The source may have changed its mind while the reservation was made.
                self._reread()
                self._expect(Stage.PREPARED)
                for index, path in enumerate(self._reservation.volumes):
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                    self._stack.callback(os.close, descriptor)
                    self._volumes[f"volume/{index}"] = descriptor, os.fstat(descriptor).st_size
                faults.point("destination.prepare")
                if self._live:
                    self._reservation.warm_up()
                self.heard_at = time.monotonic()
            except BaseException:
                self._refuse("it could not be prepared")
                raise

    def send(
        self, requests: Iterator[peer_pb2.SendRequest], first: peer_pb2.SendRequest
    ) -> Iterator[peer_pb2.SendResponse]:
        """Store one stream; several may run side by side, each with targets of its own."""
        with self._lock:
            self._expect(Stage.PREPARED)
            self._streams += 1
        try:
            yield from self._inbound.receive(first, requests)
            faults.point("destination.send")
            if not self._stands_still:
                self._sync()
        finally:
            with self._lock:
                self._streams -= 1
                self._streams_ended.notify_all()

    @contextmanager
    def cutting(self, cut: Callable[[], object]) -> Iterator[None]:
        """A stream for the length of the block, which `cut` ends when the migration is over before it."""
        with self._lock:
            self._cuts.append(cut)
        try:
            yield
        finally:
            with self._lock:
                self._cuts.remove(cut)

    def digest(self, target: str, chunk_bytes: int) -> Iterator[peer_pb2.DigestVolumeResponse]:
        """See `migrator.verify`. Raises PeerError."""
        with self._lock:
            self._expect(Stage.PREPARED)
            if target not in self._volumes or chunk_bytes <= 0 or chunk_bytes % verify.BLOCK_BYTES:
                raise PeerError(f"digests of {wire.shown(target)} in chunks of {chunk_bytes}", reason="OUT_OF_ORDER")
            descriptor, size = self._volumes[target]
            self._streams += 1
        try:
            for answer in verify.answers(verify.digests(descriptor, descriptor, size, chunk_bytes)):
                self._expect(Stage.PREPARED)
                yield answer
        finally:
            with self._lock:
                self._streams -= 1
                self._streams_ended.notify_all()

    def keep_snapshots(self) -> None:
        """Every piece of the snapshots has been sent."""
        with self._lock:
            self._expect(Stage.PREPARED)
            if self._streams:
                raise PeerError("snapshots are complete while streams are open", reason="OUT_OF_ORDER")
            self._reservation.keep_snapshots()
            faults.point("destination.snapshots")

    def hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        """Take the container's frames from the network and keep them."""
        with self._lock:
            self._expect(Stage.PREPARED)
            self._reservation.hold_traffic(neighbours)
            self._stands_still = True
            faults.point("destination.hold")

    def restore(self, digests: Mapping[str, bytes]) -> dict[str, float]:
        """Complete, synced, restored and not run: `ready` is durable on return. Milliseconds by step."""
        steps: dict[str, float] = {}
        with self._lock:
            self.heard_at = time.monotonic()
            if self.record.stage is Stage.READY:
                return steps
            self._expect(Stage.PREPARED)
            if self._streams:
                raise PeerError("restore while streams are open", reason="OUT_OF_ORDER")
            ours = self._digests.all()
            if ours != dict(digests):
                wrong = sorted(t for t in {*ours, *digests} if ours.get(t) != digests.get(t))
                names = ", ".join(wire.shown(target) for target in wrong[:5])
                raise PeerError(f"what arrived is not what was sent: {names}", reason="DIGEST")
            with ThreadPoolExecutor(1) as beside:
                synced = beside.submit(self._sync)
                if self._live:
                    began = time.monotonic()
                    self._reservation.mount()
                    faults.point("destination.mount")
                    steps["mount"] = (time.monotonic() - began) * 1000
                    steps.update(self._reservation.restore())
                synced.result()
            self._close_volumes()
            faults.point("destination.restore")
            if self._live and not self._reservation.is_held():
                raise ExecutionError(f"the restored copy of {self.record.container} has ended before it could run")
            self.record = self._journal.make_ready(self.record.migration)
            faults.point("destination.ready")
        return steps

    def decide(self, decision: "peer_pb2.Decision") -> peer_pb2.DecideResponse:
        """The source's word. Answers with what is durable here; repeatable."""
        arrived = time.monotonic()
        with self._lock:
            self._reread()
            self.heard_at = arrived
            if decision == peer_pb2.DECISION_ABORTED:
                self._refuse("the source has aborted")
            elif decision == peer_pb2.DECISION_RELEASED:
                self._take(arrived, answer := peer_pb2.DecideResponse())
                if answer.ownership:
                    return answer
            else:
                raise PeerError(f"decision {decision} is none", reason="OUT_OF_ORDER")
        return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_REFUSED)

    # -- what it does by itself -------------------------------------------------------------------------------------

    def tend(self, ask: AskSource) -> None:
        """To be called every second or so: asks a silent source, drops what is not wanted, and repeats what failed."""
        if not self._lock.acquire(blocking=False):
            return  # somebody works on it
        try:
            if self.is_over:
                return
            self._reread()
            if self.record.stage in (Stage.OWNER, Stage.REFUSED):
                self._go_on()
                return
        finally:
            self._lock.release()
        if self._silence_s() > SILENCE_S:
            self._ask(ask)

    def resolve(self, keep: Keep) -> None:
        """An operator's word for that of a source that is gone for good. What fails then is tried again by `tend`."""
        with self._lock:
            self.record = self._journal.resolve(self.record.migration, keep)
            log.warning("resolved by an operator", migration=self.record.migration, keep=keep)
            try:
                self._go_on()
            except FAILURES as error:
                log.error("after the resolution", migration=self.record.migration, reason=str(error))

    def _ask(self, ask: AskSource) -> None:
        try:
            decision = ask(self.record)
        except MigratorError as error:
            log.warning("the source does not answer", migration=self.record.migration, reason=str(error))
            with self._lock:
                if self._silence_s() > GIVE_UP_S and self.record.stage is Stage.PREPARED:
                    self._refuse("the source is gone")
            return
        if decision == peer_pb2.DECISION_UNSPECIFIED:
            self.heard_at = time.monotonic()
            self._journal.heard(self.record.migration, "it has not decided yet")
        else:
            self.decide(decision)

    def _silence_s(self) -> float:
        return time.monotonic() - self.heard_at

    def recover(self) -> None:
        """After a restart of the agent: go on from the record, or give up what cannot go on."""
        with self._lock:
            stage = self.record.stage
            if stage in (Stage.OWNER, Stage.REFUSED):
                self._go_on()
            elif stage is Stage.PREPARED:
                self._refuse("the agent was restarted")
            # `ready` stays, also where the restored tasks are lost: the disk may be the last one. The source is asked.

    def _go_on(self) -> None:
        """What the record says is decided, and may have been done in part."""
        if self.record.stage is Stage.OWNER:
            self._reservation.run()
            self._settle()
        else:
            self._discard()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.record.finished

    # -- details ----------------------------------------------------------------------------------------------------

    def _sync(self) -> None:
        """While the container runs at the end of each stream, so that little is left; then beside the restore."""
        faults.point("destination.sync")
        for descriptor, _ in self._volumes.values():
            os.fdatasync(descriptor)

    def _take(self, arrived: float, answer: peer_pb2.DecideResponse) -> None:
        """Become the owner if that is possible, and fill in the answer; an empty answer means refused."""
        if self.record.stage is Stage.OWNER:
            answer.ownership = peer_pb2.OWNERSHIP_OWNER
            return
        if self.record.stage is not Stage.READY or (self._live and not self._reservation.is_held()):
            self._refuse("there is no restored copy")
            return
        faults.point("destination.released")
        self.record = self._journal.own(self.record.migration)
        faults.point("destination.owner")
        answer.ownership = peer_pb2.OWNERSHIP_OWNER
        try:
            for name, milliseconds in self._reservation.run().items():
                answer.steps.add(name=name, duration_ms=milliseconds)
            faults.point("destination.run")
            answer.resume_ms = (time.monotonic() - arrived) * 1000
            self._settle()
        except FAILURES as error:
            # Committed: the source must not run its copy again, whatever went wrong here.
            log.error("after the handover", migration=self.record.migration, reason=str(error))
        answer.total_ms = (time.monotonic() - arrived) * 1000

    def _settle(self) -> None:
        faults.point("destination.settle")
        if self._reservation.settle():
            self._finish()

    def _refuse(self, why: str) -> None:
        if self.record.stage is Stage.REFUSED and self.is_over:
            return  # said once more, late: by now the name may be that of another arrival
        if self.record.stage is not Stage.REFUSED:
            self.record = self._journal.refuse(self.record.migration)
            log.info("arrival refused", migration=self.record.migration, container=self.record.container, reason=why)
        try:
            self._discard()
        except FAILURES as error:
            # It is refused all the same, and the source may know; `tend` tries again.
            log.error("discarding an arrival", migration=self.record.migration, reason=str(error))

    def _discard(self) -> None:
        for cut in self._cuts:
            cut()
        # A descriptor that is closed under a stream may be another file's by its next write.
        if not self._streams_ended.wait_for(lambda: not self._streams, timeout=STREAM_END_S):
            raise ExecutionError(f"the source of migration {self.record.migration} still sends; it is dropped later")
        self._close_volumes()
        self._reservation.discard()
        self._finish()

    def _finish(self) -> None:
        self._journal.finish(self.record.migration)
        self._reread()

    def _reread(self) -> None:
        """A step may be durable although it failed: the disk's word counts."""
        self.record = self._journal.get(self.record.migration) or self.record

    def _close_volumes(self) -> None:
        self._volumes.clear()
        self._memory.clear()
        self._stack.close()

    def _expect(self, stage: Stage) -> None:
        self.heard_at = time.monotonic()
        if self.record.stage is not stage:
            raise HandoverError(f"migration {self.record.migration} is {self.record.stage} here, not {stage}")

    def _store(self, request: peer_pb2.SendRequest) -> None:
        if request.migration != self.record.migration or request.epoch != self.record.epoch:
            raise PeerError("a piece of another migration in this stream", reason="OUT_OF_ORDER")
        self._expect(Stage.PREPARED)
        faults.point("destination.piece")
        if len(request.target) > wire.LONGEST_TARGET:
            raise PeerError(f"a target whose name has {len(request.target)} characters", reason="OUT_OF_ORDER")
        kind, _, name = request.target.partition("/")
        if kind == "volume" and request.target in self._volumes:
            descriptor, size = self._volumes[request.target]
            wire.check_room(descriptor, len(request.data))
            blocks.write(descriptor, self._receiver.piece(request), size)
        elif kind == "snapshot":
            self._reservation.write_snapshot(name, self._receiver.piece(request))
        elif kind == "memory" and self._live and PID.fullmatch(name):
            for piece in self._receiver.pieces(request):
                blocks.write(self._memory_file(name), piece, ADDRESS_END)
        elif kind == targets.KIND and self._live:
            for piece in self._receiver.pieces(request):
                self._reservation.shared.write(name, piece)
        elif request.target == "images" and self._live:
            for name, content in self._receiver.files(request):
                write_file(self._reservation.images, name, blocks.Piece(0, len(content), content))
        elif kind == "image" and self._live:
            write_file(self._reservation.images, name, self._receiver.piece(request))
        elif request.target == "log":
            log_file = self._reservation.log
            write_file(log_file.parent, log_file.name, self._receiver.piece(request))
        else:
            raise PeerError(f"{wire.shown(request.target)} is nothing that is expected here", reason="OUT_OF_ORDER")

    def _memory_file(self, pid: str) -> int:
        with self._lock:
            if pid not in self._memory:
                if len(self._memory) >= MAX_PROCESSES:
                    raise PeerError(f"memory of more than {MAX_PROCESSES} processes")
                path = self._reservation.memory / f"mem-{int(pid)}"
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._stack.callback(os.close, descriptor)
                self._memory[pid] = descriptor
            return self._memory[pid]


def is_live(state: "container_pb2.ContainerState") -> bool:
    """Whether a container in this state has processes to move."""
    return state in (container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_PAUSED)
