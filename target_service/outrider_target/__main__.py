"""`python -m outrider_target`, installed as `outrider-target`."""

from __future__ import annotations

import click

from outrider.serving.options import ServiceOptions, needs_serve_extra, service_options


@click.command(context_settings={"show_default": True, "auto_envvar_prefix": "OUTRIDER_TARGET"})
@service_options(default_model="builtin:target", default_port=50052)
def main(options: ServiceOptions) -> None:
    """Serve a target model: verify the proposals of many sessions in shared forward passes.

    Every option is also an environment variable: OUTRIDER_TARGET_ and its name, such as OUTRIDER_TARGET_MODEL.
    """
    with needs_serve_extra():
        from outrider.serving.service import serve
        from outrider.v1 import target_pb2_grpc
        from outrider_target.servicer import SERVICE_NAME, TargetServicer
    serve(options, SERVICE_NAME, TargetServicer(options), target_pb2_grpc.add_TargetServiceServicer_to_server)


if __name__ == "__main__":
    main(prog_name="python -m outrider_target")
