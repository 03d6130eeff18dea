"""The destination's end of a migration: a state machine that a stranger's messages drive.

    prepared --restore--> ready --decide(released)--> owner --> settled
       |                    |
       +--decide(aborted)---+--> refused --> discarded

A message that does not fit the state is refused and changes nothing. Between `ready` and the source's word this end
neither runs nor deletes what it holds; it asks. `tend` is that asking, and the end of what nobody wants any more.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import structlog

from blockdev.errors import BlockError
from migrator import faults, priority, verify, wire
from migrator.errors import ExecutionError, MigratorError, PeerError
from migrator.handover import HandoverError, Incoming, IncomingJournal, Keep, Stage
from migrator.network import Neighbour
from migrator.numbered import Inbound
from migrator.ports import Reservation
from migrator.postcopy import Lend, Puller
from migrator.store import Store
from migrator.v1 import container_pb2, peer_pb2

# A source that is silent for so long is asked what it has decided.
SILENCE_S = 3.0
# Nothing was promised before `ready`: a source that cannot be asked for so long is given up.
GIVE_UP_S = 30.0
# As often it was asked in vain: a host that has stood still itself, as virtual ones do, takes that for silence.
GIVE_UP_ASKS = 3
# A stream that the source has broken off, or that its silence has ended, is over by then.
STREAM_END_S = 10.0

FAILURES = (MigratorError, BlockError, OSError)

log = structlog.get_logger()

AskSource = Callable[[Incoming], "peer_pb2.Decision"]


class Arrival:
    """One container on its way in."""

    def __init__(
        self, record: Incoming, reservation: Reservation, journal: IncomingJournal, live: bool, lend: Lend
    ) -> None:
        """`lend` opens a stream of memory that was left at the source: see `migrator.postcopy`."""
        self.record = record
        self._lend = lend
        self._puller: Puller | None = None
        self._is_lost = False
        self.heard_at = time.monotonic()
        self.unanswered = 0
        self._reservation = reservation
        self._journal = journal
        self._live = live
        self._store = Store(reservation, live=live)
        self._inbound = Inbound(self._take_piece)
        self._lock = threading.RLock()
        # The connection that each stream comes by, and how many volumes are read for digests.
        self._sending: dict[int, object] = {}
        self._reading = 0
        self._cuts: list[Callable[[], object]] = []
        self._stands_still = False
        self._streams_ended = threading.Condition(self._lock)

    # -- what the source asks for -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the volumes and start the restore as far as it goes without images. Undone if it fails."""
        with self._lock:
            try:
                # The source may have changed its mind while the reservation was made.
                self._reread()
                self._expect(Stage.PREPARED)
                self._store.open()
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
        """Store one stream; several may run side by side, each with targets of its own.

        One that goes on with another connection is stored from that alone: who reads the old one, and has perhaps not
        noticed its end, does nothing any more.
        """
        connection = object()
        with self._lock:
            self._expect(Stage.PREPARED)
            self._sending[first.stream] = connection
        try:
            yield from self._inbound.receive(first, requests)
            faults.point("destination.send")
            if not self._stands_still and self._sending.get(first.stream) is connection:
                # So that little is left for the restore, beside which it is done once more.
                self._store.sync()
        finally:
            with self._lock:
                if self._sending.get(first.stream) is connection:
                    del self._sending[first.stream]
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
            volume = self._store.volume(target)
            if volume is None or chunk_bytes <= 0 or chunk_bytes % verify.BLOCK_BYTES:
                raise PeerError(f"digests of {wire.shown(target)} in chunks of {chunk_bytes}", reason="OUT_OF_ORDER")
            descriptor, size = volume
            self._reading += 1
        try:
            yield from verify.answers(self._still_wanted(verify.digests(descriptor, descriptor, size, chunk_bytes)))
        finally:
            with self._lock:
                self._reading -= 1
                self._streams_ended.notify_all()

    def _still_wanted(self, found: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """A volume of any size may be read between two answers."""
        for each in found:
            self._expect(Stage.PREPARED)
            yield each

    def keep_snapshots(self) -> None:
        """Every piece of the snapshots has been sent."""
        with self._lock:
            self._expect(Stage.PREPARED)
            if self._streams_are_open():
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
            if self._streams_are_open():
                raise PeerError("restore while streams are open", reason="OUT_OF_ORDER")
            ours = self._store.digests.all()
            if ours != dict(digests):
                wrong = sorted(t for t in {*ours, *digests} if ours.get(t) != digests.get(t))
                names = ", ".join(wire.shown(target) for target in wrong[:5])
                raise PeerError(f"what arrived is not what was sent: {names}", reason="DIGEST")
            with ThreadPoolExecutor(2) as beside:
                synced = beside.submit(self._store.sync)
                if self._live:
                    began = time.monotonic()
                    mounted = beside.submit(self._reservation.mount)
                    self._reservation.amend_images()
                    steps["images"] = (time.monotonic() - began) * 1000
                    mounted.result()
                    faults.point("destination.mount")
                    steps["mount"] = (time.monotonic() - began) * 1000 - steps["images"]
                    # A task may wait for a page before it runs, as for the one that the kernel keeps its rseq in.
                    self._pull()
                    steps.update(self._reservation.restore())
                synced.result()
            self._store.close()
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
                return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_REFUSED)
            if decision == peer_pb2.DECISION_RELEASED:
                return self._take(arrived)
            raise PeerError(f"decision {decision} is none", reason="OUT_OF_ORDER")

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
            if self.record.stage is Stage.READY:
                self._pull()
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
                self.unanswered += 1
                is_gone = self._silence_s() > GIVE_UP_S and self.unanswered >= GIVE_UP_ASKS
                if is_gone and self.record.stage is Stage.PREPARED:
                    self._refuse("the source is gone")
            return
        self.unanswered = 0
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
            self._pull()
            self._hasten()
            self._reservation.run()
            self._settle()
        else:
            self._discard()

    @property
    def missing_bytes(self) -> int:
        """Post-copy: of its memory, as far as it has come, what only the source has."""
        return self._reservation.missing_bytes()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.record.finished

    # -- details ----------------------------------------------------------------------------------------------------

    def _take(self, arrived: float) -> peer_pb2.DecideResponse:
        """Become the owner if that is possible."""
        if self.record.stage is Stage.OWNER:
            self._hasten()
            return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_OWNER, missing_bytes=self.missing_bytes)
        faults.point("destination.released")
        if self.record.stage is not Stage.READY:
            self._refuse(why := "it holds no restored copy")
            return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_REFUSED, refusal=why)
        try:
            self._pull()
            steps = dict(self._reservation.complete()) if self._live else {}
        except FAILURES as error:
            # Nothing was committed: the source's copy is still as it was, and does not wait until `tend` has discarded
            # this one.
            self._note_refusal(str(error))
            self._reservation.give_up()
            return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_REFUSED, refusal=str(error))
        faults.point("destination.complete")
        self.record = self._journal.own(self.record.migration)
        faults.point("destination.owner")
        answer = peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_OWNER)
        # Whatever fails now: the source keeps what is pulled.
        answer.missing_bytes = 0 if self._puller is None else 1
        try:
            try:
                steps.update(self._reservation.run())
            finally:
                self._hasten()
            for name, milliseconds in steps.items():
                answer.steps.add(name=name, duration_ms=milliseconds)
            faults.point("destination.run")
            answer.resume_ms = (time.monotonic() - arrived) * 1000
            answer.missing_bytes = self.missing_bytes
            self._settle()
        except FAILURES as error:
            # Committed: the source must not run its copy again, whatever went wrong here.
            log.error("after the handover", migration=self.record.migration, reason=str(error))
        answer.total_ms = (time.monotonic() - arrived) * 1000
        return answer

    def _pull(self) -> None:
        """Post-copy: have what is missing come, until nothing is."""
        is_working = self._puller is not None and self._puller.is_working
        if not self._is_lost and not is_working and self.missing_bytes:
            self._puller = Puller(self.record, self._reservation.memory, self._lend, self._lose)

    def _hasten(self) -> None:
        if self._puller is not None:
            self._puller.hasten()

    def _end_pull(self) -> None:
        if self._puller is not None:
            self._puller.close()
            self._puller = None

    def _lose(self, why: str) -> None:
        """A part of its memory is nowhere any more. Before it is this end's, the source decides."""
        if self.record.stage is Stage.OWNER:
            log.error("memory is lost", migration=self.record.migration, container=self.record.container, reason=why)
            self._is_lost = True
            self._reservation.lose(why)

    def _settle(self) -> None:
        faults.point("destination.settle")
        if self._puller is not None and not self.missing_bytes:
            self._end_pull()
        if self._reservation.settle():
            self._finish()

    def _note_refusal(self, why: str) -> None:
        if self.record.stage is not Stage.REFUSED:
            self.record = self._journal.refuse(self.record.migration)
            log.info("arrival refused", migration=self.record.migration, container=self.record.container, reason=why)

    def _refuse(self, why: str) -> None:
        if self.record.stage is Stage.REFUSED and self.is_over:
            return  # said once more, late: by now the name may be that of another arrival
        self._note_refusal(why)
        try:
            self._discard()
        except FAILURES as error:
            # It is refused all the same, and the source may know; `tend` tries again.
            log.error("discarding an arrival", migration=self.record.migration, reason=str(error))

    def _discard(self) -> None:
        for cut in self._cuts:
            cut()
        # A descriptor that is closed under a stream may be another file's by its next write.
        if not self._streams_ended.wait_for(lambda: not self._streams_are_open(), timeout=STREAM_END_S):
            raise ExecutionError(f"the source of migration {self.record.migration} still sends; it is dropped later")
        self._store.close()
        self._end_pull()
        self._reservation.discard()
        self._finish()

    def _finish(self) -> None:
        self._journal.finish(self.record.migration)
        self._reread()

    def _reread(self) -> None:
        """A step may be durable although it failed: the disk's word counts."""
        self.record = self._journal.get(self.record.migration) or self.record

    def _streams_are_open(self) -> bool:
        return bool(self._sending or self._reading)

    def _expect(self, stage: Stage) -> None:
        self.heard_at = time.monotonic()
        self.unanswered = 0
        if self.record.stage is not stage:
            raise HandoverError(f"migration {self.record.migration} is {self.record.stage} here, not {stage}")

    def _take_piece(self, request: peer_pb2.SendRequest) -> None:
        if request.migration != self.record.migration or request.epoch != self.record.epoch:
            raise PeerError("a piece of another migration in this stream", reason="OUT_OF_ORDER")
        self._expect(Stage.PREPARED)
        faults.point("destination.piece")
        with nullcontext() if self._stands_still else priority.behind_containers():
            self._store.write(request)


def is_live(state: "container_pb2.ContainerState") -> bool:
    """Whether a container in this state has processes to move."""
    return state in (container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_PAUSED)
