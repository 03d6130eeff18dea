"""When a container that has ended is started again: a pure decision, and the clock for it."""

import threading
from collections.abc import Callable

from migrator.v1 import container_pb2

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 60.0
# A run of this length was a good one: the next delay is the first again.
GOOD_RUN_S = 10.0


def wants_restart(policy: container_pb2.RestartPolicy, exit_code: int | None) -> bool:
    """By the policy and the exit code; an unknown code (a reboot) counts as a failure."""
    if policy == container_pb2.RESTART_POLICY_ALWAYS:
        return True
    return policy == container_pb2.RESTART_POLICY_ON_FAILURE and exit_code != 0


def next_delay_s(previous_s: float | None, ran_s: float) -> float:
    """Seconds to wait before the next start, given the wait before the last one and how long that run was."""
    if previous_s is None or ran_s >= GOOD_RUN_S:
        return FIRST_DELAY_S
    return min(previous_s * 2, LONGEST_DELAY_S)


class RestartClock:
    """Starts that are due later, one at most per container."""

    def __init__(self) -> None:
        self._timers: dict[str, threading.Timer] = {}
        self._delays: dict[str, float] = {}
        self._lock = threading.Lock()

    def schedule(self, name: str, ran_s: float, start: Callable[[], None]) -> float:
        """Call `start` after the delay that is due; returns the delay."""
        with self._lock:
            delay = next_delay_s(self._delays.get(name), ran_s)
            self._delays[name] = delay
            timer = threading.Timer(delay, start)
            timer.daemon = True
            self._timers[name] = timer
            timer.start()
        return delay

    def cancel(self, name: str, *, forget: bool = True) -> None:
        """No start of this container any more; with `forget`, the next delay is the first again."""
        with self._lock:
            timer = self._timers.pop(name, None)
            if forget:
                self._delays.pop(name, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        with self._lock:
            timers = list(self._timers.values())
            self._timers.clear()
        for timer in timers:
            timer.cancel()
