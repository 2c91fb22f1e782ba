"""A node's credentials in NVS: what a device has in its factory partition (``fctry``, namespace ``rmaker_creds``).

    found = read_credentials(Path("flash.bin"))                              # a whole flash, or the partition alone
    found = read_credentials(Path("fctry.bin"), keys=read_keys(Path("nvs_keys.bin")))
    with found.as_files() as (cert, key):
        context.load_cert_chain(cert, key)

The private key and the random bytes are in no ``repr``, no message and no log. Where a library wants files, they lie in
memory or, where that cannot be, in files of mode 0600 that are gone when the block ends.

Source: specification of RainMaker, section 8.3; of the NVS encryption, ESP-IDF nvs_sec_provider.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import hmac
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, FormatError, NotFoundError, OtaError

PARTITION = "fctry"
NAMESPACE = "rmaker_creds"
KEYS_SIZE = 64  # eky, tky
MAX_KEYS_FILE = 1 << 20

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----(.+?)-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What was found; None: not there. Certificate, key and request are PEM, without the NUL some tools append.

    ``where`` names the file and the partition, for messages. ``encrypted``: the partition was.
    """

    where: str
    node_id: str | None = None
    mqtt_host: str | None = None
    mqtt_cred_host: str | None = None
    client_cert: bytes | None = None
    client_key: bytes | None = field(default=None, repr=False)
    csr: bytes | None = None
    random: bytes | None = field(default=None, repr=False)
    encrypted: bool = False

    @contextlib.contextmanager
    def as_files(self) -> Iterator[tuple[str, str]]:
        """Paths of certificate and private key, good inside the block, and nobody else's to read.

        Raises:
            NotFoundError: one of them is not there.
            OSError: no such file can be made.
        """
        for key in ("client_cert", "client_key"):
            if getattr(self, key) is None:
                raise NotFoundError(f"{self.where} has no {key}")
        with private_file(self.client_cert or b"") as cert, private_file(self.client_key or b"") as key:
            yield cert, key


def read_keys(path: Path) -> bytes:
    """The 64 key bytes in a file: an ``nvs_keys`` partition, the bytes alone, or the 32 bytes of an HMAC key.

    Raises:
        OSError: it cannot be read.
        FormatError: it is none of these.
    """
    with path.open("rb") as file:
        data = file.read(MAX_KEYS_FILE)
    if len(data) == KEYS_SIZE:
        return data
    if len(data) == 32:  # the HMAC scheme: both halves come from one key in eFuse
        parts = (bytes.fromhex("5a5abeae") * 8, bytes.fromhex("a5a5dece") * 8)
        return b"".join(hmac.digest(data, part, "sha256") for part in parts)
    return ota_core.parse_nvs_keys(data)


def open_nvs(data: bytes, keys: bytes | None = None) -> tuple[ota_core.Nvs, bool]:
    """A partition, read with the keys or, where that shows nothing and plain shows something, without.

    Returns:
        The partition, and whether the keys were needed. In one flash some partitions may be encrypted and others not.

    Raises:
        ArgumentError: wrong size of data or keys.
        FormatError: a page of a newer format.
    """
    if keys is None:
        return ota_core.Nvs(data), False
    decrypted, plain = ota_core.Nvs(data, keys), ota_core.Nvs(data)
    if len(plain.items()) > len(decrypted.items()):
        return plain, False
    return decrypted, True


def read_credentials(
    path: Path, *, keys: bytes | None = None, partition: str = PARTITION, namespace: str = NAMESPACE
) -> Credentials:
    """Reads the credentials in a flash image, or in a dump of the partition.

    Args:
        path: of either.
        keys: 64 bytes where the partition is encrypted, see `read_keys`.
        partition: its label; of no meaning for a dump.
        namespace: in it.

    Raises:
        OSError: the file cannot be read.
        ArgumentError: it is neither.
        NotFoundError: there is no such partition or namespace.
        FormatError: partition table or pages cannot be read; also an encrypted partition without its keys.
    """
    data, where = _partition(path, partition)
    try:
        found, encrypted = open_nvs(data, keys)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error.message}") from None
    except FormatError as error:
        raise FormatError(f"{where}: {error.message}", status=error.status, device_code=error.device_code) from None
    if namespace not in found.namespaces:
        if not found.items() and found.damaged:
            hint = "it is encrypted, or damaged; its keys are needed" if keys is None else "damaged, or of other keys"
            raise FormatError(f"{where}: no entry can be read: {hint}", status="ERR_NVS")
        raise NotFoundError(f"{where} has no namespace {namespace}")
    return credentials_in(found, where=where, namespace=namespace, encrypted=encrypted)


