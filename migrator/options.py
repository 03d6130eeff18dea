"""What an operator can ask of a migration."""

from dataclasses import dataclass

from migrator import convergence
from migrator.convergence import OnNoConverge


@dataclass(frozen=True)
class Options:
    """What the operator has asked for."""

    check_only: bool = False
    verify: bool = False
    max_downtime_s: float = convergence.DEFAULT_DOWNTIME_S
    on_no_converge: OnNoConverge = OnNoConverge.FREEZE
