"""A migration at the source whose own end was not reached: a step failed, or the agent was started again.

The record alone says what is to be done. Nothing here depends on what the agent had in its memory, and everything may
be repeated, so the caller tries until it has worked.
"""

import time

import structlog

from migrator import answers
from migrator.destination import is_live
from migrator.errors import Busy, MigratorError, RolledBack, Unreachable
from migrator.handover import Decision, HandoverError, Outgoing, OutgoingJournal, Stage
from migrator.ports import Decider, LeavingContainer
from migrator.progress import Progress
from migrator.v1 import migration_pb2, peer_pb2

# After a reboot the network may not be there yet; then the copy on the disk here is started.
LOST_PATIENCE_S = 60.0
RETRY_S = 0.5

log = structlog.get_logger()


class DestinationRefused(RolledBack):
    """The answer to `released` was `refused`: the container runs at the source again."""

    reason = "DESTINATION_REFUSED"


def carry_on(
    migration: str,
    here: str,
    container: LeavingContainer | None,
    peer: Decider,
    journal: OutgoingJournal,
    progress: Progress,
) -> None:
    """One attempt to end it; `container` is None if it was removed already. Raises whatever failed.

    `here` is this host's name, for messages. An attempt that fails because the destination does not answer leaves the
    outcome uncertain; one that works gives it its final value, unless it had one before.
    """
    record = journal.get(migration)
    if record is None or record.finished:
        return
    is_lost = container is not None and is_live(container.state) and container.has_ended()
    if record.decision is Decision.UNDECIDED:
        record = _decide(record, peer, journal, is_lost=is_lost)
    if record.decision is Decision.RELEASED and record.answer is None:
        record = journal.hear(migration, _answer(record, here, peer, journal, progress))
    if record.may_destroy:
        if container is not None:
            container.kill()
            container.remove()
        progress.end(migration_pb2.OUTCOME_MIGRATED, record.destination)
    else:
        if container is not None:
            container.resume()
        if record.decision is Decision.ABORTED or record.by_operator:
            tell_aborted(peer, record, progress)
        if progress.snapshot().outcome in (migration_pb2.OUTCOME_UNSPECIFIED, migration_pb2.OUTCOME_UNCERTAIN):
            released = record.decision is Decision.RELEASED
            aborted = found_ended(here) if is_lost else restarted(here)
            why = refused(record, here, by_operator=record.by_operator) if released else aborted
            progress.end(migration_pb2.OUTCOME_ROLLED_BACK, here, why)
    journal.finish(migration)


def decision(journal: OutgoingJournal, record: Outgoing, *, is_worked_on: bool) -> peer_pb2.Decision:
    """What a destination that asks is told. What is undecided, and nobody works on it, is aborted first."""
    if record.decision is Decision.UNDECIDED and not is_worked_on:
        record = journal.abort(record.migration)
    return {
        Decision.UNDECIDED: peer_pb2.DECISION_UNSPECIFIED,
        Decision.RELEASED: peer_pb2.DECISION_RELEASED,
        Decision.ABORTED: peer_pb2.DECISION_ABORTED,
    }[record.word]


def _decide(record: Outgoing, peer: Decider, journal: OutgoingJournal, *, is_lost: bool) -> Outgoing:
    """A container whose memory is lost here, by a reboot say, is released to a destination that holds it complete."""
    return (journal.release if is_lost and _is_held_there(record, peer) else journal.abort)(record.migration)


def _is_held_there(record: Outgoing, peer: Decider) -> bool:
    deadline = time.monotonic() + LOST_PATIENCE_S
    while True:
        try:
            stage = peer.stage(record.migration, record.epoch)
            return stage in (peer_pb2.ARRIVAL_STAGE_READY, peer_pb2.ARRIVAL_STAGE_OWNER)
        except Unreachable as error:
            log.warning("no word of the lost container", migration=record.migration, reason=str(error))
            if time.monotonic() > deadline:
                return False
        except MigratorError as error:
            log.warning("the destination does not hold it", migration=record.migration, reason=str(error))
            return False
        time.sleep(RETRY_S)


def _answer(record: Outgoing, here: str, peer: Decider, journal: OutgoingJournal, progress: Progress) -> Stage:
    """What the destination says to `released`. Silence decides nothing."""
    try:
        answer = answers.ask_once(record, peer, journal)
    except MigratorError as error:
        progress.end(migration_pb2.OUTCOME_UNCERTAIN, "", answers.uncertain(record, here, str(error)))
        raise
    if answer.missing_bytes:
        progress.missing(answer.missing_bytes)
        journal.heard(record.migration, answers.PULLS)
        raise Busy(f"{record.container} runs at {record.destination}, which still pulls its memory from here")
    return Stage.OWNER if answer.ownership == peer_pb2.OWNERSHIP_OWNER else Stage.REFUSED


def tell_aborted(peer: Decider, record: Outgoing, progress: Progress) -> None:
    """Best effort: a destination that does not hear it asks by itself, gets the same answer and cleans up."""
    try:
        peer.decide(record.migration, record.epoch, peer_pb2.DECISION_ABORTED)
    except MigratorError as error:
        if error.reason != HandoverError.reason:
            log.warning("the destination did not hear of the abort", migration=record.migration, reason=str(error))
            return
        # Only where an operator has taken one host's part (`migrator resolve`), and the other was not gone for good.
        words = f"{record.container} was resolved to be here, but {record.destination} has it, too: stop one of the two"
        log.error("two copies", migration=record.migration, container=record.container, reason=str(error))
        progress.note(words)


def refused(record: Outgoing, here: str, why: str = "", *, by_operator: bool) -> DestinationRefused:
    """Why a migration ended that was released and did not happen. `why` is the destination's reason, if it is known."""
    if by_operator:
        return DestinationRefused(
            f"an operator has resolved that {record.container} goes on at {here}", reason="RESOLVED"
        )
    because = f": {why}" if why else ""
    return DestinationRefused(f"{record.container} goes on at {here}: {record.destination} could not take it{because}")


def found_ended(here: str) -> RolledBack:
    """Why a migration ended whose container was lost with its host, say."""
    return RolledBack(
        f"the agent of {here} was started again and found the container ended: what it had in memory is lost. Its disk "
        f"is at {here}, where its restart policy or `migrator start` starts it again",
        reason="CONTAINER_LOST",
    )


def restarted(here: str) -> RolledBack:
    """Why a migration ended that an earlier life of the agent had begun."""
    return RolledBack(
        f"the agent of {here} was restarted; the container goes on there as before", reason="AGENT_RESTARTED"
    )
