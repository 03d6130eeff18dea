"""A CRIU that hangs is given up: when it has had its time, and when nobody wants the dump any more."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.criu import Criu, DumpRequest
from migrator.errors import Cancelled, ExecutionError

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to enter a namespace")]

# As `criu swrk FD`: answers a first request, and nothing after it.
WEDGED = """\
#!{python}
import os, signal, socket, sys
connection = socket.socket(fileno=int(sys.argv[2]))
connection.recv(1 << 20)
connection.send(bytes.fromhex("08091001"))
{deaf}
while connection.recv(1 << 20):
    pass
"""


@pytest.fixture
def request_(tmp_path: Path) -> DumpRequest:
    for name in ("images", "work"):
        (tmp_path / name).mkdir()
    configuration = tmp_path / "criu.conf"
    configuration.touch()
    return DumpRequest(1, tmp_path / "images", tmp_path / "work", configuration, tmp_path, tmp_path)


@pytest.fixture
def criu(tmp_path: Path) -> Iterator[Criu]:
    with make(tmp_path) as made:
        yield made


def make(folder: Path, deaf: str = "") -> Criu:
    program = folder / "criu"
    program.write_text(WEDGED.format(python=sys.executable, deaf=deaf))
    program.chmod(0o700)
    made = Criu(str(program), os.environ, Path("/proc/self/ns/net"))
    made.warm_up(20)
    return made


def test_a_dump_has_its_time(criu: Criu, request_: DumpRequest) -> None:
    with pytest.raises(ExecutionError, match=r"not dumped process 1 within 0\.2 s") as raised:
        criu.dump(request_, 0.2)
    assert raised.value.reason == "DUMP_FAILED"


def test_a_dump_that_nobody_wants_any_more_is_ended(criu: Criu, request_: DumpRequest) -> None:
    asked: list[float] = []

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        criu.dump(request_, 600, check=check)


def test_one_that_does_not_roll_back_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Criu, "ROLLBACK_S", 0.1)
    with make(tmp_path, deaf="os.kill(os.getpid(), signal.SIGSTOP)") as made:
        pid = made.pid
    assert not Path(f"/proc/{pid}").exists()
