"""What a host of the lab takes of the machine: what its agent has open, and everything that a move could leave."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labkit import leftovers
from labkit.hosts import STATE, host_named

# What an agent's memory may vary by: Python and the C library give back little of what a move has taken.
MEMORY_SLACK_BYTES = 24 << 20
# gRPC has a pool of threads that it makes as it needs them.
THREAD_SLACK = 8
FILE_SLACK = 4
MEMORY, THREADS, FILES = "agent's memory", "agent's threads", "agent's open files"

_COUNT = """
import json, sqlite3
database = sqlite3.connect("file:/var/lib/migrator/agent.db?mode=ro", uri=True)
tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
print(json.dumps({name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}))
"""


@dataclass(frozen=True)
class Usage:
    """Counts by what is counted; `agent's memory` in bytes. `rows` by table of the agent's database."""

    counts: Mapping[str, int]
    rows: Mapping[str, int]


def look(host: str) -> Usage:
    """Now."""
    init = int((STATE / host / "init.pid").read_text())
    root = Path(f"/proc/{init}/root")
    agent = root / "proc" / str(host_named(host).agent_pid())
    facts = dict(line.split(":", 1) for line in (agent / "status").read_text().splitlines())
    enter = ["nsenter", f"--target={init}", "--mount", "--net", "--"]
    rules = subprocess.run([*enter, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    counts = {
        MEMORY: int(facts["RssAnon"].split()[0]) << 10,
        THREADS: int(facts["Threads"]),
        FILES: len(list((agent / "fd").iterdir())),
        "lines of nftables": len(rules.splitlines()),
        **{kind: len(found) for kind, found in leftovers.present(host).items()},
    }
    return Usage(counts, _rows(init))


def _rows(init: int) -> dict[str, int]:
    # SQLite would take the link /proc/PID/root for what it says.
    enter = ["nsenter", f"--target={init}", "--mount", "--", "python3", "-c", _COUNT]
    found: dict[str, int] = json.loads(subprocess.run(enter, capture_output=True, text=True, check=True).stdout)
    return found


def machine() -> dict[str, int]:
    """What is the whole machine's: also what no host shows any more."""
    loops = subprocess.run(["losetup", "--list", "--noheadings"], capture_output=True, text=True, check=True).stdout
    allocated, _, _ = Path("/proc/sys/fs/file-nr").read_text().split()
    return {"loop devices of the machine": len(loops.splitlines()), "open files of the machine": int(allocated)}


def growth(looks: Sequence[Usage], rows_kept: int) -> list[str]:
    """What has grown from the first to the last look, each with the container at the same host. A table may have
    `rows_kept`. Memory goes up and down, and counts as the least of the second half."""
    before, after = looks[0], looks[-1]
    lasting = min(each.counts[MEMORY] for each in looks[len(looks) // 2 :])
    after = replace(after, counts={**after.counts, MEMORY: lasting})
    slack = {MEMORY: MEMORY_SLACK_BYTES, THREADS: THREAD_SLACK, FILES: FILE_SLACK}
    grown = [
        f"{what}: {before.counts[what]} before, {count} after"
        for what, count in after.counts.items()
        if count > before.counts[what] + slack.get(what, 0)
    ]
    return grown + [
        f"rows of table {name}: {count}, of {rows_kept} that are kept"
        for name, count in after.rows.items()
        if count > max(rows_kept, before.rows[name])
    ]
