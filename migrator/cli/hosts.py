"""`migrator hosts` and `migrator doctor`."""

import subprocess
import sys

import click

from migrator.cli import output
from migrator.cli.base import Command, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.settings import endpoint
from migrator.errors import Exit, Unreachable
from migrator.units import format_size
from migrator.v1 import host_pb2
from migrator.v1.host_pb2_grpc import HostServiceStub

MARKS = {
    host_pb2.SEVERITY_OK: "ok",
    host_pb2.SEVERITY_WARNING: "warning",
    host_pb2.SEVERITY_PROBLEM: "problem",
}


@click.command(cls=Command)
def hosts() -> None:
    """List the host that is asked and its peers, each asked now whether it answers."""
    with agent() as channel:
        found = HostServiceStub(channel).ListHosts(host_pb2.ListHostsRequest(), timeout=READ_S).hosts
    if settings().json:
        output.write_json([output.to_object(host) for host in found])
        return
    rows = [
        [
            host.name,
            host.address,
            "yes" if host.reachable else "no",
            host.version or "-",
            host.kernel or "-",
            f"{host.containers_running}/{host.containers_total}" if host.reachable else "-",
            format_size(host.memory_available_bytes) if host.reachable else "-",
            format_size(host.disk_available_bytes) if host.reachable else "-",
        ]
        for host in found
    ]
    output.write_table(["HOST", "ADDRESS", "REACHABLE", "VERSION", "KERNEL", "RUNNING", "MEMORY", "DISK"], rows)
    for host in found:
        if not host.reachable:
            print(f"{host.name}: {output.printable(host.error)}", file=sys.stderr)


@click.command(cls=Command)
def doctor() -> int:
    """Tell what this host has of what it needs, and what to do about the rest. Exit code 3 if there is a problem.

    Where no agent runs, this machine is looked at directly.
    """
    try:
        with agent() as channel:
            findings = HostServiceStub(channel).Diagnose(host_pb2.DiagnoseRequest(), timeout=READ_S * 2).findings
    except Unreachable as error:
        if endpoint(settings()).socket is None:
            raise
        print(f"{error}; looking by itself", file=sys.stderr)
        return subprocess.run([sys.executable, "-m", "agent.doctor", "-o", settings().output], check=False).returncode
    if settings().json:
        output.write_json([output.to_object(finding) for finding in findings])
    else:
        width = max((len(finding.subject) for finding in findings), default=0)
        for finding in findings:
            mark = MARKS.get(finding.severity, "unknown")
            print(f"{mark:7}  {finding.subject:{width}}  {output.printable(finding.message)}")
            if finding.remedy and finding.severity != host_pb2.SEVERITY_OK:
                print(f"{'':7}  {'':{width}}  -> {output.printable(finding.remedy)}")
    problem = any(finding.severity == host_pb2.SEVERITY_PROBLEM for finding in findings)
    return int(Exit.PREFLIGHT) if problem else int(Exit.DONE)
