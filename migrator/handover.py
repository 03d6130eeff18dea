"""The handover: which end owns a container, as records that only move forward.

Both ends keep one record per migration, durable before anything is said or done about it. The functions here are the
only way from one record to the next; they know nothing of disks, networks or processes:

    source       (undecided) -> released(e) -> owner or refused heard -> finished
                 (undecided) -> aborted(e)  -> finished
    destination  prepared(e) -> ready(e) -> owner(e) -> finished
                 prepared(e) or ready(e) -> refused(e) -> finished

No record leads from released to a running source except through refused, and none from prepared or ready to a running
destination except through owner. So two copies never run, and one that can always exists.

Where the other host is gone for good, an operator's word (`resolve_outgoing`, `resolve_incoming`) takes the place of
what it would have said. Then both are true only as far as the operator is right.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from migrator.errors import MigratorError


class HandoverError(MigratorError):
    """A step that the record does not allow: a late, repeated or contradicting message."""

    reason = "HANDOVER_STATE"


class Decision(StrEnum):
    """What the source has decided; it never takes both."""

    UNDECIDED = "undecided"
    RELEASED = "released"
    ABORTED = "aborted"


class Stage(StrEnum):
    """How far the destination is."""

    PREPARED = "prepared"
    READY = "ready"
    OWNER = "owner"
    REFUSED = "refused"


class Keep(StrEnum):
    """Which copy an operator keeps, as seen from the host that is asked."""

    HERE = "here"
    THERE = "there"


@dataclass(frozen=True)
class Outgoing:
    """The source's record of one migration. `answer` is what the destination has said to `released`, or, `by_operator`,
    what an operator has said for it."""

    migration: str
    container: str
    destination: str
    epoch: int
    decision: Decision = Decision.UNDECIDED
    answer: Stage | None = None
    finished: bool = False
    by_operator: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether only the destination's word leads on from here."""
        return self.decision is Decision.RELEASED and self.answer is None and not self.finished

    @property
    def word(self) -> Decision:
        """What a destination is told that asks: never that it may run what runs here."""
        return Decision.ABORTED if self.answer is Stage.REFUSED else self.decision

    @property
    def may_thaw(self) -> bool:
        """Whether the source's copy may run again."""
        return self.decision is Decision.ABORTED or self.answer is Stage.REFUSED

    @property
    def may_destroy(self) -> bool:
        """Whether the source's copy is no longer needed."""
        return self.answer is Stage.OWNER


@dataclass(frozen=True)
class Incoming:
    """The destination's record of one migration."""

    migration: str
    container: str
    source: str
    epoch: int
    stage: Stage = Stage.PREPARED
    finished: bool = False
    by_operator: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether only the source's word leads on from here."""
        return self.stage is Stage.READY and not self.finished

    @property
    def may_run(self) -> bool:
        """Whether the destination's copy may run."""
        return self.stage is Stage.OWNER


def release(record: Outgoing) -> Outgoing:
    """The source gives the container away; repeatable."""
    return _decide(record, Decision.RELEASED)


def abort(record: Outgoing) -> Outgoing:
    """The source keeps the container; repeatable."""
    return _decide(record, Decision.ABORTED)


def _decide(record: Outgoing, decision: Decision) -> Outgoing:
    if record.decision not in (Decision.UNDECIDED, decision):
        raise HandoverError(f"migration {record.migration} is {record.decision} already; it cannot be {decision}")
    return replace(record, decision=decision)


def hear(record: Outgoing, answer: Stage) -> Outgoing:
    """The source has heard owner(e) or refused(e)."""
    if answer not in (Stage.OWNER, Stage.REFUSED):
        raise HandoverError(f"{answer} is no answer to released")
    if record.decision is not Decision.RELEASED and answer is Stage.OWNER:
        raise HandoverError(
            f"{record.destination} claims {record.container}, which migration {record.migration} never released"
        )
    # An operator's word counts until the destination's own: nothing was thawed or destroyed for it yet.
    if record.answer not in (None, answer) and (not record.by_operator or record.finished):
        raise HandoverError(f"{record.destination} said {record.answer} and now says {answer}")
    return replace(record, answer=answer, by_operator=record.by_operator and record.answer is answer)


def resolve_outgoing(record: Outgoing, keep: Keep) -> Outgoing:
    """The destination is gone for good, and an operator says which copy counts: as if it had said so itself."""
    if not record.is_waiting:
        raise HandoverError(f"migration {record.migration} does not wait for {record.destination}")
    return replace(record, answer=Stage.REFUSED if keep is Keep.HERE else Stage.OWNER, by_operator=True)


def make_ready(record: Incoming) -> Incoming:
    """The destination holds a complete, synced copy that has not run."""
    if record.stage not in (Stage.PREPARED, Stage.READY):
        raise HandoverError(f"migration {record.migration} is {record.stage} already; it cannot become ready")
    return replace(record, stage=Stage.READY)


def own(record: Incoming) -> Incoming:
    """The commit point: the source has said released(e)."""
    if record.stage not in (Stage.READY, Stage.OWNER):
        raise HandoverError(f"migration {record.migration} is {record.stage}; only a ready copy can become the owner")
    return replace(record, stage=Stage.OWNER)


def refuse(record: Incoming) -> Incoming:
    """The destination cannot or may not go on; repeatable, and final."""
    if record.stage is Stage.OWNER:
        raise HandoverError(f"migration {record.migration} is committed here; it cannot be refused")
    return replace(record, stage=Stage.REFUSED)


def resolve_incoming(record: Incoming, keep: Keep) -> Incoming:
    """The source is gone for good, and an operator says which copy counts: as if it had said so itself."""
    if not record.is_waiting:
        raise HandoverError(f"migration {record.migration} does not wait for {record.source}")
    return replace(record, stage=Stage.OWNER if keep is Keep.HERE else Stage.REFUSED, by_operator=True)


class OutgoingJournal(Protocol):
    """Durable records of the source: `update` applies one of the functions above in a transaction of its own."""

    def begin(self, migration: str, container: str, destination: str, above: int) -> Outgoing:
        """A new record; its epoch is above every one this host knows for the container, and above `above`."""

    def get(self, migration: str) -> Outgoing | None:
        """The record as it is on the disk."""

    def release(self, migration: str) -> Outgoing:
        """`release`, durable on return."""

    def abort(self, migration: str) -> Outgoing:
        """`abort`, durable on return."""

    def hear(self, migration: str, answer: Stage) -> Outgoing:
        """`hear`, durable on return."""

    def heard(self, migration: str, said: str) -> None:
        """The destination has just said this; noted for people."""

    def finish(self, migration: str) -> None:
        """Nothing is left to do for it."""


class IncomingJournal(Protocol):
    """Durable records of the destination."""

    def begin(self, migration: str, container: str, source: str, epoch: int) -> Incoming:
        """A new record; refused if this container has been here with that epoch or a later one."""

    def get(self, migration: str) -> Incoming | None:
        """The record as it is on the disk."""

    def unfinished(self) -> list[Incoming]:
        """Records that there is still something to do for."""

    def make_ready(self, migration: str) -> Incoming:
        """`make_ready`, durable on return."""

    def own(self, migration: str) -> Incoming:
        """`own`, durable on return."""

    def refuse(self, migration: str) -> Incoming:
        """`refuse`, durable on return."""

    def resolve(self, migration: str, keep: Keep) -> Incoming:
        """`resolve_incoming`, durable on return."""

    def heard(self, migration: str, said: str) -> None:
        """The source has just said this; noted for people."""

    def finish(self, migration: str) -> None:
        """Nothing is left to do for it."""
