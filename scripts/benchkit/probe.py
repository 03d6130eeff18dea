"""The outside client as a context: it asks from its first answer until the block ends."""

import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchkit.errors import BenchError
from benchkit.hosts import ENVIRONMENT, last_words
from benchkit.trace import Trace

END_S = 30.0


class Probe:
    """One client program with its flows, such as tcp:10.77.2.7:7000.

    `enter` is the command prefix that brings it to where it asks from; `stall_us` has a workload stand still at times.
    """

    def __init__(
        self, program: Path, folder: Path, flows: Sequence[str], *, enter: Sequence[str] = (), stall_us: int = 0
    ) -> None:
        self._prefix = folder / "flow"
        self._flows = flows
        stall = ["--stall-us", str(stall_us)] if stall_us else []
        self._command = [*enter, str(program), "--out", str(self._prefix), *stall, *flows]
        self._process: subprocess.Popen[str] | None = None
        self.traces: list[Trace] = []
        self.stalls_s: list[float] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        # The program itself gives up when nobody answers for long.
        if self._process.stdout.readline() != "ready\n":
            self._process.kill()
            _, said = self._process.communicate()
            raise BenchError(f"no first answer from {' '.join(self._flows)}: {last_words(said)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            told, said = self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            if error is None:
                raise BenchError("the client did not end") from None
            return
        if error is not None:
            return
        lines = told.splitlines()
        if self._process.returncode != 0 or len(lines) != len(self._flows):
            raise BenchError(f"the client ended with exit code {self._process.returncode}: {last_words(said)}")
        if said:
            raise BenchError(f"the client: {last_words(said)}")
        for number, line in enumerate(lines):
            asked, answered, what = line.split(" ", 2)
            path = self._prefix.with_suffix(f".{number}")
            found = Trace.read(path.read_bytes(), "" if what == "-" else what, int(asked) - int(answered))
            path.unlink()
            self.traces.append(found)
        stalls = self._prefix.with_suffix(".stalls")
        if stalls.exists():
            numbers = array("Q")
            numbers.frombytes(stalls.read_bytes())
            stalls.unlink()
            self.stalls_s = [number / 1e9 for number in numbers]
