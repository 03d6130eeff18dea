"""`python -m fuzzkit.server FOLDER`: an agent's PeerService over mutual TLS, on a destination in a folder.

It prints its port, and ends with its standard input. Certificates are in FOLDER/ca, its state in FOLDER/state.
"""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import structlog

from agent import config as configuration
from agent import handshakes, journal, migrations, snapshot_records
from agent.config import Config
from agent.database import Database
from agent.journal import Incomings
from agent.managers import Managers
from agent.migrations import Migrations
from agent.periodic import Periodic
from agent.server import Servers, Service
from agent.services.migrations import MigrationService
from agent.services.peer import PeerService
from agent.snapshots import SnapshotKeeper
from blockdev import reflink
from blockdev.volume import VolumeStore
from fuzzkit.host import FolderHost
from migrator import certificates
from migrator.arrivals import Arrivals
from migrator.errors import Unreachable
from migrator.handover import Incoming
from migrator.postcopy import Lent, Requests
from migrator.source import Here
from migrator.v1 import migration_pb2_grpc, peer_pb2, peer_pb2_grpc

HOST = "host-a"
# Those that it knows, and one that it does not.
PEERS = ("host-b", "host-c")
STRANGER = "host-x"
LOG = "server.log"
TEND_S = 0.5
# More than the fuzzers have under way: those that wait are few.
PLACES = 32


def make_certificates(folder: Path) -> None:
    """FOLDER/ca: for the server, its peers, a stranger with the same role, an operator and a viewer."""
    certificates.init(folder / "ca")
    for name in (HOST, *PEERS, STRANGER):
        certificates.issue(folder / "ca", name, "peer")
    for role in ("operator", "viewer"):
        certificates.issue(folder / "ca", role, role)


def config_of(folder: Path) -> Config:
    """As an agent would read it."""
    tls = {"ca": "ca.crt", "certificate": f"{HOST}.crt", "key": f"{HOST}.key"}
    return configuration.parse(
        {
            "host": HOST,
            "state_dir": str(folder / "state"),
            "run_dir": str(folder / "state/run"),
            "tls": {key: str(folder / "ca" / name) for key, name in tls.items()},
            "peers": {name: f"{name}:7440" for name in PEERS},
        }
    )


def make_servers(folder: Path, resources: ExitStack) -> Servers:
    """Not started yet; what has to be closed is in `resources`."""
    config = config_of(folder)
    config.state_dir.mkdir(exist_ok=True)
    database = Database(config.database, [journal.SCHEMA, migrations.SCHEMA, snapshot_records.SCHEMA])
    resources.callback(database.close)
    # No power is cut here, and thousands of migrations begin.
    database.rows("PRAGMA synchronous=OFF")
    incomings = Incomings(database)
    volumes = VolumeStore(config.state_dir / "volumes")
    # Of what is left out here a message only reaches the records.
    keeper = SnapshotKeeper(database, cast(Any, None), volumes, config.state_dir / "snapshots")
    host = FolderHost(config, volumes, keeper, incomings)
    arrivals = Arrivals(host, incomings, _lend_nothing, PLACES)
    leaving = Migrations(
        cast(Managers, SimpleNamespace(database=database, config=config)), Here(HOST, "6.18", (), "4.2")
    )
    peers = PeerService(host, arrivals, leaving, config.peers)
    tend = Periodic("arrivals", TEND_S, lambda: arrivals.tend(_ask_nobody))
    resources.callback(tend.close)
    migration = MigrationService(leaving, cast(Any, None))
    return Servers(
        [
            Service(
                "migrator.v1.PeerService",
                lambda server: peer_pb2_grpc.add_PeerServiceServicer_to_server(peers, server),
            ),
            Service(
                "migrator.v1.MigrationService",
                lambda server: migration_pb2_grpc.add_MigrationServiceServicer_to_server(migration, server),
            ),
        ]
    )


def _ask_nobody(record: Incoming) -> "peer_pb2.Decision":
    raise Unreachable(f"{record.source} is not asked here")


def _lend_nothing(record: Incoming, requests: Requests) -> Lent:
    raise Unreachable(f"{record.source} is not asked here")


def _copy(source: int, target: int) -> None:
    """For `reflink.clone_into` where the file system cannot: an agent's pool always can."""
    os.sendfile(target, source, 0, os.fstat(source).st_size)


def main(folder: Path) -> None:
    """Until standard input ends."""
    if not reflink.supported(folder):
        reflink.clone_into = _copy
    handshakes.watch()
    log = (folder / LOG).open("a", buffering=1)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(log),
    )
    with ExitStack() as resources:
        servers = make_servers(folder, resources)
        port = servers.listen_tls("127.0.0.1:0", config_of(folder).tls)
        servers.start()
        print(port, flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
