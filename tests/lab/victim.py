"""A process that knows what each page of its memory has to hold, in a container of the lab."""

import base64
import re
import subprocess
import tempfile
from pathlib import Path

from tests.lab.lab_kit import HOSTS, Lab, eventually

# So slow that it writes faster.
POSTCOPY = ("--on-no-converge", "postcopy", "--bandwidth", "2Mbit/s", "--max-downtime", "20ms")
SOURCE = Path(__file__).parents[1] / "contract" / "fill_victim.c"


def compiled() -> str:
    """The program, linked statically, in base64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "victim"
        subprocess.run(["cc", "-O2", "-static", "-pthread", "-o", path, SOURCE], check=True)
        return base64.b64encode(path.read_bytes()).decode()


def start(lab: Lab, program: str, scenario: str, mib: int) -> None:
    """A container called like the scenario, at the first host, that goes round."""
    lab.image(HOSTS[0], "tools")
    command = f"until test -e /go; do sleep 0.05; done; exec /victim /out /go {scenario} {mib}"
    lab.start(HOSTS[0], scenario, "tools", "--disk", "1GiB", command=["sh", "-c", command])
    push = "base64 -d >/victim && chmod +x /victim && touch /go"
    lab.exec(HOSTS[0], scenario, "sh", "-c", push, stdin=program)
    eventually("it goes round", lambda: told(lab, HOSTS[0], scenario)[0] > 0, 30)


def told(lab: Lab, host: str, name: str) -> tuple[int, int]:
    """Rounds, and how much was wrong."""
    found = re.match(r"rounds (\d+) +bad (\d+)", lab.exec(host, name, "cat", "/out"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def expect_whole(lab: Lab, host: str, name: str, within_s: float = 30) -> None:
    """It goes on, and nothing was wrong."""
    rounds, bad = told(lab, host, name)
    assert not bad
    eventually("it goes on", lambda: told(lab, host, name)[0] > rounds + 2, within_s)
    assert not told(lab, host, name)[1]
