"""qemu-img as a converter that is not trusted: formats are always named, time and memory limited, one file opened."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from blockdev.errors import BlockError
from blockdev.formats import qcow2
from blockdev.formats.disk import open_file
from blockdev.formats.errors import FormatError

PROGRAM = "qemu-img"
QUESTION_TIMEOUT_S = 120.0
CONVERT_TIMEOUT_S = 6 * 3600.0
# qemu-img takes 200 MiB for itself; tables of a large image and its buffers come to a few hundred more.
ADDRESS_SPACE_BYTES = 2 << 30
QUESTION_CPU_S = 120

Running = Callable[["subprocess.Popen[bytes]"], AbstractContextManager[Any]]


def check_qcow2(path: Path) -> qcow2.Qcow2:
    """Read the header, then let qemu-img check the tables. Raises FormatError, BlockError."""
    descriptor = open_file(str(path))
    try:
        header = qcow2.check_header(os.pread(descriptor, qcow2.HEADER_BYTES, 0), path.name)
    finally:
        os.close(descriptor)
    information = _ask(["info", "--output=json", _qcow2(path)])
    # What the header check has refused already, as qemu itself reads it.
    outside = information.get("backing-filename") or information.get("format-specific", {}).get("data", {}).get(
        "data-file"
    )
    if outside:
        raise FormatError(f"{path.name} refers to another file: {outside}")
    if information.get("virtual-size") != header.size_bytes:
        raise FormatError(f"{path.name}: qemu-img sees another size than its header has")
    found = _ask(["check", "--output=json", _qcow2(path)], good_codes=(0, 2, 3))
    if found.get("corruptions") or found.get("check-errors"):
        raise FormatError(f"{path.name} is damaged: qemu-img check finds {found.get('corruptions', 0)} errors in it")
    return header


def measure_raw(path: Path) -> int:
    """About the bytes that a qcow2 takes as a sparse raw file. Raises as above."""
    # Into raw it would count the holes; a new qcow2 holds what is data and little besides.
    answer = _ask(["measure", "--output=json", "-O", "qcow2", _qcow2(path)])
    return int(answer["required"])


def to_raw(path: Path, target: Path, running: Running | None = None) -> None:
    """A checked qcow2 as a new sparse raw file. Raises FormatError, BlockError."""
    _convert(["-O", "raw", _qcow2(path), str(target)], path, running)


def from_raw(raw: Path, target: Path, kind: str, running: Running | None = None) -> None:
    """A raw file as a new `qcow2` or `parallels` (ploop version 2) file; zeros are left out."""
    _convert(["-f", "raw", "-O", kind, str(raw), str(target)], raw, running)


def _qcow2(path: Path) -> str:
    """Opened as this format and without any backing file, whatever the file says by now."""
    if not path.is_absolute():
        raise BlockError(f"{path} is not absolute")
    file = {"driver": "file", "filename": str(path)}
    return "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file})


def _convert(arguments: list[str], source: Path, running: Running | None) -> None:
    process = _start(["convert", *arguments], cpu_s=None)
    with (running or (lambda _: nullcontext()))(process):
        try:
            _, errors = process.communicate(timeout=CONVERT_TIMEOUT_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        words = errors.decode(errors="replace").strip()[-400:]
        if "No space left" in words:
            raise BlockError(f"converting {source.name}: no space left on the device")
        raise FormatError(f"{source.name} cannot be converted: {words or _ended(process.returncode)}")


def _ask(arguments: list[str], good_codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    process = _start(arguments, cpu_s=QUESTION_CPU_S)
    try:
        output, errors = process.communicate(timeout=QUESTION_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise FormatError(f"{PROGRAM} {arguments[0]} took longer than {QUESTION_TIMEOUT_S:g} s") from error
    if process.returncode not in good_codes:
        words = errors.decode(errors="replace").strip()[-400:]
        raise FormatError(f"{PROGRAM} {arguments[0]}: {words or _ended(process.returncode)}")
    try:
        answer = json.loads(output)
    except ValueError as error:
        raise BlockError(f"{PROGRAM} {arguments[0]} answered with something else than JSON") from error
    if not isinstance(answer, dict):
        raise BlockError(f"{PROGRAM} {arguments[0]} answered with something else than an object")
    return answer


def _start(arguments: list[str], cpu_s: int | None) -> "subprocess.Popen[bytes]":
    limits = [f"--as={ADDRESS_SPACE_BYTES}", "--core=0"]
    if cpu_s is not None:
        limits.append(f"--cpu={cpu_s}")
    # prlimit(1) and setpriv(1) instead of preexec_fn, which is not safe among threads.
    command = ["prlimit", *limits, "setpriv", "--pdeathsig=KILL", "--no-new-privs", PROGRAM, *arguments]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise BlockError(f"{error.filename} is not installed: run scripts/setup") from error


def _ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
