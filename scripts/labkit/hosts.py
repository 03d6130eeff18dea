"""What the lab is made of: names, addresses, files, and how to get inside a host."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
STATE = Path("/var/lib/migrator-lab")
LAB_FILE = STATE / "lab.json"
SWITCH, CLIENT = "migrator-lab-switch", "migrator-lab-client"
PATH = f"{CHECKOUT}/.venv/bin:/usr/local/lib/migrator/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
MOUNT_POINTS = (Path("/etc/migrator"), Path("/var/lib/migrator"))
HIDDEN = ("/run", "/proc", "/sys", *map(str, MOUNT_POINTS))


class LabError(Exception):
    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Host:
    """One host's names, addresses and files; the first has index 1."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"host-{chr(ord('a') + index - 1)}"
        self.address, self.address6 = f"10.77.1.{index}", f"fd77::1:{index}"
        self.folder = STATE / self.name
        self.log = self.folder / "agent.log"

    def init_pid(self) -> int:
        """Pid of the host's init, or 0 when the host is not running."""
        try:
            pid = int((self.folder / "init.pid").read_text())
            running = Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\0infinity\0"
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return pid if running else 0

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` in the host; where its nsenter is killed, it goes too."""
        pid = self.init_pid()
        if not pid:
            raise LabError(f"{self.name} is not running: scripts/lab down, then scripts/lab up", 4)
        where = str(Path.cwd())
        if any(where == top or where.startswith(top + "/") for top in HIDDEN):
            where = "/"
        # Ctrl-C is for the command alone: an nsenter that died of it would have it terminated besides.
        enter = ["env", "--ignore-signal=INT", "nsenter", f"--target={pid}", *NAMESPACES, f"--wdns={where}", "--"]
        return [*enter, "env", "--default-signal=INT", "setpriv", "--pdeathsig=TERM", *command]

    def agent_pid(self) -> int:
        """Pid of the agent inside the host, or 0."""
        root = Path(f"/proc/{self.init_pid()}/root")
        try:
            pid = int((root / "run/lab-agent.pid").read_text())
            command = (root / f"proc/{pid}/cmdline").read_bytes()
            state = (root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return 0
        if not command and state != "Z":
            return pid  # in the middle of an exec
        return pid if b"agent" in command else 0


def lab_hosts() -> list[Host]:
    try:
        count = json.loads(LAB_FILE.read_text())["hosts"]
    except FileNotFoundError:
        raise LabError("the lab is not up: scripts/lab up", 4) from None
    return [Host(index) for index in range(1, count + 1)]


def host_named(name: str) -> Host:
    hosts = lab_hosts()
    for host in hosts:
        if host.name == name:
            return host
    raise LabError(f"no host {name!r} in the lab: it has {', '.join(host.name for host in hosts)}", 4)


def ip(batch: str, netns: str) -> None:
    done = subprocess.run(["ip", "-n", netns, "-batch", "-"], input=batch, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise LabError(f"ip in {netns}: {done.stderr.strip()}")


def wait_for(what: str, seconds: float, probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            raise LabError(f"{what} within {seconds:.0f} s")
        time.sleep(0.01)
