"""A development certificate authority: certificates for the servers of one installation and for its nodes.

Keys are ECDSA P-256, PKCS#8 PEM, mode 0600 from the moment they exist. Servers get their names and addresses as subject
alternative names, which is what clients look at; nodes get their id as common name, which is what brokers look at. Node
credentials lie in the files of host claiming (specification of the protocol, section 8.4): ``node.info``, ``node.crt``,
``node.key``, ``endpoint.info``. There is no revocation: for development and closed networks.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rmaker_ota.cloud.jobs import valid_node_id
from rmaker_ota.cloud.links import write_private
from rmaker_ota.errors import ArgumentError, StateError

CA_DAYS = 3650
NODE_DAYS = 3650
SERVER_DAYS = 397  # what TLS clients of large vendors accept at most
CLOCK_SLACK = datetime.timedelta(days=1)  # certificates are good since yesterday, for clocks that are behind
CA_NAME = "RMaker OTA development CA"
MAX_COMMON_NAME = 64  # characters (X.520 ub-common-name)

Clock = Callable[[], datetime.datetime]


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, slots=True)
class NodeCredentials:
    """The files of one node."""

    node_id: str
    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "node.crt"

    @property
    def key(self) -> Path:
        return self.directory / "node.key"


class CertificateAuthority:
    """An authority whose certificate and key are ``ca.crt`` and ``ca.key`` in a directory.

    Use `create` or `load`.
    """

    def __init__(
        self,
        directory: Path,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        *,
        clock: Clock = _utc_now,
    ) -> None:
        self.directory = directory
        self.certificate = certificate
        self._key = key
        self._clock = clock

    @property
    def path(self) -> Path:
        """The certificate file, which clients trust."""
        return self.directory / "ca.crt"

    @classmethod
    def create(cls, directory: Path, *, clock: Clock = _utc_now) -> CertificateAuthority:
        """Makes a new authority in an existing directory.

        Raises:
            StateError: there is one already.
            OSError: the files cannot be written.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            _builder(name, name, key.public_key(), clock(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        try:
            write_private(directory / "ca.key", _key_pem(key))
        except FileExistsError:
            raise StateError(f"{directory / 'ca.key'}: there is an authority already; it is never replaced") from None
        (directory / "ca.crt").write_bytes(_certificate_pem(certificate))
        return cls(directory, certificate, key, clock=clock)

    @classmethod
    def load(cls, directory: Path, *, clock: Clock = _utc_now) -> CertificateAuthority:
        """Opens the authority in a directory.

        Raises:
            StateError: its files are damaged or do not belong together.
            OSError: they cannot be read.
        """
        certificate_pem, key_pem = (directory / "ca.crt").read_bytes(), (directory / "ca.key").read_bytes()
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
            certificate.verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise StateError(f"{directory}: ca.crt or ca.key is damaged: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise StateError(f"{directory}: ca.key is not the key of ca.crt")
        return cls(directory, certificate, key, clock=clock)

    def issue_server(self, names: Sequence[str], certificate: Path, key: Path) -> None:
        """Writes a server certificate and its key.

        Args:
            names: host names and IP addresses clients use; the first one is the common name, too.
            certificate: the file to write; an old one is replaced.
            key: the same for the key.

        Raises:
            ArgumentError: no name, or an impossible one.
            OSError: a file cannot be written.
        """
        if not names:
            raise ArgumentError("a server certificate needs at least one host name or address")
        names = list(dict.fromkeys(names))
        self._issue(
            names[0][:MAX_COMMON_NAME],
            names=x509.SubjectAlternativeName([_general_name(name) for name in names]),
            purpose=ExtendedKeyUsageOID.SERVER_AUTH,
            days=SERVER_DAYS,
            certificate_path=certificate,
            key_path=key,
        )

    def issue_client(self, common_name: str, certificate: Path, key: Path) -> None:
        """Writes a client certificate and its key; arguments and errors as for `issue_server`."""
        self._issue(
            common_name,
            names=None,
            purpose=ExtendedKeyUsageOID.CLIENT_AUTH,
            days=NODE_DAYS,
            certificate_path=certificate,
            key_path=key,
        )

    def issue_node(self, node_id: str, directory: Path, *, mqtt_host: str) -> NodeCredentials:
        """Writes the credentials of a node into a directory of its own (made when missing).

        Args:
            node_id: the node's id, and its certificate's common name.
            mqtt_host: host name of the broker, for ``endpoint.info``.

        Raises:
            ArgumentError: an impossible node id.
            StateError: the directory holds credentials already.
            OSError: a file cannot be written.
        """
        if not valid_node_id(node_id):
            raise ArgumentError(f"{node_id!r} is not a node id: expected letters, digits or _ . : -")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        credentials = NodeCredentials(node_id, directory)
        if credentials.key.exists():
            raise StateError(f"{credentials.key}: this node has credentials already")
        self.issue_client(node_id, credentials.certificate, credentials.key)
        (directory / "node.info").write_text(node_id, encoding="utf-8")
        (directory / "endpoint.info").write_text(mqtt_host, encoding="utf-8")
        return credentials

    def _issue(
        self,
        common_name: str,
        *,
        names: x509.SubjectAlternativeName | None,
        purpose: x509.ObjectIdentifier,
        days: int,
        certificate_path: Path,
        key_path: Path,
    ) -> None:
        if not 0 < len(common_name) <= MAX_COMMON_NAME:
            raise ArgumentError(f"{common_name!r}: expected 1 to {MAX_COMMON_NAME} characters in a certificate's name")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = (
            _builder(subject, self.certificate.subject, key.public_key(), self._clock(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        key_path.unlink(missing_ok=True)
        write_private(key_path, _key_pem(key))
        certificate_path.write_bytes(_certificate_pem(certificate))


def first_name(path: Path) -> str:
    """The first host name or address in a server certificate.

    Raises:
        StateError: it is not a certificate, or has no such name.
        OSError: it cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(next(iter(names)).value)
    except (ValueError, x509.ExtensionNotFound, StopIteration) as error:
        raise StateError(f"{path}: not a server certificate: {error}") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.removesuffix(".").split(".")
    if not name.isascii() or len(name) > 253 or not all(0 < len(label) <= 63 for label in labels) or " " in name:
        raise ArgumentError(f"{name!r}: expected a host name (international ones as xn--...) or an IP address")
    return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
