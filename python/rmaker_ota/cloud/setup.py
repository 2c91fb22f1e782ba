"""Makes everything a job service needs in one directory: authority, certificates, configurations, node credentials.

::

    DIR/ca.crt ca.key                    the authority; ca.crt is what everybody trusts
    DIR/server.crt server.key            of image server and broker
    DIR/service.crt service.key          of the job service as the broker's client
    DIR/cloud.toml                       for `rmaker-ota serve`
    DIR/mosquitto.conf mosquitto.acl     for `mosquitto -c`
    DIR/nodes/ID/                        credentials as host claiming leaves them, and node.toml for `rmaker-ota agent`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmaker_ota.cloud.broker import SERVICE_NAME, write_mosquitto
from rmaker_ota.cloud.ca import CertificateAuthority, NodeCredentials, first_name
from rmaker_ota.errors import DeviceError, StateError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Layout:
    """What `create` makes.

    Attributes:
        names: host names and addresses under which nodes reach this machine; the first is used in URLs.
        listen: address broker and image server listen on.
        https_port: of the image server.
        mqtt_port: of the broker.
        url: base of image URLs; empty: ``https://<first name>:<https_port>``.
    """

    names: tuple[str, ...] = LOOPBACK
    listen: str = "127.0.0.1"
    https_port: int = 8443
    mqtt_port: int = 8883
    url: str = ""


def create(directory: Path, layout: Layout, nodes: Sequence[str] = ()) -> None:
    """Fills a directory (made when missing).

    Raises:
        StateError: it holds an installation already.
        ArgumentError: an impossible host name or node id.
        DeviceError: a file cannot be written.
    """
    if (directory / "cloud.toml").exists():
        raise StateError(f"{directory / 'cloud.toml'}: there is an installation already; `serve add-node` adds nodes")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = directory.resolve()
        authority = CertificateAuthority.create(directory)
        names = list(dict.fromkeys([*layout.names, *LOOPBACK]))
        authority.issue_server(names, directory / "server.crt", directory / "server.key")
        authority.issue_client(SERVICE_NAME, directory / "service.crt", directory / "service.key")
        write_mosquitto(
            directory,
            host=layout.listen,
            port=layout.mqtt_port,
            ca=authority.path,
            cert=directory / "server.crt",
            key=directory / "server.key",
        )
        for node in nodes:
            add_node(directory, node, mqtt_port=layout.mqtt_port)
        (directory / "cloud.toml").write_text(_cloud_toml(layout))  # last: it says that all is there
    except OSError as error:
        raise _failed(directory, error) from error


def add_node(directory: Path, node_id: str, *, mqtt_port: int) -> NodeCredentials:
    """Makes the credentials of a node and a configuration to start from. The broker's host is the server's first name.

    Raises:
        StateError: there are some already, or the authority's files are damaged.
        ArgumentError: an impossible node id.
        DeviceError: a file cannot be read or written.
    """
    try:
        authority = CertificateAuthority.load(directory)
        mqtt_host = first_name(directory / "server.crt")
        credentials = authority.issue_node(node_id, directory / "nodes" / node_id, mqtt_host=mqtt_host)
        (credentials.directory / "node.toml").write_text(_node_toml(mqtt_port))
    except OSError as error:
        raise _failed(directory, error) from error
    return credentials


def _cloud_toml(layout: Layout) -> str:
    url = layout.url or f"https://{_bracketed(layout.names[0])}:{layout.https_port}"
    return f"""\
# Configuration of the job service: rmaker-ota serve --config cloud.toml
# Paths are relative to this file.

[service]
data_dir = "data"

[http]                                  # where nodes fetch images
host = {json.dumps(layout.listen)}
port = {layout.https_port}
url = {json.dumps(url)}
cert = "server.crt"
key = "server.key"
url_ttl_s = 86400                       # how long the URL of an image is good

[mqtt]
host = {json.dumps("localhost" if layout.listen in ("", "0.0.0.0", "::") else layout.listen)}
port = {layout.mqtt_port}
ca = "ca.crt"
cert = "service.crt"
key = "service.key"
basic_ingest = "both"                   # nodes publish on $aws/rules/... ("on"), on plain topics ("off"), or "both"
streams = false                         # true: images over MQTT as well, for nodes whose transport it is

[admin]                                 # where `rmaker-ota job` talks to the service
socket = "data/admin.sock"
"""


def _node_toml(mqtt_port: int) -> str:
    return f"""\
# Configuration of a node: rmaker-ota agent --config node.toml
# Paths are relative to this file.

[node]
name = "RMaker OTA node"

[mqtt]
credentials = "."                       # node.info, node.crt, node.key, endpoint.info
port = {mqtt_port}
ca = "../../ca.crt"

[ota]
type = "topics"
server_cert = "../../ca.crt"            # authority of the image server

[target]
uri = "esp32-image:flash.bin"           # where images go

[state]
path = "node.state"

[restart]
mode = "process"
"""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _failed(directory: Path, error: OSError) -> DeviceError:
    return DeviceError(f"{error.filename or directory}: {error.strerror}", device_code=error.errno or 0)
