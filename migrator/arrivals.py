"""All containers on their way to this host, each an `Arrival` (`migrator.destination`), and those that are over."""

import threading
import time
from collections import Counter

import structlog

from migrator import wire
from migrator.destination import FAILURES, GIVE_UP_S, Arrival, AskSource, is_live
from migrator.errors import Busy, NotFound
from migrator.handover import HandoverError, Incoming, IncomingJournal, Keep, Stage
from migrator.line import Line
from migrator.ports import ArrivalHost
from migrator.postcopy import Lend
from migrator.v1 import peer_pb2

# What the configuration says if it says nothing.
PLACES = 8

log = structlog.get_logger()


class Arrivals:
    """All containers on their way to this host; a source may touch only those that it sends."""

    def __init__(self, host: ArrivalHost, journal: IncomingJournal, lend: Lend, places: int = PLACES) -> None:
        """No more than `places` of them at once; the others wait in line at their sources, of which `lend` reads."""
        self._host = host
        self._lend = lend
        self._journal = journal
        self._arrivals: dict[str, Arrival] = {}
        # Migration to container, until there is an arrival.
        self._preparing: dict[str, str] = {}
        self._places = places
        self._line = Line(places)
        self._lock = threading.Lock()

    def queue(self, source: str, request: peer_pb2.QueueRequest) -> int:
        """A place in line, or 0: see `Line.ask`. Raises InvalidArgument, Busy."""
        wire.check_migration(request.migration)
        with self._lock:
            if not request.leave:
                return self._line.ask(source, request.migration, request.waited_ms / 1000, self._taken())
            self._line.leave(source, request.migration)
            return 0

    def prepare(self, source: str, request: peer_pb2.PrepareRequest) -> peer_pb2.PrepareResponse:
        """Reserve everything; nothing is left if that fails."""
        self._host.check(request)
        with self._lock:
            if request.migration in (*self._arrivals, *self._preparing):
                raise HandoverError(f"migration {request.migration} is under way here already")
            others = [arrival.record.container for arrival in self._arrivals.values() if not arrival.is_over]
            if request.container in (*others, *self._preparing.values()):
                raise Busy(f"another migration brings {request.container} to this host: try again when that is done")
            if not self._line.has_place(source, request.migration, self._taken()):
                raise Busy(
                    f"as many containers as may are on their way to this host: {request.container} has to wait",
                    reason="HOST_FULL",
                )
            self._line.leave(source, request.migration)
            self._preparing[request.migration] = request.container
        try:
            record = self._journal.begin(request.migration, request.container, source, request.epoch)
            try:
                reservation = self._host.reserve(request)
            except BaseException:
                self._journal.refuse(record.migration)
                self._journal.finish(record.migration)
                raise
            arrival = Arrival(record, reservation, self._journal, is_live(request.state), self._lend)
            with self._lock:
                self._arrivals[record.migration] = arrival
        finally:
            with self._lock:
                del self._preparing[request.migration]
        arrival.prepare()
        return peer_pb2.PrepareResponse(has_base=reservation.has_base)

    def get(self, source: str, migration: str, epoch: int) -> Arrival:
        """The arrival that a message is about. Raises NotFound also for one that is another source's."""
        with self._lock:
            arrival = self._arrivals.get(migration)
        if arrival is None or arrival.record.source != source or arrival.record.epoch != epoch:
            raise _unknown(source, migration, epoch)
        return arrival

    def decide(self, source: str, request: peer_pb2.DecideRequest) -> peer_pb2.DecideResponse:
        """As `Arrival.decide`, also about one that is over: then the record answers."""
        try:
            return self.get(source, request.migration, request.epoch).decide(request.decision)
        except NotFound:
            record = self._record(source, request.migration, request.epoch)
            if record.stage in (Stage.PREPARED, Stage.READY):
                # Still being reserved, or not recovered yet: it does not go on.
                record = self._journal.refuse(record.migration)
            owner = record.stage is Stage.OWNER
            if owner and not record.finished:
                # Whether it needs the source any more is known when it is recovered.
                raise Busy(f"the arrival of {record.container} is still being recovered") from None
            if owner and request.decision == peer_pb2.DECISION_ABORTED:
                raise HandoverError(f"migration {request.migration} is committed here") from None
            return peer_pb2.DecideResponse(ownership=peer_pb2.OWNERSHIP_OWNER if owner else peer_pb2.OWNERSHIP_REFUSED)

    def stage(self, source: str, migration: str, epoch: int) -> Stage:
        """How far it is, by its record; but ready is only what is complete, for a source that may have lost the rest.
        Raises NotFound also for one that is another source's."""
        record = self._record(source, migration, epoch)
        with self._lock:
            arrival = self._arrivals.get(migration)
        if record.stage is Stage.READY and arrival is not None and arrival.missing_bytes:
            return Stage.PREPARED
        return record.stage

    def resolve(self, migration: str, keep: Keep) -> None:
        """An operator's word for that of the source. Raises HandoverError if none is waited for."""
        with self._lock:
            arrival = self._arrivals.get(migration)
        if arrival is not None:
            arrival.resolve(keep)
        else:
            self._journal.resolve(migration, keep)  # it is recovered, and carried out, by `tend`

    def recover(self) -> None:
        """Carry on what a former life of the agent had begun; what fails is tried again by `tend`."""
        for record in self._journal.unfinished():
            with self._lock:
                if record.migration in self._arrivals or record.migration in self._preparing:
                    continue
            try:
                reservation, state = self._host.reserved(record.migration, record.container)
                arrival = Arrival(record, reservation, self._journal, is_live(state), self._lend)
                with self._lock:
                    self._arrivals[record.migration] = arrival
                arrival.recover()
            except FAILURES as error:
                log.error("recovering an arrival", migration=record.migration, stage=record.stage, reason=str(error))

    def tend(self, ask: AskSource) -> None:
        """Look after all of them; to be called every second or so."""
        self.recover()
        with self._lock:
            arrivals = list(self._arrivals.values())
        for arrival in arrivals:
            try:
                arrival.tend(ask)
            except FAILURES as error:
                log.error("tending an arrival", migration=arrival.record.migration, reason=str(error))
            if arrival.is_over:
                with self._lock:
                    self._arrivals.pop(arrival.record.migration, None)

    def missing_of(self, container: str) -> tuple[str, int]:
        """The source that has memory of a container which is not here yet, and how many bytes; "" and 0 if none has."""
        with self._lock:
            arrivals = list(self._arrivals.values())
        for arrival in arrivals:
            record = arrival.record
            runs_here = record.container == container and record.may_run
            if runs_here and (missing_bytes := arrival.missing_bytes):
                return record.source, missing_bytes
        return "", 0

    def count(self) -> int:
        """How many are on their way."""
        with self._lock:
            return sum(not arrival.is_over for arrival in self._arrivals.values())

    def _taken(self) -> int:
        """Places in use. One that only waits for the word of a source that is gone is no load, and maybe for long: but
        of no source more than there are places, which have their memory here."""
        now, arrivals = time.monotonic(), self._arrivals.values()
        gone = Counter(
            a.record.source for a in arrivals if a.record.stage is Stage.READY and now - a.heard_at > GIVE_UP_S
        )
        under_way = sum(not arrival.is_over for arrival in arrivals) - sum(min(n, self._places) for n in gone.values())
        return under_way + len(self._preparing.keys() - self._arrivals.keys())

    def _record(self, source: str, migration: str, epoch: int) -> Incoming:
        record = self._journal.get(migration)
        if record is None or (record.source, record.epoch) != (source, epoch):
            raise _unknown(source, migration, epoch)
        return record


def _unknown(source: str, migration: str, epoch: int) -> NotFound:
    return NotFound(f"no migration {migration} with epoch {epoch} from {source} here", reason="MIGRATION_NOT_FOUND")
