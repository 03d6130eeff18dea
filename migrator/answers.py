"""The source's question after `released`: has the destination taken the container? Silence decides nothing."""

import time

import structlog

from migrator.errors import MigratorError, Uncertain
from migrator.handover import Outgoing, OutgoingJournal, Stage
from migrator.ports import Decider
from migrator.progress import Progress
from migrator.units import format_size
from migrator.v1 import migration_pb2, peer_pb2

# How long an operator waits for the destination's answer to `released` before the outcome is called uncertain.
PATIENCE_S = 15.0
RETRY_S = 0.5
PULL_POLL_S = 0.5
# For an operator who thinks of resolving it.
PULLS = "it runs the container, and has not all of its memory yet: without the copy here it ends there"

_BY_ANSWER = {Stage.OWNER: peer_pb2.OWNERSHIP_OWNER, Stage.REFUSED: peer_pb2.OWNERSHIP_REFUSED}

log = structlog.get_logger()


def ask_once(record: Outgoing, peer: Decider, journal: OutgoingJournal) -> peer_pb2.DecideResponse:
    """Say `released` and return the answer, which is one. Raises Uncertain, or what the call has met."""
    answer = peer.decide(record.migration, record.epoch, peer_pb2.DECISION_RELEASED)
    if answer.ownership not in _BY_ANSWER.values():
        journal.heard(record.migration, "it has not decided yet")
        raise Uncertain(f"{record.destination} has not decided yet")
    return answer


def ask(
    record: Outgoing, here: str, peer: Decider, journal: OutgoingJournal, progress: Progress, missing_bytes: int = 0
) -> tuple[peer_pb2.DecideResponse, float]:
    """`ask_once` until there is an answer, the destination's own or an operator's. Returns it and its milliseconds.

    `missing_bytes` are those that its last answer has spoken of.
    """
    patience = time.monotonic() + PATIENCE_S
    while True:
        # A word that pages were already kept back for is carried out, also if the destination is heard again.
        if missing_bytes and (word := _operators(record, journal)) is not None:
            return word, 0.0
        began = time.monotonic()
        try:
            return ask_once(record, peer, journal), (time.monotonic() - began) * 1000
        except MigratorError as error:
            reason = str(error)
        if (word := _operators(record, journal)) is not None:
            return word, 0.0
        if time.monotonic() > patience:
            patience = float("inf")
            progress.end(migration_pb2.OUTCOME_UNCERTAIN, "", uncertain(record, here, reason, missing_bytes))
        log.warning("no answer to released", migration=record.migration, peer=peer.host, reason=reason)
        time.sleep(RETRY_S)


def _operators(record: Outgoing, journal: OutgoingJournal) -> peer_pb2.DecideResponse | None:
    resolved = journal.get(record.migration)
    if resolved is None or resolved.answer is None:
        return None
    return peer_pb2.DecideResponse(ownership=_BY_ANSWER[resolved.answer])


def await_memory(
    record: Outgoing,
    here: str,
    peer: Decider,
    journal: OutgoingJournal,
    progress: Progress,
    answer: peer_pb2.DecideResponse,
) -> peer_pb2.DecideResponse:
    """Post-copy: ask again until the destination misses nothing any more, as it does from the beginning otherwise."""
    if answer.missing_bytes:
        journal.heard(record.migration, PULLS)
    while answer.missing_bytes:
        progress.missing(answer.missing_bytes)
        time.sleep(PULL_POLL_S)
        answer, _ = ask(record, here, peer, journal, progress, answer.missing_bytes)
    return answer


def uncertain(record: Outgoing, here: str, reason: str, missing_bytes: int = 0) -> Uncertain:
    """What an operator is told of a released container whose destination does not answer."""
    container, destination = record.container, record.destination
    if missing_bytes:
        return Uncertain(
            f"{container} runs at {destination}, which does not answer any more ({reason}), and at least then needed "
            f"{format_size(missing_bytes)} of memory that only the copy on {here} has. That is kept frozen until "
            f"{destination} is back; if that is gone for good: migrator resolve {container}"
        )
    return Uncertain(
        f"{container} was released to {destination}, which does not answer ({reason}). "
        f"The copy on {here} is kept frozen and the question is repeated until {destination} is back; "
        f"if that is gone for good: migrator resolve {container}"
    )
