"""The handover's records: what each step allows, and a model of both ends that crash and lose messages."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent import journal
from agent.database import Database
from migrator import handover
from migrator.handover import Decision, HandoverError, Incoming, Keep, Outgoing, Stage

OUT = Outgoing("m", "ct", "b", 1)
IN = Incoming("m", "ct", "a", 1)


def test_source_never_takes_both_decisions() -> None:
    with pytest.raises(HandoverError):
        handover.abort(handover.release(OUT))
    with pytest.raises(HandoverError):
        handover.release(handover.abort(OUT))
    assert handover.release(handover.release(OUT)).decision is Decision.RELEASED


def test_source_thaws_only_after_abort_or_refusal() -> None:
    assert not OUT.may_thaw
    assert handover.abort(OUT).may_thaw
    released = handover.release(OUT)
    assert not released.may_thaw
    assert handover.hear(released, Stage.REFUSED).may_thaw
    assert not handover.hear(released, Stage.OWNER).may_thaw


def test_an_owner_that_was_never_released_is_refused() -> None:
    for record in (OUT, handover.abort(OUT)):
        with pytest.raises(HandoverError):
            handover.hear(record, Stage.OWNER)


def test_destination_owns_only_what_was_ready() -> None:
    with pytest.raises(HandoverError):
        handover.own(IN)
    owner = handover.own(handover.make_ready(IN))
    assert owner.may_run
    with pytest.raises(HandoverError):
        handover.refuse(owner)
    with pytest.raises(HandoverError):
        handover.own(handover.refuse(handover.make_ready(IN)))


def test_an_operators_word_counts_until_the_hosts_own() -> None:
    released = handover.release(OUT)
    for record in (OUT, handover.abort(OUT), handover.hear(released, Stage.REFUSED)):
        with pytest.raises(HandoverError):
            handover.resolve_outgoing(record, Keep.HERE)
    kept = handover.resolve_outgoing(released, Keep.HERE)
    assert kept.may_thaw and kept.by_operator and not kept.is_waiting
    # Never is a destination told to run what was kept.
    assert (released.word, kept.word) == (Decision.RELEASED, Decision.ABORTED)
    assert handover.hear(kept, Stage.REFUSED) == kept
    assert handover.hear(kept, Stage.OWNER) == handover.hear(released, Stage.OWNER)
    with pytest.raises(HandoverError):
        handover.hear(replace(kept, finished=True), Stage.OWNER)
    assert handover.resolve_outgoing(released, Keep.THERE).may_destroy


def test_an_operator_may_speak_for_the_source_of_what_is_ready() -> None:
    ready = handover.make_ready(IN)
    for record in (IN, handover.own(ready), handover.refuse(ready)):
        with pytest.raises(HandoverError):
            handover.resolve_incoming(record, Keep.HERE)
    assert handover.resolve_incoming(ready, Keep.HERE).may_run
    assert handover.resolve_incoming(ready, Keep.THERE).stage is Stage.REFUSED


def test_journal_keeps_what_was_said(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db", [journal.SCHEMA])
    outgoings, incomings = journal.Outgoings(database), journal.Incomings(database)
    first = outgoings.begin("m1", "ct", "b", above=4)
    assert first.epoch == 5
    outgoings.release("m1")
    database.close()

    database = Database(tmp_path / "agent.db", [journal.SCHEMA])
    outgoings, incomings = journal.Outgoings(database), journal.Incomings(database)
    assert outgoings.get("m1") == replace(first, decision=Decision.RELEASED)
    with pytest.raises(HandoverError):
        outgoings.abort("m1")
    assert [record.migration for record in outgoings.unfinished()] == ["m1"]
    word = outgoings.word("m1")
    assert word is not None and word.said == "it is ready"
    outgoings.heard("m1", "something else")
    later = outgoings.word("m1")
    assert later is not None and (later.since_time_ms, later.said) == (word.since_time_ms, "something else")
    assert outgoings.resolve("m1", Keep.HERE) == outgoings.get("m1")
    assert outgoings.unfinished()[0].by_operator
    assert not outgoings.hear("m1", Stage.OWNER).by_operator
    outgoings.finish("m1")
    assert outgoings.word("m1") is None
    # The same name comes back later, with a higher epoch only.
    with pytest.raises(HandoverError):
        incomings.begin("m2", "ct", "b", epoch=5)
    assert incomings.begin("m2", "ct", "b", epoch=6).stage is Stage.PREPARED
    assert incomings.last_epoch("ct") == 6
    database.close()


class TwoHosts(RuleBasedStateMachine):
    """Both ends with their own transition functions; every message may be lost, late or repeated, each end may die.

    `source_runs` and `destination_runs` are what a host may do by its own record. The destination can lose its copy in
    a crash as long as it has not run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.source, self.destination = OUT, IN
        self.frozen = False
        self.copy_held = False

    @rule()
    def freeze(self) -> None:
        if self.source.decision is Decision.UNDECIDED:
            self.frozen = True

    @precondition(lambda self: self.frozen and self.destination.stage is Stage.PREPARED)
    @rule()
    def restore(self) -> None:
        self.copy_held = True
        self.destination = handover.make_ready(self.destination)

    @precondition(lambda self: self.destination.stage is Stage.READY)
    @rule()
    def hear_ready_and_release(self) -> None:
        if self.source.decision is Decision.UNDECIDED:
            self.source = handover.release(self.source)

    @rule()
    def abort(self) -> None:
        """The operator, a failure, the guard, or a restarted source."""
        if self.source.decision is Decision.UNDECIDED:
            self.source = handover.abort(self.source)

    @rule()
    def thaw(self) -> None:
        if self.source.may_thaw:
            self.frozen = False

    @rule()
    def deliver_decision(self) -> None:
        """Also late and repeated: the destination acts on what the source's record says now."""
        if self.source.decision is Decision.RELEASED and self.destination.stage in (Stage.READY, Stage.OWNER):
            if self.copy_held:
                self.destination = handover.own(self.destination)
            else:
                self.destination = handover.refuse(self.destination)
        elif self.source.decision is Decision.ABORTED and self.destination.stage is not Stage.OWNER:
            self.destination = handover.refuse(self.destination)
            self.copy_held = False

    @rule()
    def deliver_answer(self) -> None:
        if self.source.decision is Decision.RELEASED and self.destination.stage in (Stage.OWNER, Stage.REFUSED):
            self.source = handover.hear(self.source, self.destination.stage)

    @rule()
    def destination_reboots(self) -> None:
        if self.destination.stage in (Stage.PREPARED, Stage.READY):
            self.copy_held = False
            if self.destination.stage is Stage.PREPARED:
                self.destination = handover.refuse(self.destination)

    @invariant()
    def never_two(self) -> None:
        assert self.frozen or not self.destination.may_run

    @invariant()
    def always_one(self) -> None:
        source_has_it = not self.source.may_destroy
        assert source_has_it or self.destination.may_run


TwoHosts.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestTwoHosts = TwoHosts.TestCase
