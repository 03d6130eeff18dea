"""`scripts/demo`, once the machine is set up: the story from the hosts to the summary, and its exit code."""

import signal
import sys
import time
from types import FrameType

from demokit import screen
from demokit.stage import ADDRESS, CONTAINER, Client, DemoError, Move, Stage, lab, pauses

HOSTS = ("host-a", "host-b")
KEYS = 100_000
IMAGE = ("image", "build", "redis", "--suite", "bookworm", "--include", "redis-server")
CREATE = (
    *("create", CONTAINER, "--image", "redis", "--disk", "2GiB", "--memory", "512MiB", "--ip", f"{ADDRESS}/16"),
    *("--", "redis-server", "--bind", "0.0.0.0", "--protected-mode", "no"),
)
COUNT_ALONE_S = 1.0


def story(stage: Stage) -> bool:
    """All of the demo; whether everything was as it should be."""
    home, away = HOSTS
    screen.section("A container")
    stage.migrator(home, *IMAGE)
    stage.migrator(home, *CREATE)
    stage.migrator(home, "start", CONTAINER)
    stage.wait_for_redis()
    filled = stage.ask_client("fill", KEYS)
    screen.say(f"{filled:,} keys are in Redis")

    screen.section("A client on a third machine, counting on one TCP connection")
    with Client() as client:
        moves = []
        for number, (source, destination) in enumerate([(home, away), (away, home)], 1):
            time.sleep(COUNT_ALONE_S)
            screen.say(f"the counter is at {stage.counter():,}")
            screen.section(f"Move {number}: {source} to {destination}, while it counts")
            moves.append(stage.move(number, source, destination))
        time.sleep(COUNT_ALONE_S)
        report = client.stop()
    return summary(stage, moves, report, filled)


def summary(stage: Stage, moves: list[Move], report: dict[str, object], filled: int) -> bool:
    """Say what was found; whether it is all true."""
    screen.section("Summary")
    facts = screen.Facts()
    seen_ms, other_ms = pauses(moves, report)
    for move, pause_ms in zip(moves, seen_ms, strict=True):
        seen = f"{pause_ms:.0f} ms" if pause_ms else "under 20 ms"
        facts.add(
            f"{move.source} to {move.destination}",
            move.outcome == "migrated" and move.where == [move.destination],
            f"paused for {seen} as the client saw it, {move.downtime_ms:.0f} ms as the agents report it",
        )
    quiet = f"{other_ms:.0f} ms" if other_ms else "under 20 ms"
    screen.note(f"longest wait for an answer at any other time: {quiet}")
    wrong = report["wrong"]
    assert isinstance(wrong, list)
    total = report["answers"]
    facts.add(
        "counter",
        not wrong and report["same_connection"] is True and stage.counter() == report["value"] == total,
        f"{total:,} answers on one connection, each one more than the last"
        if not wrong
        else f"{len(wrong)} of {total:,} answers did not follow the one before: {'; '.join(map(str, wrong[:3]))}",
    )
    right = int(str(stage.ask_client("check", KEYS)))
    facts.add("keys", filled == right == KEYS, f"{right:,} of {KEYS:,} are there with the right value")
    kept = [move.file_kept for move in moves]
    facts.add("disk", all(kept), f"{sum(kept)} of {len(kept)} files written just before a move were there after it")
    where = stage.where()
    facts.add("place", where == [moves[-1].destination], f"{CONTAINER} runs at {' and '.join(where) or 'no host'}")
    left = [f"{kind} {', '.join(found)} at {move.source}" for move in moves for kind, found in move.left.items()]
    facts.add("left behind", not left, "; ".join(left) or "nothing at the host it came from, after either move")
    facts.show()
    return facts.all_true


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    began = time.monotonic()
    screen.section("Two hosts, a client and a switch")
    up = lab("up", "--hosts", str(len(HOSTS)))
    if up.returncode != 0:
        screen.complain(up.stderr.strip().removeprefix("lab: "))
        return up.returncode
    good = False
    try:
        screen.say(up.stdout.strip().removeprefix("lab: up, with "))
        good = story(Stage(HOSTS))
    except DemoError as error:
        screen.complain(str(error))
    except KeyboardInterrupt:
        screen.complain("interrupted: taking the hosts down")
        return 130
    finally:
        # It has to come to its end, whoever is impatient.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        down = lab("down")
        if down.returncode != 0:
            screen.complain(f"taking the hosts down: {down.stderr.strip()}")
            good = False
    took = f"{time.monotonic() - began:.0f} s"
    print(f"\nAll of it true, in {took}; the hosts are gone." if good else f"\nNot as it should be, after {took}.")
    return 0 if good else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
