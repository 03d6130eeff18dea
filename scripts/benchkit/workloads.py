"""What is moved: containers that do nothing, write memory, write disk, or serve; each under a name."""

from dataclasses import dataclass, replace
from typing import Literal

PORT, REDIS_PORT, POSTGRES_PORT = 7000, 6379, 5432
DISK_FILE = "/data/blocks"
GIB_MIB = 1024

POSTGRES = """\
cd /var/lib/postgresql
printf 'local all all trust\\nhost all all all trust\\n' >/tmp/hba.conf
exec /usr/lib/postgresql/15/bin/postgres -D /var/lib/postgresql/15/main \
    -c config_file=/etc/postgresql/15/main/postgresql.conf -c hba_file=/tmp/hba.conf -c ssl=off \
    -c listen_addresses='*' -c unix_socket_directories=/tmp -c shared_buffers=128MB -c external_pid_file= \
    -c jit=off </dev/null >/dev/null 2>&1
"""
REDIS = "exec redis-server --bind 0.0.0.0 --protected-mode no --save '' --enable-debug-command yes --logfile '' \
    </dev/null >/dev/null 2>&1"


@dataclass(frozen=True)
class Workload:
    """One container and the load on it. Rates are MB/s of pages or blocks of 4 KiB written at random."""

    name: str
    memory_mib: int = 16
    rate_mbs: int = 0
    share_percent: int = 100
    processes: int = 1
    disk_gib: int = 1
    disk_rate_mbs: int = 0
    disk_span_mib: int = 0
    connections: int = 1
    service: Literal["workload", "redis", "postgres"] = "workload"
    # Of Redis: more than the client that asks and writes 5,000 times in a second.
    full_load: bool = False
    shape: str = ""

    @property
    def image(self) -> str:
        """Of which the container is made: the workload alone, or a Debian with the service."""
        return self.service

    def command(self) -> list[str]:
        """What the container runs."""
        if self.service == "redis":
            return ["sh", "-c", REDIS]
        if self.service == "postgres":
            return ["sh", "-c", POSTGRES]
        words = ["/bin/workload", "--port", str(PORT), "--memory", str(self.memory_mib), "--seed", "1"]
        words += ["--rate", str(self.rate_mbs), "--share", str(self.share_percent), "--processes", str(self.processes)]
        if self.disk_span_mib:
            words += ["--disk", DISK_FILE, "--span", str(self.disk_span_mib)]
            words += ["--disk-rate", str(self.disk_rate_mbs)]
        return words

    def flows(self, address: str) -> list[str]:
        """What the client asks; the first is the one whose longest gap is the pause."""
        if self.service == "redis":
            return [f"redis:{address}:{REDIS_PORT}"]
        if self.service == "postgres":
            return [f"postgres:{address}:{POSTGRES_PORT}"]
        return [f"tcp:{address}:{PORT}"] * self.connections + [f"udp:{address}:{PORT}"]

    @property
    def least_bytes(self) -> int:
        """What has to be moved at the least, memory and disk."""
        return self.memory_bytes + (self.disk_span_mib << 20)

    @property
    def memory_bytes(self) -> int:
        """What has to be moved of memory at the least; of services, what they were filled with."""
        return (self.memory_mib << 20) + (self.processes - 1) * (256 << 10)


def _idle(name: str, memory_mib: int) -> Workload:
    return Workload(name, memory_mib=memory_mib)


def _writers() -> list[Workload]:
    return [
        Workload(f"write-{rate}mbs-{share}pc", memory_mib=GIB_MIB, rate_mbs=rate, share_percent=share)
        for rate in (10, 100, 500, 2000)
        for share in (5, 25, 100)
    ]


GROWTH = {f"write-50mbs-{size}": memory for size, memory in (("256m", 256), ("1g", GIB_MIB), ("4g", 4 * GIB_MIB))}
ONE_GIB_WRITER = "write-100mbs-25pc"
BUSY_WRITER = "write-500mbs-25pc"

_PLAIN = [
    _idle("idle-16m", 16),
    _idle("idle-256m", 256),
    _idle("idle-1g", GIB_MIB),
    _idle("idle-4g", 4 * GIB_MIB),
    *_writers(),
    *(Workload(name, memory_mib=memory, rate_mbs=50) for name, memory in GROWTH.items()),
    Workload("redis-1g", memory_mib=GIB_MIB, service="redis", disk_gib=2),
    Workload("redis-1g-full-load", memory_mib=GIB_MIB, service="redis", disk_gib=2, full_load=True),
    Workload("postgres", memory_mib=160, service="postgres", disk_gib=3),
    Workload("fsync", disk_span_mib=64, disk_rate_mbs=4),
    *(Workload(f"disk-{size}g", disk_gib=size, disk_span_mib=256, disk_rate_mbs=20) for size in (1, 10, 50)),
    *(Workload(f"tree-{count}", processes=count) for count in (16, 64, 256)),
    Workload("connections-200", connections=200),
]
_SHAPED = [
    replace(workload, name=f"{workload.name}-{rate}", shape=rate)
    for workload in _PLAIN
    if workload.name in ("idle-1g", ONE_GIB_WRITER)
    for rate in ("10gbit", "1gbit")
]
WORKLOADS = {workload.name: workload for workload in [*_PLAIN, *_SHAPED]}
