"""The benchmark's arithmetic: what a trace tells, what rows make of runs, and what is kept of them."""

import json
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchkit import page, plan, smoke, table
from benchkit.contenders import peer_end
from benchkit.measure import seen
from benchkit.results import OURS, Results, Run, Store, Summary
from benchkit.rows import ROWS, Found
from benchkit.runner import Outcome
from benchkit.trace import Trace, Window, percentile
from benchkit.wire import Sent, stream
from benchkit.workloads import WORKLOADS

NAMES = [
    "pause-idle-16m", "pause-1g-100mbs", "pause-growth-256m-4g", "pause-redis-1g", "pause-postgres",
    "pause-disk-growth-1g-50g", "tree-256", "stream-speed", "bytes-overhead", "cpu-per-gib", "throughput-during",
    "throughput-redis", "recovery", "tracker-overhead", "snapshot-100k-extents",
]  # fmt: skip
MS = 1_000_000


def trace(*came_ms: float, pages_per_ms: int = 100) -> Trace:
    return Trace([(int(ms * MS), MS // 10, int(ms * pages_per_ms), 0) for ms in came_ms])


def every(step_ms: float, begin_ms: float, end_ms: float) -> list[float]:
    return [begin_ms + number * step_ms for number in range(round((end_ms - begin_ms) / step_ms))]


PAUSED = trace(*every(0.2, 1000, 2000), *every(0.2, 2050, 3000))


def row(name: str) -> Found:
    return next(one for one in ROWS if one.name == name).find(Results(RUNS))


def run(task: str, contender: str, number: int = 0, **metrics: float) -> Run:
    return Run(task, contender, number, metrics)


RUNS = [
    run("ceilings", "machine", memcpy=8e9, tcp=1e9, tls=8e8, tmpfs=2e9, disk=1e9, cpu_s_per_gib=2.0),
    run("idle-16m", OURS, 0, pause_ms=50.0),
    run("idle-16m", "runc + copy", 0, pause_ms=400.0),
    run("idle-16m", "podman", 0, pause_ms=900.0),
    run("idle-16m", OURS, 1, pause_ms=70.0),
    Run("idle-16m", OURS, 2, error="it fell over"),
    run("write-50mbs-256m", OURS, pause_ms=60.0),
    run("write-50mbs-4g", OURS, pause_ms=90.0),
    run("write-50mbs-256m", "runc + copy", pause_ms=500.0),
    run("write-50mbs-4g", "runc + copy", pause_ms=8000.0),
    run("idle-1g", OURS, stream_mb_per_s=800.0, wire_per_byte=1.0, cpu_s_per_gib=3.0),
    run("idle-1g", "runc + copy", stream_mb_per_s=900.0, wire_per_byte=1.0, cpu_s_per_gib=2.5),
    run("write-100mbs-25pc", OURS, wire_per_byte=1.2, pause_ms=60.0),
    run("write-100mbs-25pc", "runc + copy", wire_per_byte=1.0, pause_ms=900.0),
    run("write-100mbs-25pc", "CRIU on tmpfs", wire_per_byte=2e-6, pause_ms=600.0),
    run("tracker-memory", "tracked", per_s=90.0),
    run("tracker-memory", "untracked", per_s=100.0),
    run("tracker-disk", "tracked", per_s=99.0),
    run("tracker-disk", "untracked", per_s=100.0),
]


def test_a_pause_is_the_longest_gap_less_the_typical_one() -> None:
    # The last answer before came at 1999.8 ms.
    assert PAUSED.longest_gap_ms(Window(1.9, 2.1)) == pytest.approx(50.0)
    assert PAUSED.longest_gap_ms(Window(1.2, 1.8)) == pytest.approx(0.0, abs=1e-6)


def test_a_window_inside_the_gap_sees_all_of_it() -> None:
    assert PAUSED.longest_gap_ms(Window(2.01, 2.02)) == pytest.approx(50.0)


def test_no_answers_no_gap() -> None:
    assert Trace([]).longest_gap(Window(0, 1)) is None
    assert trace(1000).longest_gap(Window(0, 2)) is None


def test_speed_and_latency_in_a_window() -> None:
    assert PAUSED.pages_per_s(Window(1.2, 1.8)) == pytest.approx(100_000, rel=0.01)
    assert PAUSED.written_bytes(Window(1.2, 1.8)) == pytest.approx(60_000 * 4096, rel=0.01)
    assert PAUSED.latency_ms(Window(1.2, 1.8), 0.99) == pytest.approx(0.1)
    assert Trace([]).pages_per_s(Window(1, 2)) == 0.0


def test_recovery_begins_with_the_first_answer_and_needs_three_good_bins() -> None:
    slow = [(int(ms * MS), 0, int(ms * 10), 0) for ms in every(1, 2050, 2250)]
    fast = [(int(ms * MS), 0, int(2250 * 10 + (ms - 2250) * 100), 0) for ms in every(1, 2250, 3000)]
    gap = Window(2.0, 2.05)
    both = Trace([*slow, *fast])
    assert both.recovery_ms(gap, both.pages_per_s, 90_000) == pytest.approx(200.0)
    assert both.recovery_ms(gap, both.answers_per_s, 900) == pytest.approx(0.0)
    assert Trace(slow).recovery_ms(gap, Trace(slow).pages_per_s, 90_000) is None


def test_samples_are_read_as_the_probe_writes_them() -> None:
    words = [1, 2, 3, 4, 5, 6, 7, 8]
    data = b"".join(word.to_bytes(8, "little") for word in words) + b"half"
    read = Trace.read(data, "reset", 3)
    assert (read.came_ns, read.took_ns, read.pages, read.blocks) == ([1, 5], [2, 6], [3, 7], [4, 8])
    assert (read.error, read.unanswered) == ("reset", 3)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_one_of_the_values_and_enough_are_below(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert percentile([], share) == 0.0


def test_a_flow_that_does_not_get_over_the_move_fails_the_run() -> None:
    move = Window(2.0, 4.0)
    with pytest.raises(Exception, match="did not survive"):
        seen([PAUSED, PAUSED], WORKLOADS["idle-16m"], Window(1.0, 1.9), move, Window(2.0, 5.0))


def test_metrics_of_a_move() -> None:
    quiet, move = Window(1.0, 1.9), Window(1.95, 2.9)
    found = seen([PAUSED, PAUSED], WORKLOADS["write-100mbs-25pc"], quiet, move, Window(1.95, 2.99))
    assert found["pause_ms"] == found["datagram_pause_ms"] == pytest.approx(50.0)
    assert found["quiet_gap_ms"] == pytest.approx(0.0, abs=1e-6)
    assert found["throughput_percent"] == pytest.approx(100.0, rel=0.02)
    assert found["recovery_ms"] == 0.0


def test_what_a_redis_answers_during_a_move() -> None:
    """1,000 each second, 900 from the beginning of the move, nothing for 50 ms, and 1,000 again."""
    times = [*every(1, 1000, 1950), *every(1000 / 900, 1950, 2250), *every(1, 2300, 3000)]
    answers = Trace([(int(ms * MS), 0, 0, 0) for ms in times])
    found = seen([answers], WORKLOADS["redis-1g"], Window(1.0, 1.9), Window(1.95, 2.9), Window(1.95, 2.99))
    assert found["throughput_percent"] == pytest.approx(90.0, rel=0.01)
    assert found["recovery_ms"] == 0.0


def test_a_stream_is_what_is_sent_beside_the_answers() -> None:
    # 100 bytes a second of answers until 2 s; from 2 to 4 s a stream of 1000 bytes a second.
    samples = [(tenth / 10, tenth * 10) for tenth in range(20)]
    samples += [(2 + tenth / 10, 200 + tenth * 100) for tenth in range(20)]
    samples += [(4 + tenth / 10, 2200) for tenth in range(10)]
    found = stream(samples, Window(1.0, 4.9), 100.0, 2.0)
    assert found.total == pytest.approx(2000, rel=0.01)
    assert found.per_s == pytest.approx(1000, rel=0.1)
    assert stream(samples[:20], Window(1.0, 1.9), 100.0, 2.0) == Sent(0.0, 0.0)


def test_the_rows_have_the_names_that_scripts_rely_on() -> None:
    assert [one.name for one in ROWS] == NAMES


def test_a_pause_row_has_the_best_peer_and_counts_failures() -> None:
    assert row("pause-idle-16m").as_object() == {
        "name": "pause-idle-16m", "unit": "ms", "ours": 60.0, "peer": 400.0, "peer_name": "runc + copy", "ratio": 0.15,
        "runs": 2, "failed": 1, "ceiling": 16.78,
    }  # fmt: skip
    assert row("pause-idle-16m").summary == Summary(60.0, 70.0, 20.0)


def test_growth_is_for_each_gib_and_its_ratio_is_our_own() -> None:
    found = row("pause-growth-256m-4g").as_object()
    assert (found["ours"], found["peer"], found["ratio"]) == (8.0, 2000.0, 1.5)
    assert found["ceiling"] == pytest.approx(1074)


def test_more_is_better_for_speeds() -> None:
    found = row("stream-speed")
    assert found.best_peer == ("runc + copy", 900.0)
    assert found.behind
    assert row("cpu-per-gib").behind
    assert not row("pause-idle-16m").behind


def test_overheads_compare_our_own_settings() -> None:
    assert row("bytes-overhead").as_object()["ratio"] == 1.2
    assert row("bytes-overhead").peers == {"runc + copy": 1.0}
    found = row("tracker-overhead").as_object()
    assert (found["ours"], found["ratio"], found["peer_name"]) == (10.0, 0.9, None)


def test_a_row_that_was_not_measured_is_empty() -> None:
    assert row("pause-redis-1g").as_object() == dict.fromkeys(smoke.FIELDS) | {
        "name": "pause-redis-1g", "unit": "ms", "runs": 0, "failed": 0, "ceiling": 1074.0
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_an_object_of_the_format_whatever_was_run(name: str) -> None:
    for results in (Results(), Results(RUNS)):
        found = next(one for one in ROWS if one.name == name).find(results).as_object()
        assert list(found) == smoke.FIELDS
        json.dumps(found, allow_nan=False)


def test_what_was_run_is_kept_and_goes_on(tmp_path: Path) -> None:
    path, heading = tmp_path / "runs.jsonl", {"extent": "full"}
    store = Store(path, heading, resume=True)
    for one in RUNS:
        store.add(one)
    with path.open("a") as file:
        file.write('{"task": "cut sho')
    again = Store(path, heading, resume=True)
    assert again.results.runs == RUNS
    assert again.results.has("idle-16m", OURS, 2) and not again.results.has("idle-16m", OURS, 3)
    assert Store(path, {"extent": "quick"}, resume=True).results.runs == []


def test_only_runs_just_what_a_row_needs() -> None:
    parts = plan.parts(plan.QUICK, ["pause-growth-256m-4g"], plan.MOVERS)
    growth = ["write-50mbs-256m", "write-50mbs-4g"]
    assert [part.task.name for part in parts] == ["ceilings", *growth, "ceilings", *growth, *growth]  # ours again
    assert [part.contenders for part in parts[1:3]] == [(OURS, "CRIU lazy pages"), (OURS,)]
    turns = plan.parts(plan.QUICK, ["pause-growth-256m-4g"], plan.MOVERS, 2)
    assert [(part.task.name, part.runs) for part in turns[1:]] == [(name, runs) for runs in (1, 2) for name in growth]
    everything = plan.parts(plan.FULL, [], plan.MOVERS)
    once = len({part.task.name for part in everything})
    assert set(WORKLOADS) <= {part.task.name for part in everything[:once]}
    assert sum(part.task.name == "idle-16m" for part in everything) == plan.FULL.runs


def test_the_page_tells_where_a_peer_is_better_what_failed_and_what_was_not_run(tmp_path: Path) -> None:
    outcome = Outcome(Results(RUNS), {"podman": "no packages"}, ["tree-256: podman, run 2", "tree-256: podman, run 3"])
    rows = [one.find(outcome.results) for one in ROWS]
    page.write(tmp_path / "p.md", "scripts/bench", {"kernel": "6"}, rows, outcome, plan.MOVERS, [tmp_path / "c/x.png"])
    text = (tmp_path / "p.md").read_text()
    assert "- `stream-speed`: 800 MB/s against 900 of runc + copy" in text
    assert "- idle-16m, migrator, run 3: it fell over" in text
    assert "- podman: no packages" in text and "- 2 runs for want of time: tree-256 2" in text
    assert "![x](c/x.png)" in text
    assert all(f"`{name}`" in text for name in NAMES)


def test_the_table_has_a_line_for_each_row() -> None:
    lines = table.text([one.find(Results(RUNS)) for one in ROWS]).splitlines()
    assert [line.split()[0] for line in lines] == ["row", *NAMES]


def test_a_folder_goes_over_a_connection_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "empty").touch()
    (source / "pages").write_bytes(bytes(range(256)) * 4096)
    left, right = socket.socketpair()
    with left, right:

        def send() -> None:
            peer_end.send_folder(left, source)
            left.sendall(b"\n")

        sender = threading.Thread(target=send)
        sender.start()
        peer_end.receive_folder(right, target)
        sender.join()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


def test_a_malformed_report_is_found(tmp_path: Path) -> None:
    for name in smoke.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    runs = [one for one in RUNS if one.task in ("ceilings", "idle-16m") and one.number == 0]
    good = next(one for one in ROWS if one.name == smoke.ROW).find(Results(runs)).as_object()
    good["peer_name"] = smoke.PEER
    assert smoke.problems([good], tmp_path) == []
    for wrong in ({"ours": None}, {"ours": float("nan")}, {"failed": 1}, {"ratio": 2.0}, {"unit": "s"}, {"name": "x"}):
        assert smoke.problems([good | wrong], tmp_path)
    assert smoke.problems([{name: good[name] for name in smoke.FIELDS[:-1]}], tmp_path)
    assert smoke.problems([], tmp_path)
    assert smoke.problems([good], tmp_path / "elsewhere")


def test_a_sparse_disk_goes_over_a_connection_with_its_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        for at in (0, 5 << 20, (64 << 20) - 4096):
            file.seek(at)
            file.write(bytes([at % 251 + 1]) * 4096)
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=peer_end.send_sparse, args=(left, source))
        sender.start()
        peer_end.receive_sparse(right, target)
        sender.join()
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + 64
