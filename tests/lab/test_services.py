"""Services that move under their clients: Redis, PostgreSQL, nginx; and how long their clients wait."""

import hashlib
import json
import re
import statistics
import time
from itertools import pairwise

import pytest

from tests.lab.lab_kit import CLIENT, Lab, eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

ROUTE = ("host-a", "host-b")
NGINX = """\
head -c 65536 /dev/urandom >/var/www/html/data
echo 'keepalive_requests 10000000;' >/etc/nginx/conf.d/keepalive.conf
exec nginx -g 'daemon off;'
"""

# Four threads, each request on a connection of its own; prints how many were answered, and each failure.
NEW_CONNECTIONS = """
import json, signal, sys, threading, urllib.request
stop, done, failed = threading.Event(), [], []
signal.signal(signal.SIGTERM, lambda *_: stop.set())
def ask():
    while not stop.is_set():
        try:
            urllib.request.urlopen(sys.argv[1], timeout=10).read()
            done.append(1)
        except OSError as error:
            failed.append(repr(error))
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
while not stop.wait(0.1):
    pass
for thread in threads:
    thread.join()
print(json.dumps({"answers": len(done), "failed": failed}))
"""


def back_and_forth(moves: int) -> list[tuple[str, str]]:
    """Source and destination of each move, beginning at host-a."""
    return list(pairwise(ROUTE[number % 2] for number in range(moves + 1)))


def test_redis_ten_moves(lab: Lab) -> None:
    """One connection counts through ten moves; keys and files are there; each move leaves nothing where it was."""
    address = "10.77.2.101"
    lab.start_redis("host-a", "ct101", address, "--disk", "1GiB", "--memory", "512MiB")
    lab.redis(address, "debug", "populate", "100000", "key", "100")
    keys = lab.redis(address, "debug", "digest")
    text = ""
    with lab.counting(address) as report:
        for number, (source, destination) in enumerate(back_and_forth(10)):
            text += f"move {number}\n"
            lab.exec(source, "ct101", "sh", "-c", f"echo move {number} >>/root/moves")
            lab.migrate("ct101", source, destination)
            assert lab.exec(destination, "ct101", "cat", "/root/moves") == text
            assert lab.where("ct101") == [destination]
            left = lab.clean(source)
            assert not left, f"left at {source} after move {number}: {left}"
    assert report["wrong"] == []
    assert report["same_connection"]
    assert report["answers"] == int(lab.redis(address, "get", "counter"))
    lab.redis(address, "del", "counter")
    assert lab.redis(address, "dbsize") == "100000"
    assert lab.redis(address, "debug", "digest") == keys


