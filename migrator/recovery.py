"""A migration at the source whose own end was not reached: a step failed, or the agent was started again.

The record alone says what is to be done. Nothing here depends on what the agent had in its memory, and everything may
be repeated, so the caller tries until it has worked.
"""

import structlog

from migrator.errors import MigratorError, RolledBack, Uncertain
from migrator.handover import Decision, Outgoing, OutgoingJournal, Stage
from migrator.ports import LeavingContainer, Peer
from migrator.progress import Progress
from migrator.v1 import migration_pb2, peer_pb2

log = structlog.get_logger()


def carry_on(
    migration: str,
    here: str,
    container: LeavingContainer | None,
    peer: Peer,
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
    if record.decision is Decision.UNDECIDED:
        record = journal.abort(migration)
    if record.decision is Decision.RELEASED and record.answer is None:
        record = journal.hear(migration, _answer(record, here, peer, progress))
    if record.may_destroy:
        if container is not None:
            container.kill()
            container.remove()
        progress.end(migration_pb2.OUTCOME_MIGRATED, record.destination)
    else:
        if container is not None:
            container.resume()
        if record.decision is Decision.ABORTED:
            tell_aborted(peer, record)
        if progress.snapshot().outcome in (migration_pb2.OUTCOME_UNSPECIFIED, migration_pb2.OUTCOME_UNCERTAIN):
            progress.end(migration_pb2.OUTCOME_ROLLED_BACK, here, lost(here))
    journal.finish(migration)


def _answer(record: Outgoing, here: str, peer: Peer, progress: Progress) -> Stage:
    """What the destination says to `released`. Silence decides nothing."""
    try:
        ownership = peer.decide(record.migration, record.epoch, peer_pb2.DECISION_RELEASED).ownership
        if ownership == peer_pb2.OWNERSHIP_UNSPECIFIED:
            raise Uncertain(f"{record.destination} has not decided yet")
    except MigratorError as error:
        progress.end(
            migration_pb2.OUTCOME_UNCERTAIN,
            "",
            Uncertain(
                f"{record.container} was released to {record.destination}, which does not answer ({error}). "
                f"The copy on {here} is kept frozen and the question is repeated until {record.destination} is back"
            ),
        )
        raise
    return Stage.OWNER if ownership == peer_pb2.OWNERSHIP_OWNER else Stage.REFUSED


def tell_aborted(peer: Peer, record: Outgoing) -> None:
    """Best effort: a destination that does not hear it asks by itself, gets the same answer and cleans up."""
    try:
        peer.decide(record.migration, record.epoch, peer_pb2.DECISION_ABORTED)
    except MigratorError as error:
        log.warning("the destination did not hear of the abort", migration=record.migration, reason=str(error))


def lost(here: str) -> RolledBack:
    """Why a migration ended that an earlier life of the agent had begun."""
    return RolledBack(
        f"the agent of {here} was restarted; the container goes on there as before", reason="AGENT_RESTARTED"
    )
