"""The guard: a process beside the source agent that undoes a freeze if the agent dies before it has released.

It is started before the freeze with everything it needs loaded, and reads a pipe from the agent. A line means that the
agent is done with it; the end of the pipe without one means that the agent is dead. Then it writes `aborted`, unless
`released` is on the disk already, and only then thaws and reconnects the container.

    python -m agent.guard CONFIG MIGRATION CONTAINER      (0: nothing to do, or resumed; 1: it was released)
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migrator.waiting import readable

READY = b"ready\n"
# Before the freeze: there is time, also on a host that is very busy.
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0


@contextmanager
def guarding(config: Path, migration: str, container: str) -> Iterator[None]:
    """Run a guard while the block runs; it is ready when the block begins."""
    from migrator.errors import ExecutionError

    process = subprocess.Popen(
        [sys.executable, "-m", "agent.guard", str(config), migration, container],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as pipe, process.stdout as answers:
        has_spoken = readable([answers.fileno()], START_TIMEOUT_S)
        if not has_spoken or answers.readline() != READY:
            process.kill()
            process.wait()
            raise ExecutionError(f"the guard process did not start within {START_TIMEOUT_S:g} s: see the agent's log")
        try:
            yield
        finally:
            try:
                pipe.write(b"done\n")
                pipe.flush()
            except BrokenPipeError:
                pass  # it is dead: there is nobody to stand down
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # It has our word, or will never read it: it does nothing any more in either case.
                process.kill()
                process.wait(END_TIMEOUT_S)


def main(config_path: str, migration: str, container: str) -> int:
    """Wait for the agent's word or its death."""
    from agent import config as configuration
    from agent import journal
    from agent.database import Database
    from agent.managers import migration_folder
    from agent.network import Networks
    from agent.resumption import resume_at_source
    from agent.runtime import Runtime
    from migrator.handover import HandoverError

    config = configuration.load(Path(config_path))
    database = Database(config.state_dir / "agent.db", [])
    outgoings = journal.Outgoings(database)
    runtime = Runtime(config.state_dir, config.run_dir, config.cgroup_parent)
    networks = Networks()
    os.write(sys.stdout.fileno(), READY)
    if sys.stdin.buffer.readline():
        return 0
    try:
        outgoings.abort(migration)
    except HandoverError:
        return 1
    folder = migration_folder(config, migration)
    resume_at_source(container, folder, database, runtime, networks)
    print(f"guard: the agent died; {container} runs on here (migration {migration})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
