"""`migrator snapshot` and the options of `migrate` about them, against an agent that is real gRPC and made up."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrator.cli.main import main
from migrator.v1 import migration_pb2
from tests.fakes.agent import FakeAgent
from tests.unit.test_cli import agent, run

__all__ = ["agent"]


def take(agent: FakeAgent) -> None:
    for name in ("one", "two"):
        assert run(agent, "snapshot", "create", "ct101", name).exit_code == 0


def test_create_names_it_and_tells_the_freeze(agent: FakeAgent) -> None:
    assert run(agent, "snapshot", "create", "ct101").stdout == "20261121-100000 (writes stood still for 12.3ms)\n"
    assert json.loads(run(agent, "snapshot", "create", "ct101", "b", "-o", "json").stdout) == {
        "container": "ct101",
        "name": "b",
        "parent": "20261121-100000",
        "created": "2026-09-21T14:13:20.123Z",
        "current": True,
        "size_bytes": 2 << 30,
        "allocated_bytes": 160 << 20,
        "freeze_ms": 12.346,
    }


def test_ls_draws_the_tree(agent: FakeAgent) -> None:
    take(agent)
    lines = run(agent, "snapshot", "ls", "ct101").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "NOW", "TAKEN", "SIZE", "DISK"],
        ["one", "2026-09-21T14:13:20.123Z", "2GiB", "160MiB"],
        ["two", "*", "2026-09-21T14:13:20.123Z", "2GiB", "160MiB"],
    ]
    assert lines[2].startswith("  two")
    found = json.loads(run(agent, "snapshot", "ls", "ct101", "-o", "json").stdout)
    assert [(item["name"], item["parent"], item["current"]) for item in found] == [
        ("one", None, False),
        ("two", "one", True),
    ]


def test_rollback_is_refused_while_it_runs(agent: FakeAgent) -> None:
    take(agent)
    refused = run(agent, "snapshot", "rollback", "ct101", "one")
    assert refused.exit_code == 3
    assert "--force" in refused.stderr
    assert run(agent, "snapshot", "rollback", "ct101", "one", "--force").stdout == "one\n"
    assert agent.snapshots.taken[0].is_current


def test_rm_takes_several(agent: FakeAgent) -> None:
    take(agent)
    assert run(agent, "snapshot", "rm", "ct101", "one", "two").stdout == "one\ntwo\n"
    assert run(agent, "snapshot", "rm", "ct101", "one").exit_code == 2
    assert agent.snapshots.taken == []


@pytest.mark.parametrize("name", ["UPPER", "-x", "a/b", "x" * 41])
def test_names_are_checked(agent: FakeAgent, name: str) -> None:
    refused = run(agent, "snapshot", "create", "ct101", "--", name)
    assert refused.exit_code == 2
    assert "snapshot's name" in refused.stderr
    assert agent.snapshots.taken == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], migration_pb2.SNAPSHOT_HANDLING_UNSPECIFIED),
        (["--with-snapshots"], migration_pb2.SNAPSHOT_HANDLING_MOVE),
        (["--without-snapshots"], migration_pb2.SNAPSHOT_HANDLING_DROP),
    ],
)
def test_migrate_says_what_becomes_of_them(agent: FakeAgent, options: list[str], expected: int) -> None:
    assert run(agent, "migrate", "ct101", "host-b", *options).exit_code == 0
    assert agent.migrations.snapshots == expected


def test_completion_offers_the_containers_snapshots(agent: FakeAgent, tmp_path: Path) -> None:
    take(agent)
    words = f"migrator --socket {agent.socket} snapshot rollback ct101 "
    environment = {"_MIGRATOR_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "6"}
    shown = CliRunner(env=environment).invoke(main, [], prog_name="migrator", complete_var="_MIGRATOR_COMPLETE")
    assert [line.split(",")[1] for line in shown.stdout.split()] == ["one", "two"]
