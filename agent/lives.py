"""The lives of containers: started, watched until they end, put to rest, and started again where the policy says so.

A container's end is learnt from its conmon's end, also after the agent was restarted.
"""

import time
from contextlib import ExitStack

import structlog

from agent.assembly import Assembly
from agent.container_needs import Snapshots
from agent.container_records import Record, Records, State, now_ms
from agent.leases import Leases
from agent.processes import Process
from agent.restarts import RestartClock, wants_restart
from agent.runtime import Launched, Runtime
from agent.specs import check_binds
from agent.watcher import ExitWatcher
from migrator.destination import FAILURES
from migrator.errors import NotFound

EXIT_FILE_TIMEOUT_S = 5.0

log = structlog.get_logger()


class Lives:
    """Who calls holds the container's lease; what this does by itself takes it."""

    def __init__(
        self, records: Records, leases: Leases, runtime: Runtime, assembly: Assembly, snapshots: Snapshots
    ) -> None:
        self._records = records
        self._leases = leases
        self._runtime = runtime
        self._assembly = assembly
        self._snapshots = snapshots
        self._watcher = ExitWatcher()
        self._clock = RestartClock()
        self._runs: dict[str, Launched] = {}

    def close(self) -> None:
        """Stop watching; the containers run on."""
        self._clock.close()
        self._watcher.close()

    def start(self, record: Record, restarts: int = 0) -> Record:
        """Set up what it needs, and let it run; undone if it fails."""
        name, spec = record.name, record.spec
        check_binds(spec)
        with ExitStack() as undo:
            # What a crash or a reboot has left would be in the way.
            self.take_down(record)
            record = self._snapshots.settle(name)
            spec = record.spec
            undo.callback(self.take_down, record)
            self._assembly.up(name, spec)
            launched = self._runtime.launch(name).result()
            self._assembly.connect(name, spec)
            # Before it runs: an agent that dies here finds the container recorded, and adopts it.
            record = self._records.update(
                name,
                state=State.RUNNING,
                should_run=1,
                start_time_ms=now_ms(),
                exit_code=None,
                restarts=restarts,
                **processes_of(launched),
            )
            undo.callback(self._records.update, name, state=State.STOPPED, should_run=0)
            self._runtime.start(name)
            undo.pop_all()
        self.watch(record)
        return record

    def watch(self, record: Record) -> None:
        """Note its end when it comes."""
        launched = Launched(
            Process(record.init_pid, record.init_ticks), Process(record.conmon_pid, record.conmon_ticks)
        )
        self._runs[record.name] = launched
        self._watcher.watch(launched.conmon, lambda: self._note_end(record.name, launched))

    def end(self, record: Record) -> Record:
        """Note the exit code and put everything to rest."""
        name = record.name
        deadline = time.monotonic() + EXIT_FILE_TIMEOUT_S
        conmon = Process(record.conmon_pid, record.conmon_ticks)
        conmon.wait(deadline - time.monotonic())
        code = self._runtime.exit_code(name)
        record = self._records.update(name, exit_code=code)
        if code is None:
            log.error("container lost: its host was restarted, or its conmon was killed", container=name)
            record = self._records.note_loss(name)
        self.take_down(record)
        return self._records.update(name, state=State.STOPPED, init_pid=0, conmon_pid=0)

    def take_down(self, record: Record) -> None:
        """End every process and take away all that runs or is mounted; repeatable."""
        self._runs.pop(record.name, None)
        self._runtime.delete(record.name)
        self._assembly.down(record.name, record.spec)

    def after_end(self, record: Record) -> None:
        """Start it again, or let it be."""
        if record.should_run and wants_restart(record.spec.restart_policy, record.exit_code):
            self.start_later(record, max(0, now_ms() - record.start_time_ms) / 1000)
        else:
            self._records.update(record.name, should_run=0)

    def start_later(self, record: Record, ran_s: float) -> None:
        """By its policy, after a run of so long."""
        delay_s = self._clock.schedule(record.name, ran_s, lambda: self._restart(record.name))
        log.info("container restarts", container=record.name, exit_code=record.exit_code, delay_s=delay_s)

    def let_be(self, name: str) -> None:
        """No start by policy any more."""
        self._clock.cancel(name)

    def _note_end(self, name: str, launched: Launched) -> None:
        """conmon has ended: so has the container, unless somebody else has seen to it by now."""
        try:
            # Whoever holds it, a migration say, may hold it long and decides first.
            with self._leases.hold(name, "its end is being noted", wait_s=float("inf"), brief=True):
                if self._runs.get(name) is launched:
                    if launched.init.is_alive():
                        log.warning("conmon is gone, so the container is ended too", container=name)
                    self.after_end(self.end(self._records.get(name)))
        except NotFound:
            return
        except FAILURES as error:
            # Until all is taken down it counts as running: what is mounted is not at rest.
            self._runs.setdefault(name, launched)
            delay_s = self._clock.schedule(name, 0.0, lambda: self._note_end(name, launched))
            log.error("container's end", container=name, error=str(error), again_in_s=delay_s)

    def _restart(self, name: str) -> None:
        try:
            with self._leases.hold(name, "it is being restarted by its policy", wait_s=float("inf"), brief=True):
                record = self._records.get(name)
                if record.should_run and record.state is State.STOPPED:
                    try:
                        self.start(record, restarts=record.restarts + 1)
                    except FAILURES as error:
                        log.error("restart", container=name, error=str(error))
                        self._records.update(name, should_run=1, restarts=record.restarts + 1)
                        self.start_later(record, 0.0)
        except NotFound:
            return


def init_of(record: Record) -> Process | None:
    """The first process if it lives."""
    process = Process(record.init_pid, record.init_ticks)
    return process if record.init_pid and process.is_alive() else None


def processes_of(launched: Launched) -> dict[str, int]:
    """As a record has them."""
    return {
        "init_pid": launched.init.pid,
        "init_ticks": launched.init.start_ticks,
        "conmon_pid": launched.conmon.pid,
        "conmon_ticks": launched.conmon.start_ticks,
    }
