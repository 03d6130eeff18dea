"""The memory of an arriving container: where its pages wait, and the fill that maps them in while it runs."""

import os
import subprocess
from pathlib import Path

import structlog

from agent.processes import Process, note
from blockdev import filesystem, kernel
from migrator.errors import ExecutionError
from migrator.fill import criu_socket, launch, missing
from migrator.fill import images as fill_images
from migrator.fill.cgroups import end_lost
from migrator.fill.keeper import Places
from migrator.fill.status import State, Status, has_finished, is_held

# Beside the pages: what is sent twice before it is known to be gone, and the file system's own.
SLACK_PART = 1.25
SLACK_BYTES = 256 << 20
# CRIU's images, with deleted files that are open, each of up to 1 GiB, and what is in /dev/shm.
IMAGES_BYTES = 2 << 30
END_S = 5.0
_MOUNT_FLAGS = 2 | 4 | 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC of mount(2)

log = structlog.get_logger()


class ArrivingMemory:
    """A tmpfs of its own, since the run folder's may be small, and a fill; repeatable throughout.

    `work` is where CRIU looks for the fill's socket. `cgroup` holds the container's processes. CRIU's images are in the
    store, too, and refer to the pages (`migrator.fill.images`).
    """

    def __init__(self, folder: Path, work: Path, cgroup: Path) -> None:
        self.store = folder / "memory"
        self.images = self.store / "images"
        self._places = Places(self.images, self.store, work, folder / "fill.json", [cgroup])
        self._process = folder / "fill.pid"
        self._launched: subprocess.Popen[bytes] | None = None

    def mount(self, memory_bytes: int) -> None:
        """Make room for so much. Raises OSError."""
        self.store.mkdir(mode=0o700)
        size = int(memory_bytes * SLACK_PART) + SLACK_BYTES + IMAGES_BYTES
        kernel.mount("migrator", self.store, "tmpfs", _MOUNT_FLAGS, f"size={size},mode=0700")

    def launch(self) -> None:
        """Start the fill: CRIU may restore then."""
        self._launched = launch.launch(self._places, lambda pid: note(pid, self._process))

    def prepare(self) -> None:
        """Amend CRIU's images: what the fill maps is left out of the restore, and the rest is in the store."""
        fill_images.prepare(self._places.images, self.store)

    def is_filled(self) -> bool:
        """Whether nothing more is to be mapped. A container whose fill failed has been killed by it."""
        held = is_held(self._places.status)
        status = Status.read(self._places.status)
        if not held and status.state not in (State.STARTING, State.DONE, State.FAILED):
            if has_finished(self._places.status):
                return True
            reason = end_lost(self._places.cgroups, "the fill was lost: all of its processes ended")
            status = Status(State.FAILED, reason=reason)
            status.write(self._places.status)
        if status.state is State.FAILED:
            log.error("memory fill", reason=status.reason)
        return status.state in (State.STARTING, State.DONE, State.FAILED)

    def missing_bytes(self) -> int:
        """What was left at the source and has not come yet; what nobody waits for any more is not missing."""
        left = missing.left_bytes(self.store)
        return left if left and Status.read(self._places.status).state not in (State.DONE, State.FAILED) else 0

    def lose(self, why: str) -> None:
        """Kill the container: the fill ends with its last process."""
        log.error("memory fill", reason=end_lost(self._places.cgroups, why))

    def discard(self) -> None:
        """End the fill of a container that is gone, and give the pages back."""
        process = Process.noted(self._process)
        if process is not None and process.is_alive():
            process.signal(15)
            if not process.wait(END_S):
                process.signal(9)
                process.wait(END_S)
        self.release()

    def unmount(self) -> None:
        """Give the store's memory back; repeatable."""
        while os.path.ismount(self.store):
            filesystem.unmount(self.store)

    def release(self) -> None:
        """Give the pages back; the fill has ended."""
        if self._launched is not None:
            try:
                self._launched.wait(END_S)
            except subprocess.TimeoutExpired as error:
                raise ExecutionError("the memory fill does not end") from error
        self.unmount()
        for left in (launch.LOG, criu_socket.NAME):
            (self._places.work / left).unlink(missing_ok=True)
