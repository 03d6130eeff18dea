"""`migrator resolve`: what it tells, what it asks, and what it sends."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from migrator.cli.main import main
from migrator.v1 import migration_pb2
from tests.fakes.agent import FakeAgent

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from migrator.cli.main import main; sys.exit(main(prog_name='migrator'))"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(str(tmp_path / "agent.sock"))
    yield fake
    fake.close()


def run(agent: FakeAgent, *words: str) -> Result:
    return CliRunner().invoke(main, ["--socket", agent.socket, "resolve", *words])


def test_facts_and_risks_are_told_and_nothing_is_done(agent: FakeAgent) -> None:
    result = run(agent, "stuck")
    assert result.exit_code == 0
    for part in ("host-b", "epoch 7", "2026-09-21T14:14:20.123Z", "it is ready", "no route to host", "two copies"):
        assert part in result.stdout
    assert "--here:" in result.stdout and "--there:" in result.stdout
    assert not agent.migrations.resolved


@pytest.mark.parametrize("keep", ["here", "there"])
def test_the_word_is_sent_with_the_epoch_that_was_looked_at(agent: FakeAgent, keep: str) -> None:
    result = run(agent, "stuck", f"--{keep}", "--yes", "-o", "json")
    assert result.exit_code == 0
    assert f"--{keep}: " in result.stderr
    found = json.loads(result.stdout)
    assert (found["kept"], found["side"], found["epoch"], found["heard"]) == (keep, "source", 7, "it is ready")
    assert found["risks"].keys() == {"here", "there"}
    (sent,) = agent.migrations.resolved
    assert (sent.container, sent.epoch) == ("stuck", 7)
    assert sent.keep == migration_pb2.Keep.Value(f"KEEP_{keep.upper()}")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["stuck", "--here"], 2, "INVALID_ARGUMENT"),  # nobody can be asked
        (["alive", "--here", "--yes"], 3, "PEER_ANSWERS"),
        (["ct101", "--here", "--yes"], 3, "NOTHING_TO_RESOLVE"),
    ],
)
def test_what_is_not_done(agent: FakeAgent, words: list[str], code: int, reason: str) -> None:
    result = run(agent, *words, "-o", "json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["reason"] == reason
    assert not agent.migrations.resolved


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 130)])
def test_it_asks_on_a_terminal(agent: FakeAgent, answer: str, code: int) -> None:
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-c", SCRIPT, "--socket", agent.socket, "resolve", "stuck", "--here"]
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(words, cwd=ROOT, stdin=theirs, capture_output=True, text=True, check=False, timeout=20)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "gone for good" in done.stderr
    assert bool(agent.migrations.resolved) == (code == 0)
