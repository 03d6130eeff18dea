"""What containers and migrations consist of, seen from outside the host: to show that nothing of them is left.

As a program, on a machine where systemd runs the agent, it prints the same of that machine as JSON.
"""

import json
import os
import subprocess
from pathlib import Path

from labkit.hosts import STATE

CGROUPS = Path("/sys/fs/cgroup")
# What a container or a migration puts below a host's state and run folders.
STATE_FOLDERS = ("volumes", "containers", "checkpoints", "pool/volumes", "pool/images/unfinished")
RUN_FOLDERS = ("migrations", "runc", "exits", "images", "restore")

Leftovers = dict[str, list[str]]


def present(host: str) -> Leftovers:
    """Everything of a kind that containers and migrations consist of, on one host."""
    init = int((STATE / host / "init.pid").read_text())
    seen = _seen(init, f"migrator-{host}", _processes(init))
    begun_with = (STATE / host / "mounts").read_text().splitlines()
    return seen | {"mounts": [point for point in seen["mounts"] if point not in begun_with]}


def _seen(init: int, group: str, processes: list[str]) -> Leftovers:
    root = Path(f"/proc/{init}/root")
    return {
        "loop devices": _loops(root / "var/lib/migrator"),
        "mounts": _mounts(init),
        "network namespaces": _names(root / "run/netns"),
        "links": _links(init),
        "nftables tables": _tables(init),
        "cgroups": _cgroups(group),
        "processes": processes,
        "files": _files(root),
    }


def beyond(before: Leftovers, host: str) -> Leftovers:
    """What is on the host and was not there before, by kind; empty when there is nothing."""
    return difference(before, present(host))


def difference(before: Leftovers, after: Leftovers) -> Leftovers:
    """What is new, by kind."""
    new = {kind: sorted(set(found) - set(before[kind])) for kind, found in after.items()}
    return {kind: found for kind, found in new.items() if found}


def _inside(init: int, *command: str) -> str:
    enter = ["nsenter", f"--target={init}", "--mount", "--net", "--"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout


def _loops(state: Path) -> list[str]:
    """Devices on files in the host's state folder or in its pool, which is a file system of its own, but the pool's."""
    listing = subprocess.run(
        ["losetup", "--list", "--json", "--output", "NAME,BACK-INO,BACK-MAJ:MIN,BACK-FILE"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pool = _device((state / "pool").stat().st_dev) if (state / "pool").is_mount() else ""
    inodes = set()
    for folder, _, names in os.walk(state):
        for name in names:
            try:
                found = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            inodes.add((_device(found.st_dev), found.st_ino))
    loops = json.loads(listing)["loopdevices"] if listing.strip() else []
    return [
        f"{Path(loop['back-file'].removesuffix(' (deleted)')).name} at {loop['name']}"
        for loop in loops
        if Path(loop["back-file"]).name != "pool.img"
        and (loop["back-maj:min"].strip() == pool or (loop["back-maj:min"].strip(), loop["back-ino"]) in inodes)
    ]


def _device(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _mounts(init: int) -> list[str]:
    points = [line.split()[4] for line in Path(f"/proc/{init}/mountinfo").read_text().splitlines()]
    # As with `ip netns`, the first network namespace makes the folder of all of them a mount, which stays.
    return [point for point in points if point != "/run/netns"]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _links(init: int) -> list[str]:
    return [link["ifname"] for link in json.loads(_inside(init, "ip", "-json", "link"))]


def _tables(init: int) -> list[str]:
    return _inside(init, "nft", "list", "tables").splitlines()


def _cgroups(name: str) -> list[str]:
    found = []
    for group in (*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")):
        # The one for all conmons stays; what is still in it is among the processes.
        groups = [path for path in group.rglob("*") if path.is_dir() and path.name != "_conmon"]
        found += [str(path.relative_to(CGROUPS)) for path in groups]
    return found


def _processes(init: int) -> list[str]:
    """All but the host's init, its agent, and the commands that a test runs there at the moment."""
    proc = Path(f"/proc/{init}/root/proc")
    agent = Path(f"/proc/{init}/root/run/lab-agent.pid")
    mine = {1, int(agent.read_text()) if agent.exists() else 0}
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdecimal() or int(folder.name) in mine:
            continue
        try:
            command = (folder / "cmdline").read_bytes()[:200].replace(b"\0", b" ").decode(errors="replace").strip()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Running or asleep changes by the moment.
        said = {"T": " (stopped)", "t": " (traced)", "Z": " (ended)"}.get(state, "")
        found.append(f"{folder.name} {command or '[no command]'}{said}")
    return found


def _files(root: Path) -> list[str]:
    folders = [root / "var/lib/migrator" / name for name in STATE_FOLDERS]
    folders += [root / "run/migrator" / name for name in RUN_FOLDERS]
    found = []
    for folder in folders:
        if folder.is_dir():
            found += [f"/{path.relative_to(root)}" for path in folder.iterdir()]
    return found


def _processes_of_service() -> list[str]:
    """What the agent's service has started, in its control group or in a container's, but the agent."""
    show = ["systemctl", "show", "--property=MainPID", "--value", "migrator-agent"]
    agent = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    found = []
    for group in CGROUPS.rglob("cgroup.procs"):
        parts = group.parent.relative_to(CGROUPS).parts
        if parts[:1] == ("migrator",) or "migrator-agent.service" in parts:
            try:
                pids = group.read_text().split()
            except OSError:
                continue  # removed meanwhile
            found += [f"{pid} {_command(pid)}" for pid in pids if pid != agent]
    return found


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()[:200].replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "[gone]"


if __name__ == "__main__":
    print(json.dumps(_seen(1, "migrator", _processes_of_service())))
