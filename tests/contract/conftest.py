"""What several suites need: the ways to track a disk, a pool, and CRIU's shim as scripts/setup-criu makes it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import pool, tracker
from soakkit.disk import TRACKERS

SHIM = Path(__file__).parents[2] / "scripts/criu-shim.c"


@pytest.fixture(params=list(TRACKERS))
def kind_of_tracker(request: pytest.FixtureRequest) -> str:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if request.param == "ebpf" and (reason := tracker.probe()):
        pytest.skip(f"this kernel cannot track by eBPF: {reason}")
    return str(request.param)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("shim") / "criu-shim.so"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", built, SHIM], check=True)
    return built


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pool of a module's own, sparse."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    state = tmp_path_factory.mktemp("state")
    try:
        yield pool.ensure(state, 8 << 30)
    finally:
        pool.close(state)
