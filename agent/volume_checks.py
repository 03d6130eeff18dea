"""Whether volumes' file systems are whole, found on clones: the volumes are not touched, and may be in use.

A repair, too, is made on a clone, which takes the volume's place when it is whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.assembly import volume_name
from agent.container_records import Record, State
from agent.containers import Containers
from agent.images import Images
from agent.snapshots import SnapshotKeeper
from agent.tarball import Cancel
from blockdev import check, live_clone, reflink, tracker
from blockdev.bpf_tracker import BpfTracker
from blockdev.errors import BlockError
from blockdev.live_clone import Source
from blockdev.volume import VolumeStore
from migrator import faults
from migrator.errors import NotFound, Precondition

Report = Callable[[str], None]

log = structlog.get_logger()


@dataclass(frozen=True)
class Checked:
    """What became of one volume; `problem` is what was found, empty if nothing was."""

    container: str
    mount_point: str
    filesystem: str
    problem: str
    repaired: bool = False


class VolumeChecks:
    """Checks and repairs of containers' volumes."""

    def __init__(self, store: VolumeStore, containers: Containers, snapshots: SnapshotKeeper, images: Images) -> None:
        self._store = store
        self._containers = containers
        self._snapshots = snapshots
        self._images = images

    def check(self, container: str, mount_point: str, report: Report, cancel: Cancel) -> list[Checked]:
        """Each volume, or the one that is mounted there. The container is held only for a moment, and may run.

        Raises NotFound, Busy, ExecutionError, BlockError, OSError; Cancelled.
        """
        with self._images.staging() as folder, self._images.mount_point(folder.name) as at:
            with self._containers.hold(container, "its volumes are being checked"):
                record = self._record(container)
                chosen = _chosen(record, mount_point)
                clones = self._cloned(record, chosen, folder, cancel)
            found = []
            for index, clone in zip(chosen, clones, strict=True):
                volume = record.spec.volumes[index]
                report(f"checking the {volume.filesystem} of {container}:{volume.mount_point}")
                problem = check.damage(clone, volume.filesystem, at, cancel.covering)
                cancel.check()
                found.append(Checked(container, volume.mount_point, volume.filesystem, problem))
            return found

    def repair(self, container: str, mount_point: str, report: Report, cancel: Cancel) -> list[Checked]:
        """As `check`, and what is damaged is repaired; the container is stopped, and held to the end.

        A volume that cannot be repaired stays as it was. Also raises Precondition (RUNNING).
        """
        with (
            self._images.staging() as folder,
            self._images.mount_point(folder.name) as at,
            self._containers.hold(container, "its volumes are being repaired"),
        ):
            record = self._record(container)
            if record.state.is_live:
                raise Precondition(
                    f"container {container} is {record.state}: stop it first, or check it without --repair",
                    reason="RUNNING",
                )
            chosen = _chosen(record, mount_point)
            clones = self._cloned(record, chosen, folder, cancel)
            return [
                self._repaired(record, index, clone, at, report, cancel)
                for index, clone in zip(chosen, clones, strict=True)
            ]

    # Inside

    def _repaired(self, record: Record, index: int, clone: Path, at: Path, report: Report, cancel: Cancel) -> Checked:
        kind, mount_point = record.spec.volumes[index].filesystem, record.spec.volumes[index].mount_point
        report(f"checking the {kind} of {record.name}:{mount_point}")
        problem = check.damage(clone, kind, at, cancel.covering)
        cancel.check()
        if not problem:
            return Checked(record.name, mount_point, kind, "")
        report(f"repairing the {kind} of {record.name}:{mount_point}")
        try:
            check.repair(clone, kind, at, cancel.covering)
            left = check.damage(clone, kind, at, cancel.covering)
        except BlockError as error:
            left = str(error)
        cancel.check()
        if left:
            return Checked(record.name, mount_point, kind, f"{problem}; it stays as it was, since {left}")
        faults.point("volume.repaired")
        self._store.replace(volume_name(record.name, index), clone)
        log.warning("volume was repaired", container=record.name, mount_point=mount_point, damage=problem)
        return Checked(record.name, mount_point, kind, problem, repaired=True)

    def _record(self, container: str) -> Record:
        self._containers.record(container).refuse("check the volumes of", State.ARRIVING)
        # A rollback that was interrupted comes first.
        return self._snapshots.settle(container)

    def _cloned(self, record: Record, chosen: Sequence[int], folder: Path, cancel: Cancel) -> list[Path]:
        images = [self._store.open(volume_name(record.name, index)).path for index in chosen]
        clones = [folder / image.name for image in images]
        if record.state.is_live:
            mounted = self._containers.mounted_volumes(record.name)
            sources = [
                Source(image, mounted[index], clone) for index, image, clone in zip(chosen, images, clones, strict=True)
            ]
            live_clone.clone(sources, BpfTracker if tracker.probe() is None else None, cancel.check)
        else:
            for image, clone in zip(images, clones, strict=True):
                reflink.clone(image, clone)
        return clones


def _chosen(record: Record, mount_point: str) -> list[int]:
    points = [volume.mount_point for volume in record.spec.volumes]
    if mount_point and mount_point not in points:
        raise NotFound(
            f"container {record.name} has no volume at {mount_point}: it has {', '.join(points)}",
            reason="VOLUME_NOT_FOUND",
        )
    return [index for index, point in enumerate(points) if mount_point in ("", point)]
