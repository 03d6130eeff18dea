"""Taking the lab apart, in an order that works for whatever state a crash has left it in."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from labkit.hosts import CLIENT, MOUNT_POINTS, STATE, SWITCH, Host, LabError, wait_for

HOSTS_MAX = 26
CGROUPS = Path("/sys/fs/cgroup")
STOP_SECONDS = 20.0
FITHAW = 0xC0045878  # linux/fs.h


def remove() -> None:
    """Remove every trace of a lab. What holds what decides the order: frozen file systems hold mounts, frozen
    cgroups hold processes, processes hold namespaces and cgroups, mounts hold loop devices, and those hold files."""
    hosts = [Host(index) for index in range(1, HOSTS_MAX + 1)]
    groups = end(hosts)
    stop_proxy()
    for name in (SWITCH, CLIENT):
        if Path("/run/netns", name).exists():
            subprocess.run(["ip", "netns", "delete", name], check=True)
    for group in groups:
        remove_cgroup(group)
    release_loops(STATE)
    if STATE.exists():
        shutil.rmtree(STATE)
    for folder in MOUNT_POINTS:
        with contextlib.suppress(OSError):  # not empty, or not there: then it is not the lab's to remove
            folder.rmdir()


def power_cut(host: Host) -> None:
    """All that runs there ends at once, and its files stay, with what a machine's cache would have lost."""
    if not host.init_pid():
        raise LabError(f"{host.name} has no power: scripts/lab boot {host.name}", 4)
    groups = end([host])
    wait_for(f"the link of {host.name} did not go", STOP_SECONDS, partial(is_unplugged, host))
    for group in groups:
        remove_cgroup(group)
    release_loops(host.folder)


def end(hosts: Sequence[Host]) -> list[Path]:
    """All that runs on these hosts, and all of one at once: nothing is to notice the end of another.

    Returns the control groups that it was in.
    """
    frozen: list[int] = []
    for host in hosts:
        if pid := host.init_pid():
            frozen += opened_file_systems(pid)
            os.kill(pid, signal.SIGKILL)
    for descriptor in frozen:
        # An ext4 that is unmounted frozen keeps its loop device, and a task that waits to write does not die.
        with contextlib.suppress(OSError):  # it was not frozen
            fcntl.ioctl(descriptor, FITHAW, 0)
        os.close(descriptor)
    groups = cgroups({f"migrator-{host.name}" for host in hosts})
    end_processes(groups)
    for host in hosts:
        wait_for(f"the init of {host.name} did not end", STOP_SECONDS, partial(is_gone, host))
    return groups


def is_gone(host: Host) -> bool:
    return not host.init_pid()


def is_detached(backing_file: Path) -> bool:
    return not backing_file.exists()


def is_unplugged(host: Host) -> bool:
    """Whether its end at the switch has gone with the other end."""
    show = ["ip", "-n", SWITCH, "link", "show", host.name]
    return subprocess.run(show, capture_output=True, check=False).returncode != 0


def opened_file_systems(init: int) -> list[int]:
    """Descriptors of what a host has mounted from loop devices."""
    mounts = Path(f"/proc/{init}/mounts").read_text().splitlines()
    places = [folder for device, folder in (line.split()[:2] for line in mounts) if device.startswith("/dev/loop")]
    return [os.open(f"/proc/{init}/root{place}", os.O_RDONLY | os.O_DIRECTORY) for place in places]


def cgroups(wanted: Collection[str]) -> list[Path]:
    """The cgroups of these names, in every hierarchy."""
    found = []
    for folder, names, _ in os.walk(CGROUPS):
        ours = [name for name in names if name in wanted]
        found += [Path(folder, name) for name in ours]
        names[:] = [name for name in names if name not in ours]
    return found


def end_processes(groups: list[Path]) -> None:
    """Kill what is left in these cgroups, and thaw them, which is when a frozen process takes the signal."""
    folders = [Path(folder) for group in groups for folder, _, _ in os.walk(group)]

    def none_left() -> bool:
        present = [folder for folder in folders if folder.exists()]
        pids = {int(pid) for folder in present for pid in (folder / "cgroup.procs").read_text().split()}
        for pid in pids - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in folders:
            for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                if (folder / name).exists():
                    (folder / name).write_text(thawed)
        return not pids

    wait_for("processes are left in the lab's cgroups", STOP_SECONDS, none_left)


def remove_cgroup(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):

        def gone(folder: Path = Path(folder)) -> bool:
            try:
                folder.rmdir()
            except FileNotFoundError:
                return True
            except OSError:  # busy until its last process is reaped
                return False
            return True

        wait_for(f"{folder} is still in use", STOP_SECONDS, gone)


def stop_proxy() -> None:
    try:
        pid = int((STATE / "proxy.pid").read_text())
        ours = b"labkit/proxy" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return
    if ours:
        os.kill(pid, signal.SIGKILL)


def release_loops(top: Path) -> None:
    """Detach the loop devices whose backing files are in this folder, or in a file system on such a device."""
    for device in reversed(list(lab_loops(top))):
        backing = Path("/sys/block", Path(device).name, "loop/backing_file")
        if (backing.parent / "autoclear").read_text().strip() == "1":
            # Asked to before, and still in use by what no process shows: it goes with its last user, or a reboot.
            print(f"lab: {device} of an earlier lab is still in use; left alone", file=sys.stderr)
            continue
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
        deadline = time.monotonic() + 2
        while backing.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if backing.exists():
            thaw_lost(device)
            wait_for(f"{device} is still attached", STOP_SECONDS, partial(is_detached, backing))


def lab_loops(top: Path) -> Iterator[str]:
    """Outer devices first: those on a file in the folder, then those on files inside such a one."""
    listing = subprocess.run(
        ["losetup", "--list", "--json", "--output", "NAME,BACK-INO,BACK-MAJ:MIN,MAJ:MIN,BACK-FILE"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loops = json.loads(listing)["loopdevices"] if listing.strip() else []
    files = set()
    for folder, _, names in os.walk(top):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = Path(folder, name).lstat()
                files.add((f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}", found.st_ino))
    state_device = top.stat().st_dev if top.exists() else -1
    state_device_name = f"{os.major(state_device)}:{os.minor(state_device)}" if files else ""
    ours: set[str] = set()
    for _ in loops:  # each pass goes one level deeper
        for loop in loops:
            backing = loop["back-maj:min"].strip()
            # A host sees its folder as /var/lib/migrator, and that is the name the kernel has for it once deleted.
            deleted = loop["back-file"].endswith("(deleted)") and "/var/lib/migrator/" in loop["back-file"]
            mine = (
                (backing, loop["back-ino"]) in files
                or backing in ours
                or (deleted and backing == state_device_name and top == STATE)
            )
            if mine and loop["maj:min"].strip() not in ours:
                ours.add(loop["maj:min"].strip())
                yield loop["name"]


def thaw_lost(device: str) -> None:
    """A file system unmounted while frozen comes back by a mount; thawed, it lets go of its device."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", device, folder], capture_output=True, check=False).returncode == 0:
            subprocess.run(["fsfreeze", "--unfreeze", folder], capture_output=True, check=False)
            subprocess.run(["umount", folder], check=True)
    subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
