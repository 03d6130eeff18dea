"""Shell scripts inside a machine."""

import subprocess

from labkit.hosts import LabError
from vmkit.machines import Machine


def execute(machine: Machine, script: str, seconds: float, stdin: str = "") -> str:
    """What a script writes, run by bash and ended by its first failure. Raises LabError with what it said."""
    command = machine.inside("bash", "-ec", script)
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{machine.name}: not done within {seconds:.0f} s:\n{script}\n{error.stdout!r}") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise LabError(f"{machine.name}: exit code {done.returncode} from\n{script.strip()}\n{said}")
    return done.stdout
