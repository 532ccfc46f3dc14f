"""`python -m outrider.serving.healthcheck`: ask a server for its health. For containers: it imports no torch."""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.common.tls import ClientFiles, ClientTls

CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)  # no proxy between a server and itself


class UnhealthyError(Exception):
    """The server did not say SERVING; the message is a sentence that says what it did."""


@click.command(context_settings={"show_default": True})
@click.option("--address", required=True, metavar="HOST:PORT", help="Server to ask.")
@click.option("--service", default="", help="Full name of a service; empty asks whether the process lives.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=3.0, metavar="SECONDS", help="Time for the answer."
)
@click.option("--tls-ca", metavar="FILE", help="Speak TLS; the server's certificate comes from these authorities.")
@click.option(
    "--tls-name", metavar="NAME", help="Name that its certificate has, where that is not the one in --address."
)
@click.option("--tls-cert", metavar="FILE", help="Certificate to show, where the server wants one; its own will do.")
@click.option("--tls-key", metavar="FILE", help="Its private key.")
def main(
    address: str,
    service: str,
    timeout: float,
    tls_ca: str | None,
    tls_name: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> None:
    """Exit with 0 when a server says SERVING, else say why not on standard error and exit with 1."""
    try:
        files = ClientFiles(tls_ca, tls_cert, tls_key)
        check(address, service, timeout, files.read() if files.paths else None, tls_name)
    except (UnhealthyError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def check(
    address: str, service: str, timeout_s: float, tls: ClientTls | None = None, tls_name: str | None = None
) -> None:
    """Return when `service` at `address` says SERVING; with TLS, when its certificate has the name, too.

    Raises:
        UnhealthyError: it says something else, or nothing within `timeout_s` seconds.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    with _channel(address, tls, tls_name) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise UnhealthyError(_reason(address, service, timeout_s, error)) from error
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        raise UnhealthyError(f"{service or 'the server'} at {address} says {status}")


def _channel(address: str, tls: ClientTls | None, tls_name: str | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    names = [("grpc.ssl_target_name_override", tls_name)] if tls_name else []
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return grpc.secure_channel(address, credentials, options=[*CHANNEL_OPTIONS, *names])


def _reason(address: str, service: str, timeout_s: float, error: grpc.RpcError) -> str:
    code = error.code()
    if code == grpc.StatusCode.NOT_FOUND:
        return f"the server at {address} has no service {service!r}"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer within {timeout_s:g} s"
    return f"{address} cannot be asked ({code.name}): {error.details()}"


if __name__ == "__main__":
    main(prog_name="python -m outrider.serving.healthcheck")
