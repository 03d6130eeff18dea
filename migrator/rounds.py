"""Go on, or freeze? A pure decision on measured numbers."""

from dataclasses import dataclass

# What a last round may leave to the freeze; at 1 GB/s it costs 4 ms.
SMALL_BYTES = 4 << 20
MAX_ROUNDS = 8
# A round that leaves more than this part of what it began with is not worth another.
SHRINK = 0.7


@dataclass(frozen=True)
class Round:
    """One pass: the bytes it sent and how long it took."""

    sent_bytes: int
    seconds: float


def another(rounds: list[Round], dirty_bytes: int) -> bool:
    """Whether one more round over what is dirty now makes the freeze shorter."""
    if dirty_bytes <= SMALL_BYTES or len(rounds) >= MAX_ROUNDS:
        return False
    return dirty_bytes < SHRINK * rounds[-1].sent_bytes
