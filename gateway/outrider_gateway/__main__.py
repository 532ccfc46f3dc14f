"""`python -m outrider_gateway`, installed as `outrider-gateway`, and as `outrider serve gateway`."""

from __future__ import annotations

import click

from outrider.common import extras
from outrider.common.doors import Doors, with_doors


def _listen(context: click.Context, param: click.Parameter, value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise click.BadParameter(f"{value!r}: give HOST:PORT, such as 127.0.0.1:8000", context, param)
    return value


@click.command(context_settings={"show_default": True, "auto_envvar_prefix": "OUTRIDER_GATEWAY"})
@click.option(
    "--pair",
    "pairs",
    multiple=True,
    default=["outrider=localhost:50052,localhost:50051"],
    metavar="NAME=TARGET[,DRAFT]",
    help="A pair of services, and the name by which callers ask for it; several may be given. The draft follows the last comma.",
)
@click.option(
    "--listen",
    default="127.0.0.1:8000",
    metavar="HOST:PORT",
    callback=_listen,
    help="Address to serve on; port 0 takes a free one.",
)
@with_doors
@click.option(
    "--service-key-file", metavar="FILE", help="File of the key that services are shown, where they ask for one."
)
@click.option(
    "--service-tls-ca",
    metavar="FILE",
    help="Authorities that services' certificates must come from; without, the system's, for addresses that begin with grpcs://.",
)
@click.option("--service-tls-cert", metavar="FILE", help="Certificate that services are shown, where they want one.")
@click.option("--service-tls-key", metavar="FILE", help="Its private key.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(0),
    default=600.0,
    metavar="SECONDS",
    help="Time for one request; 0 for no limit.",
)
@click.option("--max-requests", type=click.IntRange(1), default=256, help="Requests at once; more get 429.")
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=4 << 20,
    metavar="BYTES",
    help="Largest body of a request; larger ones get 413.",
)
@click.option(
    "--keepalive",
    type=click.FloatRange(0.01),
    default=5.0,
    metavar="SECONDS",
    help="Silence of a stream until a comment says that it lives.",
)
@click.option(
    "--target-patience",
    type=click.FloatRange(0),
    default=30.0,
    metavar="SECONDS",
    help="Time to wait for a target that fails; then 503.",
)
@click.option(
    "--grace",
    type=click.FloatRange(1),
    default=30.0,
    metavar="SECONDS",
    help="Time for running requests to end on SIGTERM; a second signal ends them at once.",
)
def main(
    pairs: tuple[str, ...],
    listen: str,
    service_key_file: str | None,
    service_tls_ca: str | None,
    service_tls_cert: str | None,
    service_tls_key: str | None,
    request_timeout: float,
    max_requests: int,
    max_body: int,
    keepalive: float,
    target_patience: float,
    grace: float,
    doors: Doors,
) -> None:
    """Serve OpenAI's HTTP interface in front of pairs of services.

    Every option is also an environment variable: OUTRIDER_GATEWAY_ and its name, such as OUTRIDER_GATEWAY_LISTEN.
    """
    host, _, port = listen.rpartition(":")
    try:
        from outrider_client.conversation.patience import Patience
        from outrider_client.credentials import Credentials, read_secret
        from outrider_client.errors import InvalidRequestError
        from outrider_gateway import serving
        from outrider_gateway.http import Options
        from outrider_gateway.pairs import PairAddress, Pairs
    except ModuleNotFoundError as error:
        raise click.ClickException(extras.missing(str(error.name), "the gateway", "http")) from error
    try:
        addresses = [PairAddress.parse(pair) for pair in pairs]
        key = read_secret("--service-key-file", service_key_file) if service_key_file else None
        credentials = Credentials.of(key, service_tls_ca, service_tls_cert, service_tls_key)
        options = Options(request_timeout or None, max_requests, max_body, keepalive, doors)
        patience = Patience(retry_s=target_patience)
        serving.serve(lambda: Pairs(addresses, patience, credentials), host.strip("[]"), int(port), options, grace)
    except (ValueError, InvalidRequestError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main(prog_name="python -m outrider_gateway")
