"""The development authority: chains, names, files."""

from __future__ import annotations

import datetime
import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from rmaker_ota.cloud.ca import CertificateAuthority
from rmaker_ota.errors import ArgumentError, StateError

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path, clock=lambda: NOW)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def policy(authority: CertificateAuthority, *, days: int = 0) -> PolicyBuilder:
    return PolicyBuilder().store(Store([authority.certificate])).time(NOW + datetime.timedelta(days=days))


def server(authority: CertificateAuthority, *names: str) -> x509.Certificate:
    certificate = authority.directory / "server.crt"
    authority.issue_server(names, certificate, authority.directory / "server.key")
    return load(certificate)


def test_a_server_is_verified_under_each_of_its_names_and_no_other(authority: CertificateAuthority) -> None:
    certificate = server(authority, "localhost", "127.0.0.1", "::1", "ota.example.org")
    for name in (x509.DNSName("localhost"), x509.DNSName("ota.example.org")):
        chain = policy(authority).build_server_verifier(name).verify(certificate, [])
        assert chain == [certificate, authority.certificate]
    for address in ("127.0.0.1", "::1"):
        policy(authority).build_server_verifier(x509.IPAddress(ipaddress.ip_address(address))).verify(certificate, [])
    for other in (x509.DNSName("other.example.org"), x509.IPAddress(ipaddress.ip_address("127.0.0.2"))):
        with pytest.raises(VerificationError):
            policy(authority).build_server_verifier(other).verify(certificate, [])


def test_a_server_certificate_is_good_since_yesterday_and_for_a_year(authority: CertificateAuthority) -> None:
    certificate = server(authority, "localhost")
    name = x509.DNSName("localhost")
    for days in (-1, 396):
        policy(authority, days=days).build_server_verifier(name).verify(certificate, [])
    for days in (-2, 398):
        with pytest.raises(VerificationError):
            policy(authority, days=days).build_server_verifier(name).verify(certificate, [])


def test_another_authority_verifies_nothing_of_ours(authority: CertificateAuthority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = CertificateAuthority.create(tmp_path / "other", clock=lambda: NOW)
    with pytest.raises(VerificationError):
        policy(other).build_server_verifier(x509.DNSName("localhost")).verify(server(authority, "localhost"), [])


def test_a_node_gets_the_files_of_host_claiming(authority: CertificateAuthority, tmp_path: Path) -> None:
    directory = tmp_path / "nodes" / "N1"
    credentials = authority.issue_node("N1", directory, mqtt_host="broker.local")
    assert sorted(path.name for path in directory.iterdir()) == ["endpoint.info", "node.crt", "node.info", "node.key"]
    assert (directory / "node.info").read_bytes() == b"N1"
    assert (directory / "endpoint.info").read_bytes() == b"broker.local"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    certificate = load(credentials.certificate)
    assert [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["N1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate.verify_directly_issued_by(authority.certificate)
    with pytest.raises(VerificationError):
        policy(authority).build_server_verifier(x509.DNSName("N1")).verify(certificate, [])


def test_keys_are_p256_in_pkcs8_belong_to_their_certificates_and_are_private(authority: CertificateAuthority) -> None:
    server(authority, "localhost")
    for name in ("ca", "server"):
        path = authority.directory / f"{name}.key"
        assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP256R1)
        assert key.public_key() == load(path.with_suffix(".crt")).public_key()


def test_the_authority_can_sign_and_nothing_else_can(authority: CertificateAuthority) -> None:
    leaf = server(authority, "localhost")
    constraints = [
        certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        for certificate in (authority.certificate, leaf)
    ]
    assert [(each.critical, each.value.ca, each.value.path_length) for each in constraints] == [
        (True, True, 0),
        (True, False, None),
    ]
    usages = [
        certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        for certificate in (authority.certificate, leaf)
    ]
    assert [(usage.key_cert_sign, usage.digital_signature) for usage in usages] == [(True, False), (False, True)]


def test_loading_gives_the_same_authority(authority: CertificateAuthority) -> None:
    again = CertificateAuthority.load(authority.directory, clock=lambda: NOW)
    assert again.certificate == authority.certificate
    policy(authority).build_server_verifier(x509.DNSName("localhost")).verify(server(again, "localhost"), [])


def test_an_authority_is_never_replaced(authority: CertificateAuthority) -> None:
    before = authority.path.read_bytes()
    with pytest.raises(StateError, match="never replaced"):
        CertificateAuthority.create(authority.directory)
    assert authority.path.read_bytes() == before


def test_damaged_or_mixed_files_are_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = CertificateAuthority.create(tmp_path / "other")
    (tmp_path / "ca.key").write_bytes((other.directory / "ca.key").read_bytes())
    with pytest.raises(StateError, match=r"ca\.key is not the key of ca\.crt"):
        CertificateAuthority.load(tmp_path)
    (tmp_path / "ca.key").write_bytes(b"nonsense")
    with pytest.raises(StateError, match="damaged"):
        CertificateAuthority.load(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FileNotFoundError):
        CertificateAuthority.load(tmp_path)


def test_a_server_certificate_can_be_renewed_and_node_credentials_are_never_replaced(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    first, second = server(authority, "localhost"), server(authority, "localhost")
    assert first.serial_number != second.serial_number
    authority.issue_node("N1", tmp_path / "N1", mqtt_host="h")
    with pytest.raises(StateError, match="has credentials already"):
        authority.issue_node("N1", tmp_path / "N1", mqtt_host="h")


@pytest.mark.parametrize("name", ["", "a b", "a..b", "x" * 64 + ".org", "größe.org"])
def test_impossible_host_names_are_refused(authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(ArgumentError, match="expected a host name"):
        server(authority, name)


def test_impossible_nodes_and_servers_without_name_are_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        server(authority)
    with pytest.raises(ArgumentError, match="node id"):
        authority.issue_node("a/b", tmp_path / "x", mqtt_host="h")
