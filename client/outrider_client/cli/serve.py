"""`outrider serve`: the services, each by itself or all of one machine as one foreground command."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from types import FrameType

import click

from outrider_client.cli.options import err, shows_errors
from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.errors import ServiceFailedError
from outrider_client.local_pair import LocalService, PairAddresses, cores_each, local_pair

PROGRAMS = ("draft", "gateway", "target")  # installed as outrider-draft and so on
COLOURS = {"target": "yellow", "draft": "green", "gateway": "cyan"}
LOOK_S = 0.2  # between two looks whether a service ended
KILL_S = 5.0  # more than a service's own grace


class _Services(click.Group):
    """The programs of the services, loaded when they are named: the client does not know them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *PROGRAMS])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in PROGRAMS:
            return super().get_command(context, name)
        (program,) = entry_points(group="console_scripts", name=f"outrider-{name}")
        return program.load()


@click.group(cls=_Services)
def serve() -> None:
    """Run a service, or a pair with its gateway."""


@contextmanager
def started_pair(target_model: str, draft_model: str | None, threads: int | None) -> Iterator[PairAddresses]:
    """As `local_pair`, and say meanwhile what is waited for."""
    with ExitStack() as stack:
        with err.status(f"starting the target service{' and the draft service' if draft_model else ''}"):
            pair = stack.enter_context(local_pair(target_model, draft_model, threads))
        yield pair


@serve.command(context_settings={"show_default": True})
@click.option("--target-model", help="As --model of `outrider serve target`.  [default: builtin:target]")
@click.option(
    "--draft-model",
    help=f"As --model of `outrider serve draft`; `{LOOKUP_DRAFT}` for none.  [default: builtin:draft]",
)
@click.option("--target-listen", default="127.0.0.1:50052", metavar="HOST:PORT", help="Address of the target service.")
@click.option("--draft-listen", default="127.0.0.1:50051", metavar="HOST:PORT", help="Address of the draft service.")
@click.option(
    "--http",
    is_flag=False,
    flag_value="127.0.0.1:8000",
    metavar="[HOST:PORT]",
    help="Run a gateway too, at this address or at 127.0.0.1:8000.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of each service; by default they share the cores.",
)
@click.option("--grace", type=click.FloatRange(0), default=30.0, metavar="SECONDS", help="As of the services.")
@shows_errors
def pair(
    target_model: str | None,
    draft_model: str | None,
    target_listen: str,
    draft_listen: str,
    http: str | None,
    threads: int | None,
    grace: float,
) -> None:
    """Run a target and a draft service on this machine until Ctrl-C, with their logs side by side.

    Other options of the services are their environment variables, such as OUTRIDER_TARGET_MAX_SESSIONS. If one of them
    ends, all end. A second Ctrl-C ends what still runs.
    """
    looks_up = draft_model == LOOKUP_DRAFT
    count = str(threads or cores_each(1 if looks_up else 2))
    shared = ["--threads", count, "--grace", str(grace)]
    with _ended_by_signals(), ExitStack() as stack:

        def start(role: str, *arguments: str) -> LocalService:
            child = LocalService(f"outrider_{role}", arguments, _prefixed(role))
            services[role] = stack.enter_context(child)
            stack.callback(child.stop, grace + KILL_S)
            return child

        services: dict[str, LocalService] = {}
        start("target", *_model(target_model), "--listen", target_listen, *shared)
        if not looks_up:
            start("draft", *_model(draft_model), "--listen", draft_listen, *shared)
        found = {role: service.address() for role, service in services.items()}
        draft = found.get("draft", LOOKUP_DRAFT)
        if http:
            gateway = start("gateway", "--listen", http, "--pair", f"outrider={found['target']},{draft}")
            click.echo(f"OpenAI's HTTP and a page to chat: {gateway.address()}")
        click.echo(
            f"The pair is ready: outrider generate --target {found['target']} --draft {draft} 'Once upon a time'"
        )
        _wait_for_one_to_end(services)


def _model(model: str | None) -> list[str]:
    return ["--model", model] if model else []


def _prefixed(role: str) -> Callable[[str], None]:
    prefix = click.style(f"{role:7} | ", fg=COLOURS[role])
    return lambda line: click.echo(f"{prefix}{line}", err=True)


def _wait_for_one_to_end(services: dict[str, LocalService]) -> None:
    while True:
        for role, service in services.items():
            if (status := service.process.poll()) is not None:
                raise ServiceFailedError(f"the {role} service ended with status {status}, so the others end too")
        time.sleep(LOOK_S)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave the block in order at SIGINT, SIGTERM and a terminal's end, and call that a success."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        click.echo("ended", err=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
