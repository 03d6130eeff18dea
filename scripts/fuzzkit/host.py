"""A destination in a folder: an agent's own checks, stores and records, and no kernel beneath them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent import admission
from agent.arriving_snapshots import ArrivingSnapshots
from agent.assembly import volume_name
from agent.config import Config
from agent.journal import Incomings
from agent.managers import migration_folder
from agent.snapshots import SnapshotKeeper
from blockdev.blocks import Piece
from blockdev.volume import VolumeStore
from migrator.fill import missing
from migrator.network import Neighbour
from migrator.shm.store import SharedStore
from migrator.source import FEATURES
from migrator.v1 import container_pb2, peer_pb2


class FolderReservation:
    """A container on its way into the folder (`migrator.ports.Reservation`)."""

    def __init__(
        self, config: Config, volumes: VolumeStore, keeper: SnapshotKeeper, request: peer_pb2.PrepareRequest
    ) -> None:
        self._config = config
        self._store = volumes
        self._request = request
        self._folder = migration_folder(config, request.migration)
        self._bundle = config.state_dir / "containers" / request.container
        self._keeper = keeper
        self._snapshots = ArrivingSnapshots(keeper, request)
        self._held = False
        self.has_base = False
        self.shared = SharedStore()

    @property
    def volumes(self) -> Sequence[Path]:
        names = [volume_name(self._request.container, index) for index in range(len(self._request.spec.volumes))]
        return [self._store.open(name).path for name in names]

    @property
    def images(self) -> Path:
        return self._folder / "images"

    @property
    def memory(self) -> Path:
        return self._folder / "memory"

    @property
    def log(self) -> Path:
        return self._bundle / "log"

    def reserve(self) -> None:
        """Everything that is a file of it."""
        for folder in (self._bundle, self.images, self.memory):
            folder.mkdir(parents=True)
        for index, volume in enumerate(self._request.spec.volumes):
            self._store.receive(volume_name(self._request.container, index), volume.size_bytes, volume.filesystem)

    def warm_up(self) -> None:
        pass

    def write_snapshot(self, name: str, piece: Piece) -> None:
        self._snapshots.write(name, piece)

    def keep_snapshots(self) -> None:
        sizes = (volume.size_bytes for volume in self._request.spec.volumes)
        self._snapshots.keep(list(zip(self.volumes, sizes, strict=True)))

    def hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        pass

    def mount(self) -> None:
        pass

    def amend_images(self) -> None:
        pass

    def restore(self) -> Mapping[str, float]:
        self._held = True
        return {"restore": 1.0}

    def is_held(self) -> bool:
        return self._held

    def complete(self) -> Mapping[str, float]:
        return {"resume": 1.0}

    def run(self) -> Mapping[str, float]:
        return {"thaw": 1.0}

    def missing_bytes(self) -> int:
        return missing.left_bytes(self.memory)

    def lose(self, why: str) -> None:
        pass

    def settle(self) -> bool:
        """Gone as soon as it is here, so that the folder stays small."""
        self.discard()
        return True

    def give_up(self) -> None:
        pass

    def discard(self) -> None:
        self.shared.close()
        self._snapshots.close()
        self._keeper.delete_all(self._request.container)
        for index in range(len(self._request.spec.volumes)):
            self._store.delete(volume_name(self._request.container, index))
        for folder in (self._folder, self._bundle):
            shutil.rmtree(folder, ignore_errors=True)
        self._held = False


class FolderHost:
    """The host that they come to (`migrator.ports.ArrivalHost`)."""

    def __init__(self, config: Config, volumes: VolumeStore, keeper: SnapshotKeeper, incomings: Incomings) -> None:
        self._config = config
        self._volumes = volumes
        self._keeper = keeper
        self._incomings = incomings

    def examine(self, source: str, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        admission.check_container(self._config, request.container, request.spec)
        return peer_pb2.ExamineResponse(
            host=self._config.host, features=FEATURES, last_epoch=self._incomings.last_epoch(request.container)
        )

    def check(self, request: peer_pb2.PrepareRequest) -> None:
        admission.check(self._config, request)

    def reserve(self, request: peer_pb2.PrepareRequest) -> FolderReservation:
        made = FolderReservation(self._config, self._volumes, self._keeper, request)
        try:
            made.reserve()
        except BaseException:
            made.discard()
            raise
        return made

    def reserved(self, migration: str, container: str) -> tuple[FolderReservation, "container_pb2.ContainerState"]:
        request = peer_pb2.PrepareRequest(
            migration=migration, container=container, state=container_pb2.CONTAINER_STATE_STOPPED
        )
        return FolderReservation(self._config, self._volumes, self._keeper, request), request.state
