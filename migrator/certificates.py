"""A small certificate authority in a folder: for hosts that have no other one.

A certificate names its owner (common name, and as DNS name in the SAN) and its role (a URI in the SAN). Hosts are
servers and clients, people only clients: an operator's certificate cannot stand in for a host.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrator.errors import AlreadyExists, ExecutionError, InvalidArgument, NotFound

ROLE_PREFIX = "migrator:role:"
CA_NAME = "ca"
CA_DAYS = 3650
DAYS = 825
# Hosts whose clocks are an hour apart, by a wrong time zone say, must accept a certificate that was made just now.
BACKDATE = datetime.timedelta(days=1)
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """What the owner of a certificate may do."""

    PEER = "peer"
    OPERATOR = "operator"
    VIEWER = "viewer"


@dataclass(frozen=True)
class Issued:
    """The files of a certificate and its private key."""

    certificate: Path
    key: Path


def init(folder: Path, *, force: bool = False) -> Issued:
    """Make a CA: ca.crt and ca.key in `folder`. Raises AlreadyExists unless `force`, ExecutionError."""
    files = Issued(folder / "ca.crt", folder / "ca.key")
    _refuse_existing(files, force)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"migrator CA {x509.random_serial_number() >> 96:016x}")])
    signed = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _store(files, signed, key)
    return files


def issue(
    folder: Path, name: str, role: Role | str, addresses: Sequence[str] = (), *, force: bool = False, days: int = DAYS
) -> Issued:
    """Make NAME.crt and NAME.key in the CA's folder. `addresses`: IP addresses and further DNS names of a host.

    Raises InvalidArgument, NotFound (no CA in the folder), AlreadyExists unless `force`, ExecutionError.
    """
    if not NAME.fullmatch(name) or name == CA_NAME:
        raise InvalidArgument(f"{name!r} cannot be the name in a certificate: lower-case letters, digits, - and . only")
    try:
        role = Role(role)
    except ValueError:
        raise InvalidArgument(f"{role!r} is not a role: take one of {', '.join(Role)}") from None
    if days <= 0:
        raise InvalidArgument(f"a certificate cannot be valid for {days} days")
    names = _alternative_names(name, role, addresses)
    files = Issued(folder / f"{name}.crt", folder / f"{name}.key")
    _refuse_existing(files, force)
    authority, authority_key = _load_authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.PEER:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signed = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _store(files, signed, key)
    return files


def load(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file. Raises NotFound, ExecutionError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"there is no certificate {path}: make one with `migrator cert`") from error
    except OSError as error:
        raise ExecutionError(f"read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ExecutionError(f"{path} is not a PEM certificate: {error}") from error


def role_of(certificate: x509.Certificate) -> Role | None:
    """The role in its SAN; None without exactly one that is known."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return role_from_uris(names.get_values_for_type(x509.UniformResourceIdentifier))


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names in its SAN."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def role_from_uris(uris: Sequence[str]) -> Role | None:
    """The one role among the URIs of a SAN; None without exactly one that is known."""
    roles = [uri.removeprefix(ROLE_PREFIX) for uri in uris if uri.startswith(ROLE_PREFIX)]
    return Role(roles[0]) if len(roles) == 1 and roles[0] in list(Role) else None


def _alternative_names(name: str, role: Role, addresses: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName(name), x509.UniformResourceIdentifier(ROLE_PREFIX + role)]
    for address in addresses:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            if not NAME.fullmatch(address):
                raise InvalidArgument(f"{address!r} is neither an IP address nor a DNS name") from None
            names.append(x509.DNSName(address))
    return names


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / "ca.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        certificate = load(folder / "ca.crt")
    except (FileNotFoundError, NotFound) as error:
        raise NotFound(f"there is no CA in {folder}: make one with `migrator cert init`") from error
    except OSError as error:
        raise ExecutionError(f"read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ExecutionError(f"{path} is not a private key without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ExecutionError(f"{path} is not the key of {folder / 'ca.crt'}")
    return certificate, key


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the signature is the authority's; says nothing about dates."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _refuse_existing(files: Issued, force: bool) -> None:
    if force:
        return
    for path in (files.certificate, files.key):
        if path.exists():
            raise AlreadyExists(f"{path} exists: remove it first, or force it to be replaced")


def _store(files: Issued, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        files.key.parent.mkdir(parents=True, exist_ok=True)
        _write(files.key, private, 0o600)
        _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise ExecutionError(f"write {error.filename}: {error.strerror}") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