def test_pause_of_an_idle_container(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the median; the bound is only there to notice what hangs."""
    address = "10.77.2.102"
    lab.start_redis("host-a", "idle", address, "--disk", "1GiB")
    windows: list[tuple[float, float]] = []
    reports = []
    with lab.counting(address) as client:
        for source, destination in back_and_forth(10):
            began = time.monotonic()
            reports.append(lab.migrate("idle", source, destination))
            windows.append((began, time.monotonic()))
    assert client["wrong"] == []
    pauses = [
        max((length * 1000 for start, length in client["pauses"] if began <= start < ended), default=0.0)
        for began, ended in windows
    ]
    with capsys.disabled():
        print(f"\npause seen by the client, ms: {[round(p) for p in pauses]}, median {statistics.median(pauses):.0f}")
        downtimes = [report["downtime_ms"] for report in reports]
        print(f"downtime_ms reported: {[round(d) for d in downtimes]}, median {statistics.median(downtimes):.0f}")
        print(f"memory moved: {max(report['bytes']['memory'] for report in reports) >> 20} MiB; medians by phase, ms:")
        for index, phase in enumerate(reports[0]["phases"]):
            of_all = [report["phases"][index] for report in reports]
            steps = {
                step["name"]: statistics.median(
                    found["duration_ms"] for one in of_all for found in one["steps"] if found["name"] == step["name"]
                )
                for step in phase["steps"]
            }
            told = ", ".join(f"{name} {ms:.1f}" for name, ms in steps.items())
            whole = statistics.median(one["duration_ms"] for one in of_all)
            print(f"  {phase['name']:10} {whole:7.1f}  {told}")
    assert statistics.median(pauses) < 5000


def test_postgresql_under_pgbench(lab: Lab) -> None:
    """Moves under load from the client, five unless all is slow: nothing fails, indexes are sound, books balance."""
    address = "10.77.2.103"
    lab.start_postgresql("host-a", "db", address, "--disk", "2GiB")
    as_user = ["-h", address, "-U", "postgres"]
    lab.client_ok("pgbench", *as_user, "-i", "-q", "-s", "2", "postgres")
    load = ["pgbench", *as_user, "-c", "4", "-T", "45", "postgres"]
    with lab.background("client", *load) as pgbench:
        moves = 0
        for source, destination in back_and_forth(5):
            if pgbench.poll() is not None:
                break
            lab.migrate("db", source, destination)
            moves += 1
        out, err = pgbench.communicate(timeout=90)
    assert pgbench.returncode == 0, err
    assert "number of failed transactions: 0 " in out, out
    assert not re.search(r"error|abort|fatal|closed", err, re.IGNORECASE), err
    assert moves >= 2
    (host,) = lab.where("db")
    done = re.search(r"transactions actually processed: (\d+)", out)
    assert done
    assert lab.psql(address, "SELECT count(*) FROM pgbench_history") == done[1]
    sums = [
        lab.psql(address, f"SELECT sum({column}) FROM pgbench_{table}")
        for table, column in (
            ("accounts", "abalance"), ("tellers", "tbalance"), ("branches", "bbalance"), ("history", "delta"),
        )
    ]  # fmt: skip
    assert len(set(sums)) == 1, sums
    lab.psql(address, "CREATE EXTENSION amcheck")
    indexes = "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relkind = 'i' AND c.relam = 403"
    checked = int(lab.psql(address, f"SELECT count(bt_index_check(c.oid, i.indisunique IS NOT NULL)) {indexes}"))
    assert checked == int(lab.psql(address, f"SELECT count(*) {indexes}")) > 100
    lab.psql(address, "CHECKPOINT")
    log = lab.run(host, "migrator", "logs", "db")
    assert "PANIC" not in log.stderr + log.stdout


def test_nginx_with_keep_alive_clients(lab: Lab) -> None:
    """Twenty connections stay open through two moves, and each answer is right."""
    address = "10.77.2.104"
    lab.image("host-a", "tools")
    lab.start("host-a", "web", "tools", "--ip", f"{address}/16", command=["sh", "-c", NGINX])

    def answers() -> bool:
        return (
            lab.client("python3", "-c", f"import urllib.request as u; u.urlopen('http://{address}/data')").returncode
            == 0
        )

    eventually("nginx answers", answers)
    digest = lab.exec("host-a", "web", "sha256sum", "/var/www/html/data").split()[0]
    assert len(digest) == hashlib.sha256().digest_size * 2
    with lab.background("client", *CLIENT, "web", address, "80", "20", digest) as client:
        for source, destination in back_and_forth(2):
            lab.migrate("web", source, destination)
        assert client.poll() is None
        client.terminate()
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    report = json.loads(out)
    assert report["wrong"] == 0
    assert report["kept"] == 20
    assert report["answers"] > 100


def test_new_connections_while_it_moves(lab: Lab) -> None:
    """A server whose queue of connections is hardly ever empty; at most what comes in a few milliseconds is reset."""
    address = "10.77.2.105"
    lab.image("host-a", "tools")
    lab.start("host-a", "new", "tools", "--ip", f"{address}/16", command=["sh", "-c", NGINX])
    url = f"http://{address}/data"
    fetch = ("python3", "-c", f"import urllib.request as u; u.urlopen('{url}')")
    eventually("nginx answers", lambda: lab.client(*fetch).returncode == 0)
    moves = back_and_forth(4)
    with lab.background("client", "python3", "-c", NEW_CONNECTIONS, url) as client:
        for source, destination in moves:
            lab.migrate("new", source, destination)
        client.terminate()
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    report = json.loads(out)
    print(report)
    assert report["answers"] > 1000
    assert len(report["failed"]) <= 2 * len(moves), report["failed"]
