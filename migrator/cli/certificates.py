"""`migrator cert …`: a small certificate authority in a folder. Asks no agent."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.cli import output
from migrator.cli.base import Group, settings

if TYPE_CHECKING:
    from migrator.certificates import Issued

FORCE = click.option("--force", is_flag=True, help="Replace what is there.")


@click.group("cert", cls=Group)
def group() -> None:
    """Certificates for hosts and operators.

    \b
    migrator cert init /root/ca
    migrator cert issue /root/ca host-a --role peer --address 192.0.2.10
    migrator cert issue /root/ca alice --role operator
    """


@group.command("init")
@FORCE
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def init(folder: Path, force: bool) -> None:
    """Make a certificate authority: DIR/ca.crt, which every host gets, and DIR/ca.key, which none gets."""
    from migrator import certificates

    _show(certificates.init(folder, force=force))


@group.command("issue")
@click.option("--role", type=click.Choice(["peer", "operator", "viewer"]), required=True, help="A host is a peer.")
@click.option("--address", "addresses", multiple=True, metavar="IP|DNS", help="Address that the host is reached at.")
@click.option("--days", type=click.IntRange(1, 36500), default=825, show_default=True, help="How long it is valid.")
@FORCE
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("name")
def issue(*, folder: Path, name: str, role: str, addresses: Sequence[str], days: int, force: bool) -> None:
    """Make DIR/NAME.crt and DIR/NAME.key, signed by the authority in DIR."""
    from migrator import certificates

    _show(certificates.issue(folder, name, role, addresses, force=force, days=days))


def _show(issued: "Issued") -> None:
    if settings().json:
        output.write_json({"certificate": str(issued.certificate), "key": str(issued.key)})
    else:
        print(issued.certificate)
        print(issued.key)
