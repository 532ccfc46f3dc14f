"""`python -m outrider_draft`, installed as `outrider-draft`."""

from __future__ import annotations

import click

from outrider.serving.options import ServiceOptions, needs_serve_extra, service_options


@click.command(context_settings={"show_default": True, "auto_envvar_prefix": "OUTRIDER_DRAFT"})
@service_options(default_model="builtin:draft", default_port=50051)
@click.option("--greedy", is_flag=True, help="Propose the likeliest token in every session, with a support of one.")
def main(options: ServiceOptions) -> None:
    """Serve a draft model: propose tokens ahead of what is being verified.

    Every option is also an environment variable: OUTRIDER_DRAFT_ and its name, such as OUTRIDER_DRAFT_MODEL.
    """
    with needs_serve_extra():
        from outrider.serving.service import serve
        from outrider.v1 import draft_pb2_grpc
        from outrider_draft.servicer import SERVICE_NAME, DraftServicer
    serve(options, SERVICE_NAME, DraftServicer(options), draft_pb2_grpc.add_DraftServiceServicer_to_server)


if __name__ == "__main__":
    main(prog_name="python -m outrider_draft")
