"""Everything an agent consists of, put together in the order in which one part needs the other."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import structlog

from agent import (
    allocator,
    arrival,
    container_records,
    examination,
    hosts,
    images,
    journal,
    migrations,
    room,
    snapshot_records,
    template,
)
from agent.assembly import Assembly
from agent.assignment import Assignment, Publisher
from agent.config import Config
from agent.containers import Containers
from agent.database import Database
from agent.handovers import Handovers
from agent.hosts import Hosts
from agent.images import Images
from agent.journal import Incomings
from agent.managers import Managers
from agent.migrations import Migrations
from agent.network import Networks
from agent.peers import PulledMemory, ask_destination, ask_source
from agent.periodic import Periodic
from agent.room import RoomGuard
from agent.runtime import Runtime, environment, find_program
from agent.salvage import tried
from agent.server import Service
from agent.services.containers import ContainerService
from agent.services.hosts import HostService
from agent.services.images import ImageService
from agent.services.migrations import MigrationService
from agent.services.peer import PeerService
from agent.services.snapshots import SnapshotService
from agent.services.volumes import VolumeService
from agent.snapshots import SnapshotKeeper, Snapshots
from agent.volume_checks import VolumeChecks
from agent.volumes import Volumes
from blockdev import pool
from blockdev.volume import VolumeStore
from migrator import pageless
from migrator.arrivals import Arrivals
from migrator.destination import FAILURES
from migrator.errors import MigratorError
from migrator.pageless import Pageless
from migrator.smaps import Smaps
from migrator.source import Here
from migrator.v1 import (
    container_pb2_grpc,
    host_pb2_grpc,
    image_pb2_grpc,
    migration_pb2_grpc,
    peer_pb2_grpc,
    snapshot_pb2_grpc,
    volume_pb2_grpc,
)

SCHEMAS = (
    container_records.SCHEMA,
    images.SCHEMA,
    journal.SCHEMA,
    migrations.SCHEMA,
    snapshot_records.SCHEMA,
    room.SCHEMA,
)
TEND_INTERVAL_S = 1.0
# What has passed through is given back while a move goes on, too: a second of it is some 60 MiB.
TIDY_INTERVAL_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Agent:
    """All parts, before anything is served. `recover` once, then serve `services`."""

    managers: Managers
    images: Images
    snapshots: Snapshots
    volumes: Volumes
    checks: VolumeChecks
    room: RoomGuard
    hosts: Hosts
    migrations: Migrations
    arrivals: Arrivals
    arrival_host: arrival.ArrivingHost
    incomings: Incomings

    def recover(self, resources: ExitStack) -> None:
        """Compare what should be with what is, and carry on what a former life had begun."""
        config = self.managers.config
        with tried("unfinished volumes"):
            self.managers.volumes.sweep()
        with tried("loop devices"):
            for name in self.managers.volumes.release():
                log.warning("released a loop device that was left", volume=name)
        with tried("unfinished images"):
            self.images.sweep()
        with tried("unfinished templates"):
            template.sweep(config.cache_dir)
        # First of all: a container whose migration is not finished must not be started again by its restart policy.
        self.migrations.claim()
        self.snapshots.recover()
        with tried("sizes of volumes"):
            self.volumes.recover()
        self.managers.containers.reconcile({record.container for record in self.incomings.unfinished()})
        self.arrivals.recover()
        self.migrations.recover()
        resources.callback(self.migrations.close)
        tend = Periodic("arrivals", TEND_INTERVAL_S, lambda: self.arrivals.tend(lambda r: ask_source(config, r)))
        resources.callback(tend.close)
        look = Periodic("room", room.LOOK_S, self.room.look)
        resources.callback(look.close)
        tidy = Periodic("allocator", TIDY_INTERVAL_S, allocator.give_back)
        resources.callback(tidy.close)

    def services(self) -> list[Service]:
        """What is served. A new service goes here, and its methods into `agent.auth.ROLES`."""
        managers = self.managers
        config = managers.config
        container = ContainerService(
            managers.containers, config.host, self.migrations.of, self.room, self.arrivals.missing_of
        )
        image = ImageService(self.images, config.cache_dir)
        host = HostService(self.hosts, config)
        snapshot = SnapshotService(self.snapshots)
        volume = VolumeService(self.volumes, self.checks)
        handovers = Handovers(
            config.host,
            managers.database,
            self.arrivals,
            managers.containers.record,
            lambda record: ask_destination(config, record),
            lambda record: ask_source(config, record),
        )
        migration = MigrationService(self.migrations, handovers)
        peer = PeerService(self.arrival_host, self.arrivals, self.migrations, config.peers)
        return [
            Service(
                "migrator.v1.ContainerService",
                lambda server: container_pb2_grpc.add_ContainerServiceServicer_to_server(container, server),
            ),
            Service(
                "migrator.v1.ImageService",
                lambda server: image_pb2_grpc.add_ImageServiceServicer_to_server(image, server),
            ),
            Service(
                "migrator.v1.SnapshotService",
                lambda server: snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(snapshot, server),
            ),
            Service(
                "migrator.v1.VolumeService",
                lambda server: volume_pb2_grpc.add_VolumeServiceServicer_to_server(volume, server),
            ),
            Service(
                "migrator.v1.HostService",
                lambda server: host_pb2_grpc.add_HostServiceServicer_to_server(host, server),
            ),
            Service(
                "migrator.v1.MigrationService",
                lambda server: migration_pb2_grpc.add_MigrationServiceServicer_to_server(migration, server),
            ),
            Service(
                "migrator.v1.PeerService",
                lambda server: peer_pb2_grpc.add_PeerServiceServicer_to_server(peer, server),
            ),
        ]


def assemble(config: Config, config_file: Path, resources: ExitStack) -> Agent:
    """Open the database, the pool and all managers; `resources` closes them. Containers are not touched."""
    for folder in (config.state_dir, config.cache_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    database = Database(config.database, SCHEMAS)
    resources.callback(database.close)
    # The pool stays mounted when the agent ends: containers run on it.
    folder = pool.ensure(config.state_dir, config.pool_size_bytes)
    log.info("pool", folder=str(folder))
    volumes = VolumeStore(folder / "volumes")
    runtime = Runtime(config.state_dir, config.run_dir, config.cgroup_parent)
    networks = Networks()
    resources.callback(networks.close)
    assembly = Assembly(runtime, volumes, networks, Publisher())
    image_store = Images(database, folder / "images", config.run_dir / "images")
    keeper = SnapshotKeeper(database, assembly, volumes, folder / "snapshots")
    containers = Containers(database, runtime, assembly, image_store, Assignment(config), keeper)
    resources.callback(containers.close)
    managers = Managers(
        config,
        config_file,
        database,
        runtime,
        volumes,
        image_store,
        networks,
        assembly,
        containers,
        keeper,
        find_pageless(config),
        find_smaps(resources),
    )
    here = Here(config.host, examination.kernel(), sorted(examination.cpu_flags()), hosts.criu_version())
    incomings = Incomings(database)
    arrival_host = arrival.ArrivingHost(managers, here, incomings)
    guard = RoomGuard(database, containers, folder)
    leaving = Migrations(managers, here, guard.pauses)
    guard.cancel_migration = leaving.cancel_of
    return Agent(
        managers=managers,
        images=image_store,
        snapshots=Snapshots(keeper, containers),
        volumes=Volumes(database, volumes, containers, keeper, image_store.staging),
        checks=VolumeChecks(volumes, containers, keeper, image_store),
        room=guard,
        hosts=Hosts(config, containers, folder, metadata.version("migrator")),
        migrations=leaving,
        arrivals=Arrivals(arrival_host, incomings, partial(PulledMemory, config), config.max_arrivals),
        arrival_host=arrival_host,
        incomings=incomings,
    )


def find_pageless(config: Config) -> Pageless | None:
    """Whether CRIU here can be kept from dumping memory; tried each time, since CRIU may have been replaced."""
    try:
        return pageless.probe(find_program("criu"), environment(), config.run_dir / "pageless")
    except MigratorError as error:
        log.warning("CRIU dumps all memory while a container stands still", reason=str(error))
        return None


def find_smaps(resources: ExitStack) -> Smaps | None:
    """Whether flags of mappings can be had here without a walk through all pages."""
    try:
        found = Smaps()
    except FAILURES as error:
        log.warning("CRIU has the kernel look through all memory while a container stands still", reason=str(error))
        return None
    resources.callback(found.close)
    return found
