"""What this host has of what it needs, each found by a real try, all of them side by side.

    python -m agent.doctor [--config FILE] [-o json]      (exit code 3 if there is a problem)

Needs no running agent.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click

from agent import config as configuration
from agent import findings, host_probes, kernel_probes
from agent.config import Config
from agent.findings import Finding, Severity, ok, problem
from migrator.errors import Exit, MigratorError

DEFAULT_CONFIG = Path("/etc/migrator/config.toml")
WORKERS = 8

Probe = Callable[[], Finding | list[Finding]]


def diagnose(config: Config) -> list[Finding]:
    """Everything, in a fixed order; takes a second or two at most."""
    probes = _probes(config)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="probe") as pool:
        return [finding for found in pool.map(_try, probes) for finding in found]


def _probes(config: Config) -> list[Probe]:
    return [
        *kernel_probes.ALL,
        partial(kernel_probes.freezer, config.cgroup_parent),
        host_probes.criu,
        host_probes.criu_check,
        host_probes.pageless_dump,
        partial(host_probes.program, "runc"),
        partial(host_probes.program, "conmon"),
        partial(host_probes.program, "tar"),
        partial(host_probes.program, "zstd", needed_for="build and import images"),
        partial(host_probes.program, "mmdebstrap", needed_for="build images"),
        partial(
            host_probes.program, "qemu-img", needed_for="import qcow2 disks, and to export volumes as qcow2 or ploop"
        ),
        host_probes.nftables,
        partial(host_probes.disk, config),
        partial(host_probes.bridge, config),
        host_probes.run_folder,
        partial(host_probes.tls, config),
        *(partial(host_probes.peer, config, name) for name in sorted(config.peers)),
    ]


def _try(probe: Probe) -> list[Finding]:
    try:
        found = probe()
    except (OSError, MigratorError) as error:
        # One probe that fails in a way nobody thought of must not hide what the others have found.
        name = getattr(getattr(probe, "func", probe), "__name__", "probe")
        return [problem(name, f"could not be found out: {error}", "run it as root; report this if it stays")]
    return found if isinstance(found, list) else [found]


@click.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True)
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def main(config_file: Path, output: str) -> None:
    """Tell what this host has of what it needs. Exit code 3 if there is a problem."""
    found: list[Finding] = []
    try:
        config = configuration.load(config_file)
        found.append(ok("configuration", str(config_file)))
        if os.geteuid() != 0:
            found.append(problem("root", "most can only be found out by root", "run it as root"))
        found += diagnose(config)
    except MigratorError as error:
        found.append(problem("configuration", str(error), "see packaging/config.example.toml"))
    if output == "json":
        print(findings.as_json(found))
    else:
        for finding in found:
            print(f"{finding.severity.name.lower():8} {finding.subject:24} {finding.message}")
            if finding.remedy:
                print(f"{'':33} -> {finding.remedy}")
    has_problem = any(finding.severity is Severity.PROBLEM for finding in found)
    sys.exit(int(Exit.PREFLIGHT if has_problem else Exit.DONE))


if __name__ == "__main__":
    main()
