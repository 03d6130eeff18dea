"""Making the lab: the switch, the client, the hosts with their certificates and configuration."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from labkit import agent, remove, switch
from labkit.hosts import CHECKOUT, CLIENT, LAB_FILE, MOUNT_POINTS, PATH, STATE, SWITCH, Host, LabError, ip, wait_for

AGENT_PORT, PROXY_PORT = 7440, 3128
START_SECONDS = 10.0

CONFIG = """\
host = "{host.name}"
state_dir = "/var/lib/migrator"
run_dir = "/run/migrator"
cache_dir = "/var/cache/migrator"
cgroup_parent = "migrator-{host.name}"
pool_size = "20GiB"

[listen]
address = "{host.address}:{port}"

[tls]
ca = "/etc/migrator/ca.crt"
certificate = "/etc/migrator/host.crt"
key = "/etc/migrator/host.key"

[network]
bridge = "br0"
ipv4_pool = "10.77.{pool}.0/24"
ipv4_prefix = 16
ipv4_gateway = "10.77.0.1"
ipv6_pool = "fd77::{pool:x}:0/112"
ipv6_prefix = 64

[peers]
{peers}
"""


@contextlib.contextmanager
def locked() -> Iterator[None]:
    with Path("/run/lock/migrator-lab").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(count: int) -> None:
    if not 1 <= count <= remove.HOSTS_MAX:
        raise LabError(f"--hosts must be 1 to {remove.HOSTS_MAX}, not {count}", 2)
    hosts = [Host(index) for index in range(1, count + 1)]
    with locked():
        alive = [name for name in map(Host, range(1, remove.HOSTS_MAX + 1)) if name.init_pid()]
        if LAB_FILE.exists() and alive:
            raise LabError(f"the lab is up already, with {len(alive)} hosts: scripts/lab down first", 2)
        remove.remove()
        try:
            make(hosts)
        except BaseException:
            keep_logs(hosts)
            remove.remove()
            raise
    print(f"lab: up, with {', '.join(f'{host.name} {host.address}' for host in hosts)} and the client 10.77.0.1")


def down() -> None:
    with locked():
        remove.remove()
    print("lab: down")


def make(hosts: list[Host]) -> None:
    for folder in (*MOUNT_POINTS, Path("/var/cache/migrator"), STATE):
        folder.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o700)
    switch.make(SWITCH, CLIENT, "10.77.0.1")
    start_proxy()
    make_certificates(hosts)
    for host in hosts:
        make_folder(host, hosts)
        start_host(host)
    LAB_FILE.write_text(json.dumps({"hosts": len(hosts)}))
    for host in hosts:
        agent.launch(host)
    for host in hosts:
        agent.wait_until_it_answers(host)


def boot(host: Host) -> None:
    """Start a host that has no power, and its agent."""
    if host.init_pid():
        raise LabError(f"{host.name} is running already", 2)
    start_host(host)
    agent.start(host)


def start_proxy() -> None:
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter = ["nsenter", f"--net=/run/netns/{CLIENT}", "--"]
    program = [str(CHECKOUT / "scripts/labkit/proxy"), "10.77.0.1", str(PROXY_PORT), str(outside)]
    try:
        with (STATE / "proxy.log").open("w") as log:
            proxy = subprocess.Popen(
                [*enter, *program],
                pass_fds=[outside],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    finally:
        os.close(outside)
    (STATE / "proxy.pid").write_text(str(proxy.pid))


def make_certificates(hosts: list[Host]) -> None:
    folder = str(STATE / "pki")

    def cert(*arguments: str) -> None:
        done = subprocess.run(
            [str(CHECKOUT / ".venv/bin/migrator"), "cert", *arguments],
            env={"PATH": PATH, "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LabError(f"migrator cert {' '.join(arguments)}: {done.stderr.strip()}")

    cert("init", folder)
    for host in hosts:
        cert("issue", folder, host.name, "--role", "peer", "--address", host.address)
    cert("issue", folder, "operator", "--role", "operator")


def make_folder(host: Host, hosts: list[Host]) -> None:
    """Everything of the host's that is a file: state, configuration, certificates, names."""
    etc = host.folder / "etc"
    (host.folder / "lib").mkdir(parents=True)
    etc.mkdir()
    peers = "\n".join(f'{peer.name} = "{peer.address}:{AGENT_PORT}"' for peer in hosts if peer is not host)
    config = CONFIG.format(host=host, port=AGENT_PORT, pool=10 + host.index, peers=peers)
    (etc / "config.toml").write_text(config)
    for source, target in (("ca.crt", "ca.crt"), (f"{host.name}.crt", "host.crt"), (f"{host.name}.key", "host.key")):
        shutil.copy(STATE / "pki" / source, etc / target)
    (host.folder / "hostname").write_text(f"{host.name}\n")
    names = [("127.0.0.1", "localhost"), ("10.77.0.1", "client"), *((peer.address, peer.name) for peer in hosts)]
    (host.folder / "hosts").write_text("".join(f"{address}\t{name}\n" for address, name in names))
    shutil.copytree("/etc/apt/apt.conf.d", host.folder / "apt.conf.d")
    proxy = f'Acquire::http::Proxy "http://10.77.0.1:{PROXY_PORT}";\nAcquire::https::Proxy "http://10.77.0.1:{PROXY_PORT}";\n'
    (host.folder / "apt.conf.d/99migrator-lab").write_text(proxy)


def start_host(host: Host) -> None:
    unshare = ["unshare", "--fork", "--pid", "--mount", "--net", "--uts", "--ipc", "--propagation=private"]
    with (host.folder / "init.log").open("w") as log:
        starter = subprocess.Popen(
            [*unshare, str(CHECKOUT / "scripts/labkit/host-init"), host.name, str(host.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )

    def started() -> bool:
        if starter.poll() is not None:
            raise LabError(f"{host.name} did not start: {(host.folder / 'init.log').read_text().strip()}")
        return host.init_pid() != 0

    wait_for(f"{host.name} did not start", START_SECONDS, started)
    connect(host)


def connect(host: Host) -> None:
    """A bridge of the host's own, with its address, and the host's uplink as a port of it."""
    pid = host.init_pid()
    switch.settle_addresses_at_once(["nsenter", f"--target={pid}", "--net"])
    ip(
        f"""\
link add {host.name} type veth peer name eth0 address 02:77:02:00:00:{host.index:02x} netns {pid}
link set {host.name} addrgenmode none master switch up
""",
        SWITCH,
    )
    batch = f"""\
link set lo up
link add br0 address 02:77:01:00:00:{host.index:02x} type bridge mcast_snooping 0 stp_state 0 forward_delay 0
link set eth0 addrgenmode none master br0 up
address add {host.address}/16 dev br0
address add {host.address6}/64 dev br0
link set br0 up
route add default via 10.77.0.1
"""
    enter = ["nsenter", f"--target={pid}", "--net", "ip", "-batch", "-"]
    subprocess.run(enter, input=batch, text=True, check=True)


def keep_logs(hosts: list[Host]) -> None:
    """What the agents said, for whoever reads why `up` failed: the state folder goes."""
    for host in hosts:
        if host.log.exists():
            shutil.copy(host.log, f"/tmp/migrator-lab-{host.name}.log")
