"""The way back of a container that stood still for a migration; also without the agent that had begun it."""

import signal
from contextlib import ExitStack
from pathlib import Path

from agent.assembly import interfaces
from agent.container_records import Record, Records, State
from agent.database import Database
from agent.network import Networks
from agent.processes import Process
from agent.runtime import Runtime
from blockdev import filesystem
from migrator.waiting import finishes

CRIU_PROCESS = "criu.pid"
"""In the folder of the migration: the CRIU that dumps."""
CRIU_END_S = 5.0


def resume_at_source(name: str, folder: Path, database: Database, runtime: Runtime, networks: Networks) -> None:
    """Thaw and reconnect a container whose migration was aborted, from nothing but the database and the host.

    `folder` is the migration's.
    """
    record = Records(database).get(name)
    if record.state.is_live:
        resume(record, folder, runtime, networks)


def resume(record: Record, folder: Path, runtime: Runtime, networks: Networks) -> None:
    """Every step is tried, whatever became of those before; the first failure is raised at the end."""
    paths = runtime.paths(record.name)
    links = interfaces(record.spec)
    with ExitStack() as steps:  # it runs them from the last to the first
        cgroup = runtime.cgroup(record.name)
        steps.callback(cgroup.limit_cpu, record.spec.cpu_millis)
        if record.state is not State.PAUSED:
            steps.callback(cgroup.thaw)
        # After a reboot, say, there is nothing to connect.
        if Process(record.init_pid, record.init_ticks).is_alive():
            steps.callback(networks.announce, record.name, links)
            steps.callback(networks.connect, record.name, links)
        steps.callback(_await_criu, folder)
        # Before CRIU: it takes away the links that it has made, and waits for ever in a frozen file system.
        for at in (paths.rootfs, *(paths.volumes / str(index) for index in range(1, len(record.spec.volumes)))):
            steps.callback(filesystem.thaw, at)


def _await_criu(folder: Path) -> None:
    """Wait until the CRIU of a dead agent has rolled back: it ends with the control group as it found it, frozen.

    Killed half-way it would leave its own code in the tasks, so that is for one that does nothing any more.
    """
    process = Process.noted(folder / CRIU_PROCESS)
    if process is None or not process.is_alive():
        return
    if not finishes(process.pid):
        process.signal(signal.SIGKILL)
        process.wait(CRIU_END_S)