def credentials_in(
    found: ota_core.Nvs, *, where: str = "NVS", namespace: str = NAMESPACE, encrypted: bool = False
) -> Credentials:
    """The credentials in an opened partition, as far as they are there. Names that are no text count as not there."""
    values: dict[str, bytes] = {}
    for item in found.items():
        if item.namespace == namespace and isinstance(item.value, str | bytes):
            raw = item.value if isinstance(item.value, bytes) else item.value.encode("utf-8", "surrogateescape")
            values[item.key] = raw if item.key == "random" else raw.rstrip(b"\0")

    def text(key: str) -> str | None:
        value = values.get(key, b"")
        return value.decode("ascii") if value and value.isascii() and value.decode("ascii").isprintable() else None

    return Credentials(
        where=where,
        node_id=text("node_id"),
        mqtt_host=text("mqtt_host"),
        mqtt_cred_host=text("mqtt_cred_host"),
        client_cert=values.get("client_cert") or None,
        client_key=values.get("client_key") or None,
        csr=values.get("csr") or None,
        random=values.get("random") or None,
        encrypted=encrypted,
    )


def describe(found: Credentials) -> dict[str, Any]:
    """What is there, ready for JSON: names, the certificate's digest and subject, and of secrets only their size."""
    return {
        "node_id": found.node_id,
        "mqtt_host": found.mqtt_host,
        "mqtt_cred_host": found.mqtt_cred_host,
        "certificate": None if found.client_cert is None else _describe_certificate(found.client_cert),
        "private_key": None
        if found.client_key is None
        else {"size": len(found.client_key), "kind": _pem_kind(found.client_key)},
        "csr": None if found.csr is None else {"size": len(found.csr)},
        "random": None if found.random is None else {"size": len(found.random)},
    }


def _describe_certificate(pem: bytes) -> dict[str, Any]:
    """SHA-256 of the DER form, as other tools show it, and the subject's common name; None: it is no certificate."""
    from rmaker_ota.config import certificate_common_name  # as late as cryptography, which it needs

    digest = name = None
    match = _PEM.search(pem)
    if match is not None and match[1] == b"CERTIFICATE":
        with contextlib.suppress(ValueError):
            digest = hashlib.sha256(binascii.a2b_base64(match[2])).hexdigest()
    with contextlib.suppress(OtaError, ImportError):
        name = certificate_common_name(pem, Path("client_cert"))
    return {"size": len(pem), "sha256": digest, "common_name": name}


def _pem_kind(pem: bytes) -> str | None:
    """``"EC PRIVATE KEY"``; None: not PEM."""
    match = _PEM.search(pem)
    return None if match is None else match[1].decode("ascii")


@contextlib.contextmanager
def private_file(data: bytes) -> Iterator[str]:
    """A path under which a library of this process can read some bytes while inside; on no disk where Linux allows.

    Raises:
        OSError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = os.memfd_create("rmaker-ota", os.MFD_CLOEXEC)
        except (AttributeError, OSError):
            file = -1
        else:
            stack.callback(os.close, file)
        path = f"/proc/self/fd/{file}"
        if file < 0 or not Path(path).exists():  # an old kernel, a seccomp filter, or no /proc
            named = stack.enter_context(tempfile.NamedTemporaryFile(prefix="rmaker-ota-"))  # mode 0600
            file, path = named.fileno(), named.name
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.lseek(file, 0, os.SEEK_SET)
        yield path


def _partition(path: Path, label: str) -> tuple[bytes, str]:
    """The bytes of a partition, and what messages call them."""
    from rmaker_ota import inspect  # 20 ms, only for those who keep credentials so
    from rmaker_ota.targets import chip_record

    with path.open("rb") as file:
        data = file.read(inspect.MAX_FILE + 1)
    if len(data) > inspect.MAX_FILE:
        raise ArgumentError(f"{path} is larger than {inspect.MAX_FILE >> 20} MiB")
    record = chip_record.load(path)
    offset = inspect.TABLE_OFFSET if record is None else record.table_offset
    if data[offset : offset + 2] != b"\xaa\x50":
        if not data or len(data) % inspect.SECTOR:
            raise ArgumentError(f"{path} is neither a flash image nor whole pages of an NVS partition")
        return data, str(path)
    table = ota_core.parse_partition_table(data[offset : offset + inspect.SECTOR], flash_size=len(data))
    for row in table.partitions:
        if row.label == label:
            return data[row.offset : row.end], f"{path}, partition {label}"
    raise NotFoundError(f"{path} has no partition {label}: {', '.join(row.label for row in table.partitions)}")
