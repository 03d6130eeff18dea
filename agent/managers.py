"""What an agent consists of, for those parts that need several of the others."""

from dataclasses import dataclass
from pathlib import Path

from agent.assembly import Assembly
from agent.config import Config
from agent.containers import Containers
from agent.database import Database
from agent.images import Images
from agent.network import Networks
from agent.runtime import Runtime
from agent.snapshots import SnapshotKeeper
from blockdev.volume import VolumeStore
from migrator.pageless import Pageless
from migrator.smaps import Smaps


@dataclass(frozen=True)
class Managers:
    """One of each. `config_file` is where `config` came from, for processes that are started beside the agent."""

    config: Config
    config_file: Path
    database: Database
    runtime: Runtime
    volumes: VolumeStore
    images: Images
    networks: Networks
    assembly: Assembly
    containers: Containers
    snapshots: SnapshotKeeper
    # None where CRIU cannot be kept from dumping memory.
    pageless: Pageless | None
    # None where CRIU has to read the kernel's.
    smaps: Smaps | None

    def migration_folder(self, migration: str) -> Path:
        """Where one migration keeps what is gone after a reboot: CRIU's images, pipes."""
        return migration_folder(self.config, migration)


def migration_folder(config: Config, migration: str) -> Path:
    """As `Managers.migration_folder`, for a process that has no managers."""
    return config.run_dir / "migrations" / migration
