"""Handovers of this host that wait for another one's word, and an operator's word for that of one that is gone."""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from agent.database import Database
from agent.journal import Incomings, Outgoings, Word
from migrator.arrivals import Arrivals
from migrator.errors import InvalidArgument, MigratorError, Precondition, Unreachable
from migrator.handover import HandoverError, Incoming, Keep, Outgoing
from migrator.v1 import migration_pb2, peer_pb2

KEEPS = {migration_pb2.KEEP_HERE: Keep.HERE, migration_pb2.KEEP_THERE: Keep.THERE}
_DECISIONS = {
    peer_pb2.DECISION_UNSPECIFIED: "it has not decided yet",
    peer_pb2.DECISION_RELEASED: "it has released the container",
    peer_pb2.DECISION_ABORTED: "it has kept the container",
}
_STAGES = {
    peer_pb2.ARRIVAL_STAGE_PREPARED: "it is being prepared",
    peer_pb2.ARRIVAL_STAGE_READY: "it is ready",
    peer_pb2.ARRIVAL_STAGE_OWNER: "it owns the container",
    peer_pb2.ARRIVAL_STAGE_REFUSED: "it has refused the container",
}

log = structlog.get_logger()


@dataclass(frozen=True)
class Answer:
    """What the other host says now; one that cannot be asked or that knows nothing of the migration does not answer."""

    is_one: bool
    words: str


class Handovers:
    """Those that wait. All methods raise NotFound for an unknown container, Precondition where nothing waits."""

    def __init__(
        self,
        host: str,
        database: Database,
        arrivals: Arrivals,
        check_container: Callable[[str], object],
        ask_destination: Callable[[Outgoing], "peer_pb2.ArrivalStage"],
        ask_source: Callable[[Incoming], "peer_pb2.Decision"],
    ) -> None:
        """`check_container` raises NotFound for one that this host does not have; the others raise MigratorError."""
        self._host = host
        self._arrivals = arrivals
        self._check_container = check_container
        self._ask_destination = ask_destination
        self._ask_source = ask_source
        self._outgoings = Outgoings(database)
        self._incomings = Incomings(database)

    def get(self, container: str) -> migration_pb2.Handover:
        """It with what is known of the other host, which is asked now."""
        record = self._waiting(container)
        if isinstance(record, Outgoing):
            side, peer = migration_pb2.HANDOVER_SIDE_SOURCE, record.destination
            word = self._outgoings.word(record.migration)
            answer = _answer(peer, lambda: _STAGES[self._ask_destination(record)])
        else:
            side, peer = migration_pb2.HANDOVER_SIDE_DESTINATION, record.source
            word = self._incomings.word(record.migration)
            answer = _answer(peer, lambda: _DECISIONS[self._ask_source(record)])
        made = migration_pb2.Handover(
            container=container,
            migration=record.migration,
            epoch=record.epoch,
            side=side,
            host=self._host,
            peer=peer,
            peer_answers=answer.is_one,
            answer=answer.words,
        )
        _tell(made, word)
        return made

    def resolve(self, container: str, epoch: int, keep: migration_pb2.Keep) -> migration_pb2.Handover:
        """Take an operator's word. The migration's own thread, or `Arrivals.tend`, carries it out."""
        if keep not in KEEPS:
            raise InvalidArgument(f"keep {keep} is unknown to this version")
        found = self.get(container)
        if found.epoch != epoch:
            raise Precondition(
                f"the handover of {container} that waits has epoch {found.epoch}, not {epoch}: look again",
                reason="EPOCH_CHANGED",
            )
        if found.peer_answers:
            raise Precondition(
                f"{found.peer} answers ({found.answer}): there is nothing to resolve, the agents finish the migration",
                reason="PEER_ANSWERS",
            )
        log.warning("resolved by an operator", container=container, migration=found.migration, keep=KEEPS[keep])
        try:
            if found.side == migration_pb2.HANDOVER_SIDE_SOURCE:
                self._outgoings.resolve(found.migration, KEEPS[keep])
            else:
                self._arrivals.resolve(found.migration, KEEPS[keep])
        except HandoverError as error:
            raise _nothing(container, self._host) from error
        return found

    def _waiting(self, container: str) -> Outgoing | Incoming:
        records: list[Outgoing | Incoming] = [*self._outgoings.unfinished(), *self._incomings.unfinished()]
        for record in records:
            if record.container == container and record.is_waiting:
                return record
        self._check_container(container)
        raise _nothing(container, self._host)


def _answer(peer: str, ask: Callable[[], str]) -> Answer:
    try:
        return Answer(True, ask())
    except KeyError:
        return Answer(True, "it says what this version does not know")
    except MigratorError as error:
        return _failed(peer, error)


def _failed(peer: str, error: MigratorError) -> Answer:
    if error.reason == "MIGRATION_NOT_FOUND":
        return Answer(False, f"{peer} answers, but knows nothing of this migration: was its state deleted?")
    if isinstance(error, Unreachable) or error.reason in ("UNKNOWN_HOST", "PERMISSION_DENIED"):
        return Answer(False, str(error))
    # It is there and has a trouble of its own, an older version for example: that is not being gone.
    return Answer(True, str(error))


def _nothing(container: str, host: str) -> Precondition:
    return Precondition(
        f"no handover of {container} at {host} waits for another host's word: there is nothing to resolve; "
        "`migrator migrations ls` has its migrations",
        reason="NOTHING_TO_RESOLVE",
    )


def _tell(handover: migration_pb2.Handover, word: Word | None) -> None:
    if word is not None:
        handover.since_time.FromMilliseconds(word.since_time_ms)
        handover.heard_time.FromMilliseconds(word.heard_time_ms)
        handover.heard = word.said
