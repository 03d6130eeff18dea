"""The source's end of a migration: a column of phases, and one stack that undoes them until the handover.

What may go wrong at each line, and what happens then:
- before `release` is durable: `abort` is written first, then everything is undone; the container runs here again
- after it: the copy here stays frozen until the destination has said owner or refused, however long that takes
- if this process dies, the guard does the first, and the restarted agent either (see `migrator.recovery`)
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import structlog

from blockdev import extents
from blockdev.errors import BlockError
from migrator import answers, disk, faults, line, memory_copy, postcopy, recovery, snapshots, verify
from migrator.convergence import OnNoConverge
from migrator.destination import FAILURES, is_live
from migrator.disk import DiskCopy
from migrator.errors import ExecutionError, MigratorError, Precondition
from migrator.handover import Decision, HandoverError, Outgoing, OutgoingJournal, Stage
from migrator.memory_copy import MemoryCopy
from migrator.network import Neighbour
from migrator.options import Options
from migrator.outbox import Outbox
from migrator.outcome import as_migrator_error, verdict
from migrator.ports import Checkpoint, LeavingContainer, Peer
from migrator.progress import Progress
from migrator.rounds import Rounds
from migrator.snapshots import SnapshotCopy
from migrator.stream import Sender
from migrator.v1 import migration_pb2, peer_pb2

FEATURES = ("send-v1", snapshots.FEATURE, line.FEATURE, disk.FEATURE, postcopy.FEATURE, memory_copy.FEATURE)
SETTLE_POLL_S = 0.05

log = structlog.get_logger()


@dataclass(frozen=True)
class Here:
    """Facts of this host that the destination compares with its own."""

    host: str
    kernel: str
    cpu_flags: Sequence[str]
    criu_version: str


@dataclass(frozen=True)
class _Prepared:
    """`has_base`: the destination has the first volume's image. `memory` is None where CRIU dumps it."""

    has_base: bool
    memory: MemoryCopy | None
    checkpoint: Checkpoint | None


