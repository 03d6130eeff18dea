"""This host's facts, and its peers' as they answer now."""

import functools
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from agent import examination
from agent.config import Config
from agent.containers import Containers
from agent.peers import open_channel
from agent.runtime import find_program
from migrator import status
from migrator.errors import ExecutionError, MigratorError
from migrator.v1 import host_pb2, host_pb2_grpc
from migrator.wire import memory_available_bytes

ANSWER_S = 2.0
PROGRAM_S = 15.0


class Hosts:
    """The host itself and those that its configuration names."""

    def __init__(self, config: Config, containers: Containers, pool: Path, version: str) -> None:
        self._config = config
        self._containers = containers
        self._pool = pool
        self._version = version

    def here(self) -> host_pb2.Host:
        """This host."""
        records = self._containers.all()
        return host_pb2.Host(
            name=self._config.host,
            address=self._config.listen_address,
            reachable=True,
            version=self._version,
            kernel=examination.kernel(),
            criu_version=criu_version(),
            architecture=platform.machine(),
            cpu_flags=sorted(examination.cpu_flags()),
            memory_available_bytes=memory_available_bytes(),
            disk_available_bytes=shutil.disk_usage(self._pool).free,
            containers_running=sum(record.state.is_live for record in records),
            containers_total=len(records),
        )

    def all(self) -> list[host_pb2.Host]:
        """This host first, then every peer, asked now and side by side."""
        names = sorted(self._config.peers)
        if not names:
            return [self.here()]
        with ThreadPoolExecutor(len(names), thread_name_prefix="ask") as pool:
            return [self.here(), *pool.map(self._ask, names)]

    def _ask(self, name: str) -> host_pb2.Host:
        address = self._config.peers[name]
        try:
            with open_channel(self._config, name) as connection:
                stub = host_pb2_grpc.HostServiceStub(connection)
                host: host_pb2.Host = stub.GetHost(host_pb2.GetHostRequest(), timeout=ANSWER_S).host
        except grpc.RpcError as error:
            return host_pb2.Host(name=name, address=address, error=str(status.from_rpc(error, name)))
        except MigratorError as error:
            return host_pb2.Host(name=name, address=address, error=str(error))
        if host.name != name:
            return host_pb2.Host(
                name=name, address=address, error=f"the agent at {address} says that it is {host.name}"
            )
        host.address = address
        host.reachable = True
        return host


def criu_version() -> str:
    """Version of the CRIU that the agent uses; empty if there is none that starts."""
    try:
        program = Path(find_program("criu"))
        return _criu_version(program, program.stat().st_mtime_ns)
    except (ExecutionError, OSError, subprocess.TimeoutExpired):
        return ""


@functools.lru_cache(maxsize=1)
def _criu_version(program: Path, changed_ns: int) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    found = re.search(r"^Version: (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ""
