"""Another round, or freeze? A pure decision on measured numbers, memory and disk together."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

DEFAULT_DOWNTIME_S = 0.1
# Of the time that a container may stand still: the rest is for stopping, dumping, restoring and letting it run.
SENDING_SHARE = 0.3
# Less than this is not worth a round, nor what is sent in the time that a round takes by itself.
SMALL_BYTES, ROUND_S = 4 << 20, 0.04
# What a link is taken for until a round has shown it.
ASSUMED_BYTES_PER_S = 100 << 20
# A round that says anything about the link.
TELLING_BYTES = 1 << 20
# A round that leaves more than this part of what it sent has not brought the end nearer; one may be an accident.
SHRINK = 0.8
PATIENCE = 2
MAX_ROUNDS = 40
# Of its processor time, what a container that is slowed down keeps, one step after the other.
CPU_SHARES = (0.5, 0.25, 0.12, 0.06, 0.03)


class OnNoConverge(Enum):
    """What to do about a container that writes faster than it can be sent."""

    ABORT = "abort"
    FREEZE = "freeze"
    THROTTLE = "throttle"
    POSTCOPY = "postcopy"


class Next(Enum):
    """What follows a round."""

    ROUND = "round"
    FREEZE = "freeze"
    STUCK = "stuck"


@dataclass(frozen=True)
class Round:
    """One pass over memory and disk: the bytes that were to be sent, how long it took, and what was left then."""

    sent_bytes: int
    seconds: float
    left_bytes: int


def decide(rounds: Sequence[Round], left_bytes: int, max_downtime_s: float = DEFAULT_DOWNTIME_S) -> Next:
    """`left_bytes` are what would have to be sent with the container standing still, if it were stopped now.

    STUCK means that more rounds would not bring that below what the time allows.
    """
    if left_bytes <= limit_bytes(rounds, max_downtime_s):
        return Next.FREEZE
    if len(rounds) >= MAX_ROUNDS:
        return Next.STUCK
    recent = rounds[-PATIENCE:]
    is_stuck = len(recent) == PATIENCE and all(r.left_bytes > SHRINK * r.sent_bytes for r in recent)
    return Next.STUCK if is_stuck else Next.ROUND


def limit_bytes(rounds: Sequence[Round], max_downtime_s: float) -> int:
    """What may be left when the container is stopped."""
    rate = speed(rounds)
    return int(max(min(SMALL_BYTES, rate * ROUND_S), rate * max_downtime_s * SENDING_SHARE))


def speed(rounds: Sequence[Round]) -> float:
    """Bytes per second of the last round that was large enough to tell."""
    telling = (r.sent_bytes / r.seconds for r in reversed(rounds) if r.sent_bytes >= TELLING_BYTES and r.seconds > 0)
    return next(telling, float(ASSUMED_BYTES_PER_S))


def standstill_s(rounds: Sequence[Round], left_bytes: int) -> float:
    """How long the container would stand still for what is left alone."""
    return left_bytes / speed(rounds)
