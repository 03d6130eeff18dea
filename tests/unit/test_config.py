"""The agent's configuration: what is understood, and what is refused with a hint."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import config
from migrator.errors import InvalidArgument

FULL = """
host = "host-a"
state_dir = "/srv/migrator"
cgroup_parent = "migrator-host-a"
pool_size = "1.5GiB"
[listen]
address = "10.77.1.1:7440"
[tls]
ca = "/etc/ca.crt"
[network]
bridge = "br7"
ipv4_pool = "10.77.11.0/24"
ipv4_prefix = 16
ipv4_gateway = "10.77.0.1"
ipv6_pool = "fd77::b:0/112"
[peers]
host-b = "10.77.1.2:7440"
"host-c.example" = "[fd77::3]:7440"
"""


def parse(text: str) -> config.Config:
    return config.parse(tomllib.loads(text))


def test_everything_is_read() -> None:
    found = parse(FULL)
    assert (found.host, found.state_dir, found.run_dir) == ("host-a", Path("/srv/migrator"), Path("/run/migrator"))
    assert found.pool_size_bytes == 3 << 29
    assert found.listen_address == "10.77.1.1:7440"
    assert (found.tls.ca, found.tls.key) == (Path("/etc/ca.crt"), Path("/etc/migrator/host.key"))
    assert (found.network.bridge, found.network.ipv4_prefix, found.network.ipv6_prefix) == ("br7", 16, 64)
    assert found.peers == {"host-b": "10.77.1.2:7440", "host-c.example": "[fd77::3]:7440"}


def test_the_example_is_understood() -> None:
    example = Path(__file__).parents[2] / "packaging/config.example.toml"
    assert config.load(example).host == "host-a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "host is missing"),
        ('host = "a"\npoolsize = "1GiB"', "did you mean pool_size"),
        ('host = "a"\n[network]\nbrigde = "br0"', "did you mean network.bridge"),
        ('host = "a"\nstate_dir = "var/lib"', "not an absolute path"),
        ('host = "a"\npool_size = "lots"', "pool_size"),
        ('host = "a"\nmax_migrations = 0', "max_migrations: 0 is not between 1 and 64"),
        ('host = "a"\npool_size = "1MiB"', "less than"),
        ('host = "A_b"', "host"),
        ('host = "a"\ncgroup_parent = "../x"', "cgroup_parent"),
        ('host = "a"\n[listen]\naddress = "10.0.0.1"', "HOST:PORT"),
        ('host = "a"\n[listen]\naddress = "fd77::1:7440"', "brackets"),
        ('host = "a"\n[peers]\nb = "x:99999"', "peers.b"),
        ('host = "a"\n[peers]\na = "10.0.0.1:1"', "this host itself"),
        ('host = "a"\n[network]\nipv4_pool = "10.0.0.1/24"', "ipv4_pool"),
        ('host = "a"\n[network]\nipv4_pool = "10.0.0.0/24"\nipv4_prefix = 28', "does not contain"),
        ('host = "a"\n[network]\nipv6_pool = "10.0.0.0/24"', "not an IPv6"),
        ('host = "a"\n[network]\nipv4_prefix = "16"', "ipv4_prefix"),
        ('host = "a"\nnetwork = 3', "network"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse(text)


@pytest.mark.parametrize("content", [b"host = ", b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=str(path)) as raised:
        config.load(path)
    assert raised.value.reason == "BAD_CONFIGURATION"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        config.load(tmp_path / "none.toml")


def test_a_value_of_another_kind_is_refused() -> None:
    document: dict[str, Any] = {"host": "a", "pool_size": True}
    with pytest.raises(InvalidArgument, match="pool_size"):
        config.parse(document)
