"""`scripts/bench`, once the machine is set up: the lab, the runs, and the report."""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from benchkit import charts, machine, native, page, plan, runner, smoke, table
from benchkit.contenders.base import Bench
from benchkit.errors import BenchError
from benchkit.hosts import lab_up
from benchkit.results import OURS, Store
from benchkit.rows import ROWS
from labkit.hosts import CHECKOUT

FOLDER = Path("/var/lib/migrator-bench")
OUT = CHECKOUT / "build/bench"
PUBLISHED = CHECKOUT / "docs"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Move containers, ours and others', and tell how long their clients wait."
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="the rows, a few runs each, within 8 minutes (default)")
    extent.add_argument("--full", action="store_true", help="every workload, within 60 minutes; goes on where it was")
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="ROW", help=f"just what this row needs: {', '.join(names)}"
    )
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="what standard output gets")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for runs, rows, page and charts (build/bench)")
    parser.add_argument("--publish", action="store_true", help="the page and its charts also into docs/")
    parser.add_argument("--anew", action="store_true", help="forget the runs that the folder has")
    parser.add_argument("--peer", action="append", metavar="NAME", help="only this peer, by its name in the report")
    parser.add_argument("--smoke", action="store_true", help="one workload, one peer: is the report well-formed?")
    parser.add_argument("--runs", type=int, help="so many of each, instead of what --quick and --full have")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing any more after so many: 7 with --quick, 57 with --full"
    )
    chosen = parser.parse_args(words)
    if chosen.smoke:
        chosen.only, chosen.peer, chosen.runs = [smoke.ROW], [smoke.PEER], 1
    return chosen


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    chosen = arguments(words)
    began = time.monotonic()
    extent = plan.FULL if chosen.full else plan.QUICK
    limit_s = extent.limit_s if chosen.minutes is None else 60 * chosen.minutes
    facts = machine.describe()
    heading = {"extent": extent.name, "kernel": facts["kernel"], "migrator": facts["migrator"]}
    # A quick one is of one moment; one of an hour may have been cut short.
    store = Store(chosen.out / "runs.jsonl", heading, resume=chosen.full and not chosen.anew)
    outcome = runner.Outcome(store.results, cannot=plan.never_here())
    with ExitStack() as stack:
        programs = native.build(FOLDER)
        stack.callback(shutil.rmtree, FOLDER, ignore_errors=True)
        bench = Bench(stack.enter_context(lab_up()), programs, FOLDER)
        known = [mover for mover in plan.MOVERS if not chosen.peer or mover.name in (OURS, *chosen.peer)]
        needed = plan.parts(extent, chosen.only or [], known)
        names = {name for part in needed for name in part.contenders}
        movers = runner.check(bench, [mover for mover in known if mover.name in names], outcome)
        parts = plan.parts(extent, chosen.only or [], movers, chosen.runs)
        runner.run(bench, parts, store, outcome, limit_s - (time.monotonic() - began))
    rows = [row.find(outcome.results) for row in ROWS if not chosen.only or row.name in chosen.only]
    objects = [row.as_object() for row in rows]
    command = f"scripts/bench --{extent.name}" + "".join(f" --only {name}" for name in chosen.only or [])
    for folder, name in [(chosen.out, "benchmark.md"), *([(PUBLISHED, "benchmark.md")] if chosen.publish else [])]:
        drawings = charts.draw(outcome.results, folder / "benchmark")
        page.write(folder / name, command, facts, rows, outcome, movers, drawings)
        (folder / "benchmark").mkdir(exist_ok=True)
        (folder / "benchmark/rows.json").write_text(json.dumps(objects, indent=2) + "\n")
    if chosen.smoke and (problems := smoke.problems(objects, chosen.out)):
        raise BenchError(f"the report is malformed: {'; '.join(problems)}")
    print(json.dumps(objects, indent=2) if chosen.output == "json" else table.text(rows))
    runner.say(f"{time.monotonic() - began:.0f} s; the report is {chosen.out / 'benchmark.md'}")
    return 0 if all(row.ours is not None for row in rows) else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: it makes namespaces, loop devices and control groups: run it as root")
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchError as problem:
        runner.say(str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        runner.say("interrupted")
        sys.exit(130)