class Departure:
    """One migration away from this host. `run` does all of it and leaves the outcome with the progress."""

    def __init__(
        self,
        name: str,
        here: Here,
        container: LeavingContainer,
        peer: Peer,
        journal: OutgoingJournal,
        progress: Progress,
        options: Options,
    ) -> None:
        self._name = name
        self._here = here
        self._container = container
        self._peer = peer
        self._journal = journal
        self._progress = progress
        self._options = options
        self._live = is_live(container.state)
        self._snapshots = SnapshotCopy(container.snapshots)
        self._features: Sequence[str] = ()
        self._planned_bytes = 0
        self._epoch = 0
        self._frozen_at = 0.0
        self._failed_at = 0.0
        self._touched = False
        self._failure: MigratorError | BlockError | OSError | None = None
        peer.watch(progress.check)

    def run(self) -> bool:
        """All phases. Failures are the progress's outcome; what is raised from here is a bug.

        False if there is no place at the destination yet: then nothing has been done but to get in line there.
        """
        phase, end = self._progress.phase, self._progress.end
        try:
            with phase("preflight"):
                answer = self._preflight()
                has_place = self._options.check_only or self._has_place(answer)
        except FAILURES as error:
            end(migration_pb2.OUTCOME_REFUSED, self._here.host, as_migrator_error(error))
            return True
        if self._options.check_only:
            end(migration_pb2.OUTCOME_CHECKED, self._here.host)
            return True
        if not has_place:
            return False
        try:
            self._move(answer.last_epoch)
        except FAILURES as error:
            # What failed first counts, not what the way back has met.
            self._end(as_migrator_error(self._failure or error))
        except Exception as error:
            self._end(ExecutionError(f"unexpected {type(error).__name__}: {error}"))
            raise
        else:
            with phase("finish"):
                self._finish()
            self._end(None)
        return True

    def _move(self, known_epoch: int) -> None:
        self._epoch = self._journal.begin(self._name, self._container.name, self._peer.host, known_epoch).epoch
        outbox = Outbox(self._name, self._epoch, self._progress, self._planned_bytes)
        phase = self._progress.phase
        with ExitStack() as undo:
            try:
                with phase("prepare"):
                    prepared = self._prepare(undo)
                with phase("precopy"):
                    rounds = self._precopy(undo, prepared, outbox)
                    rehearsal = undo.enter_context(self._rehearse(prepared.checkpoint))
                    if self._live:
                        with self._progress.step("last rounds"):
                            rounds.hurry()
                with phase("freeze"):
                    sent = self._freeze(undo, prepared.checkpoint, rounds, outbox, rehearsal)
                with phase("final"):
                    self._final(sent, rounds.disk)
                with phase("restore"):
                    self._restore(outbox)
                self._progress.commit()
            except BaseException as error:
                self._failure = error if isinstance(error, FAILURES) else None
                self._failed_at = time.monotonic()
                self._abort()  # durable before anything is thawed
                raise
            with phase("handover"):
                record, answer = self._handover()
            if answer.missing_bytes:
                with phase("pull"):
                    answer = self._lend(record, answer)
            self._hear(record, answer)
            self._kill()
            # The tasks are gone: what follows only takes down what was set up to watch and to hold them.

    # -- the phases -------------------------------------------------------------------------------------------------

    def _preflight(self) -> peer_pb2.ExamineResponse:
        """Questions only."""
        container = self._container
        self._planned_bytes = sum(extents.total(disk.allocated(volume)) for volume in container.volumes)
        self._planned_bytes += self._snapshots.total_bytes
        answer = self._peer.examine(
            peer_pb2.ExamineRequest(
                container=container.name,
                spec=container.spec,
                kernel=self._here.kernel,
                # What has no processes has found none of these.
                cpu_flags=self._here.cpu_flags if self._live else (),
                criu_version=self._here.criu_version,
                memory_bytes=container.memory_bytes,
                disk_bytes=self._planned_bytes,
            )
        )
        objections = [*container.objections(), *answer.objections]
        if self._options.on_no_converge is OnNoConverge.POSTCOPY and postcopy.FEATURE not in answer.features:
            message = f"the agent of {self._peer.host} is too old for --on-no-converge postcopy"
            objections.append(peer_pb2.Objection(reason="POSTCOPY", message=message))
        if container.snapshots and snapshots.FEATURE not in answer.features:
            message = f"the agent of {self._peer.host} is too old to take snapshots: use --without-snapshots"
            objections.append(peer_pb2.Objection(reason="SNAPSHOTS", message=message))
        if objections:
            raise Precondition("; ".join(o.message for o in objections), reason=objections[0].reason)
        self._features = answer.features
        return answer

    def _has_place(self, answer: peer_pb2.ExamineResponse) -> bool:
        """One of an older version takes as many as come."""
        return line.FEATURE not in answer.features or self._peer.queue(self._name, 0.0) == 0

    def _prepare(self, undo: ExitStack) -> _Prepared:
        container = self._container
        undo.callback(self._close)
        while not container.is_settled():
            self._progress.check()
            time.sleep(SETTLE_POLL_S)
        prepared = self._peer.prepare(
            peer_pb2.PrepareRequest(
                migration=self._name,
                epoch=self._epoch,
                container=container.name,
                spec=container.spec,
                state=container.state,
                stdio=container.stdio(),
                features=FEATURES,
                create_time_ms=container.create_time_ms,
                start_time_ms=container.start_time_ms,
                snapshots=self._snapshots.described,
                memory_bytes=container.memory_bytes if self._live else 0,
            )
        )
        faults.point("source.prepare")
        if not self._live:
            return _Prepared(prepared.has_base, None, None)
        undo.enter_context(container.guard(self._name))
        undo.callback(self._resume)
        tracker, why = undo.enter_context(container.track_memory())
        self._progress.note(why)
        memory = None
        if tracker:
            together = memory_copy.FEATURE in self._features
            memory = MemoryCopy(tracker, container.pid_inside, container.pause, together=together)
        if memory is None and self._options.on_no_converge is OnNoConverge.POSTCOPY:
            raise Precondition(f"--on-no-converge postcopy is not possible from here: {why}", reason="POSTCOPY")
        checkpoint = undo.enter_context(container.prepare_checkpoint(with_memory=memory is None))
        return _Prepared(prepared.has_base, memory, checkpoint)

    def _precopy(self, undo: ExitStack, prepared: _Prepared, outbox: Outbox) -> Rounds:
        """The disk, the memory, and the log so far, while the container runs."""
        container, peer = self._container, self._peer
        batched = disk.FEATURE in self._features
        copy = DiskCopy(container, undo, batched=batched, check=self._progress.check)
        if not copy.is_quick:
            self._progress.note("the disk is read whole while the container stands still: see migrator doctor")
        sender = outbox.sender()
        has_bases = [*container.volumes][: 1 if prepared.has_base else 0]
        if container.snapshots:
            self._send_snapshots(sender)
            has_bases = [*container.volumes]
        bases = {}
        for index, volume in enumerate(has_bases):
            target = f"volume/{index}"
            runs = self._digests_there(target, verify.BLOCK_BYTES)
            bases[target] = verify.chunks(runs, volume.size_bytes, verify.BLOCK_BYTES)
        peer.send(copy.first_pass(sender, bases))
        peer.send(outbox.log(sender, container.log))
        rounds = Rounds(container, peer, outbox.sender, copy, prepared.memory, self._progress, self._options)
        rounds.converge(undo)
        faults.point("source.precopy")
        return rounds

    def _send_snapshots(self, sender: Sender) -> None:
        """Afterwards each volume there is what it was when the current one was taken."""
        with self._progress.step("snapshots"):
            self._peer.send(self._snapshots.requests(sender))
            self._peer.keep_snapshots(self._name, self._epoch)
        faults.point("source.snapshots")

    def _rehearse(self, checkpoint: Checkpoint | None) -> ExitStack:
        """Their dump is prepared, and the file systems can be frozen at once until this is closed."""
        rehearsal = ExitStack()
        if checkpoint is not None:
            checkpoint.rehearse()
            rehearsal.enter_context(self._container.volumes_ready())
        return rehearsal

    def _stop_tasks(self) -> None:
        self._frozen_at = time.monotonic()
        self._touched = True
        with self._progress.step("tasks"):
            self._container.freeze()

    def _freeze(
        self, undo: ExitStack, checkpoint: Checkpoint | None, rounds: Rounds, outbox: Outbox, rehearsal: ExitStack
    ) -> "Future[None]":
        """Stop it. Returns what ends when all that is left has been sent: its memory, CRIU's images as they come, and
        its disk."""
        container, step = self._container, self._progress.step
        dumped, frozen = Future[None](), Future[None]()
        beside = undo.enter_context(ThreadPoolExecutor(1))
        if checkpoint is None:
            self._frozen_at = time.monotonic()
            frozen.set_result(None)
            return beside.submit(self._peer.send, self._rest(rounds.disk, outbox, frozen))
        neighbours = container.neighbours()
        rounds.stop(undo, self._stop_tasks)
        held = beside.submit(self._hold_traffic, neighbours)
        # Before all is busy with what is to be sent.
        checkpoint.prepare(rounds.left_out())
        held.result()
        faults.point("source.freeze")
        sent = beside.submit(self._peer.send, chain(rounds.last(dumped), self._rest(rounds.disk, outbox, frozen)))
        try:
            with step("dump"):
                checkpoint.dump(self._progress.check)
            dumped.set_result(None)
            faults.point("source.dump")
            with step("file system"):
                rehearsal.close()
                undo.callback(container.thaw_volumes)
                container.freeze_volumes()
            frozen.set_result(None)
        except BaseException as error:
            for awaited in (dumped, frozen):
                if not awaited.done():
                    awaited.set_exception(error)
            raise
        return sent

    def _hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        with self._progress.step("traffic"):
            self._peer.hold_traffic(self._name, self._epoch, neighbours)
            self._container.disconnect()

    def _rest(self, copy: DiskCopy, outbox: Outbox, frozen: "Future[None]") -> Iterator[peer_pb2.SendRequest]:
        """The disk's last delta, and the log; nothing changes any more."""
        frozen.result()
        copy.collect()
        sender = outbox.sender()
        yield from copy.requests(sender)
        yield from outbox.log(sender, self._container.log)

    def _final(self, sent: "Future[None]", copy: DiskCopy) -> None:
        sent.result()
        if self._options.verify:
            with self._progress.step("verify"):
                verify.compare(copy.sizes, copy.digests(), self._digests_there)
        faults.point("source.final")

    def _digests_there(self, target: str, chunk_bytes: int) -> Iterator[peer_pb2.DigestVolumeResponse]:
        return self._peer.digest_volume(self._name, self._epoch, target, chunk_bytes)

    def _restore(self, outbox: Outbox) -> None:
        self._progress.check()
        self._progress.steps(self._peer.restore(self._name, self._epoch, outbox.digests.all()))
        faults.point("source.ready")

    def _handover(self) -> tuple[Outgoing, peer_pb2.DecideResponse]:
        """From `released` on there is no way back but the destination's word, or an operator's in its place."""
        record = self._release()
        faults.point("source.released")
        answer, round_trip_ms = answers.ask(record, self._here.host, self._peer, self._journal, self._progress)
        self._progress.steps(answer.steps)
        stood_still_ms = (time.monotonic() - self._frozen_at) * 1000 - round_trip_ms
        exchange_ms = max(0.0, round_trip_ms - answer.total_ms) / 2
        if self._live and round_trip_ms and answer.ownership == peer_pb2.OWNERSHIP_OWNER:  # not an operator's word
            self._progress.downtime(stood_still_ms + exchange_ms + answer.resume_ms)
        return record, answer

    def _lend(self, record: Outgoing, answer: peer_pb2.DecideResponse) -> peer_pb2.DecideResponse:
        """Post-copy: it runs there, and the copy here, which stands still, is read (`migrator.postcopy`)."""
        faults.point("source.lend")
        return answers.await_memory(record, self._here.host, self._peer, self._journal, self._progress, answer)

    def _hear(self, record: Outgoing, answer: peer_pb2.DecideResponse) -> None:
        if answer.ownership == peer_pb2.OWNERSHIP_REFUSED:
            by_operator = self._journal.hear(self._name, Stage.REFUSED).by_operator
            self._failed_at = time.monotonic()
            raise recovery.refused(record, self._here.host, answer.refusal, by_operator=by_operator)
        self._journal.hear(self._name, Stage.OWNER)
        faults.point("source.owner")

    def _finish(self) -> None:
        """The container is elsewhere: nothing that fails here changes that, and `migrator.recovery` tries again."""
        try:
            faults.point("source.finish")
            self._container.remove()
            self._journal.finish(self._name)
        except FAILURES as error:
            log.error("finish", migration=self._name, reason=str(error))

    # -- their details ----------------------------------------------------------------------------------------------

    def _abort(self) -> None:
        """If this fails, the container stays as it is: `migrator.recovery` tries again."""
        try:
            self._journal.abort(self._name)
        except MigratorError as error:
            log.error("abort", migration=self._name, reason=str(error))

    def _release(self) -> Outgoing:
        try:
            return self._journal.release(self._name)
        except MigratorError as error:
            self._failure, self._failed_at = error, time.monotonic()
            try:
                self._journal.abort(self._name)
            except HandoverError:
                # `released` is on the disk in spite of the failure: it counts.
                record = self._journal.get(self._name)
                assert record is not None
                self._failure = None
                log.warning("release", migration=self._name, reason=str(error))
                return record
            raise

    def _kill(self) -> None:
        """Of no consequence if it fails: the tasks stay frozen, and `remove` ends them."""
        try:
            self._container.kill()
        except (MigratorError, OSError) as error:
            log.error("killing the moved copy", migration=self._name, reason=str(error))

    def _resume(self) -> None:
        """The one place that thaws: never against the record."""
        record = self._journal.get(self._name)
        if record is None or not record.may_thaw:
            return
        self._container.resume()
        took_ms = (time.monotonic() - self._failed_at) * 1000
        if self._touched:
            self._progress.note(f"rolled back: it went on {took_ms:.0f} ms after that was decided")
        self._touched = False
        log.info("resumed at the source", migration=self._name, ms=round(took_ms, 1))

    def _close(self) -> None:
        """The end of a way back. A destination that does not hear of it asks by itself and cleans up."""
        record = self._journal.get(self._name)
        if record is None or not record.may_thaw or self._touched:
            return
        if record.decision is Decision.ABORTED:
            recovery.tell_aborted(self._peer, record, self._progress)
        self._journal.finish(self._name)

    def _end(self, error: MigratorError | None) -> None:
        self._progress.end(*verdict(self._journal.get(self._name), error, self._container, self._here.host))
