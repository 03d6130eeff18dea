"""The small certificate authority."""

import stat
from pathlib import Path

import pytest
from cryptography import x509

from migrator import certificates
from migrator.certificates import Role
from migrator.errors import AlreadyExists, ExecutionError, InvalidArgument, NotFound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.init(tmp_path / "ca")
    return tmp_path / "ca"


def test_a_host_carries_its_name_role_and_addresses(folder: Path) -> None:
    issued = certificates.issue(folder, "host-a", "peer", ["10.77.1.1", "fd77::1", "host-a.example"])
    certificate = certificates.load(issued.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["host-a", "host-a.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.77.1.1", "fd77::1"]
    assert certificates.role_of(certificate) is Role.PEER
    assert certificates.is_signed_by(certificate, certificates.load(folder / "ca.crt"))


def test_only_a_peer_can_be_a_server(folder: Path) -> None:
    def purposes(role: Role) -> x509.ExtendedKeyUsage:
        certificate = certificates.load(certificates.issue(folder, f"x-{role}", role).certificate)
        return certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value

    server = x509.oid.ExtendedKeyUsageOID.SERVER_AUTH
    assert [server in purposes(role) for role in (Role.PEER, Role.OPERATOR, Role.VIEWER)] == [True, False, False]


def test_keys_are_for_their_owner_only(folder: Path) -> None:
    issued = certificates.issue(folder, "alice", "operator")
    for key in (issued.key, folder / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_nothing_is_overwritten_unless_forced(folder: Path) -> None:
    issued = certificates.issue(folder, "alice", "operator")
    before = issued.certificate.read_bytes()
    with pytest.raises(AlreadyExists, match="alice"):
        certificates.issue(folder, "alice", "viewer")
    with pytest.raises(AlreadyExists, match=r"ca\.crt"):
        certificates.init(folder)
    assert issued.certificate.read_bytes() == before
    certificates.issue(folder, "alice", "viewer", force=True)
    assert certificates.role_of(certificates.load(issued.certificate)) is Role.VIEWER


@pytest.mark.parametrize("name", ["", "ca", "../x", "A", "a b", "-a"])
def test_names_that_cannot_be(folder: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        certificates.issue(folder, name, "peer")


def test_other_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="role"):
        certificates.issue(folder, "a", "root")
    with pytest.raises(InvalidArgument, match="neither"):
        certificates.issue(folder, "a", "peer", ["10.0.0.1/8"])
    with pytest.raises(NotFound, match="migrator cert init"):
        certificates.issue(tmp_path / "none", "a", "peer")
    certificates.init(tmp_path / "other")
    (folder / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    with pytest.raises(ExecutionError, match="not the key of"):
        certificates.issue(folder, "a", "peer")


@pytest.mark.parametrize("uris", [[], ["migrator:role:root"], ["migrator:role:peer", "migrator:role:viewer"], ["peer"]])
def test_exactly_one_known_role_counts(uris: list[str]) -> None:
    assert certificates.role_from_uris(uris) is None
