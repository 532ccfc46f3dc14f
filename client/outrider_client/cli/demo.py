"""`outrider demo`."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from outrider_client.bench.grid import make_grid
from outrider_client.bench.samples import Sample, Settings
from outrider_client.bench.summary import summarise
from outrider_client.bench.tables import speed_table
from outrider_client.cli.bench.options import NumberList
from outrider_client.cli.bench.running import measure_grid
from outrider_client.cli.chat import Chat
from outrider_client.cli.generate import write
from outrider_client.cli.options import (
    DRAFTED_STYLE,
    TARGET_STYLE,
    DraftNotice,
    as_json,
    out,
    print_json,
    shows_errors,
)
from outrider_client.cli.serve import started_pair
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.sync import SpeculativeClient
from outrider_client.text.text import prompt_to_ids

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to"
CHAT = SamplingParams(temperature=0.2, top_p=0.9, max_new_tokens=512)  # small models lose the thread when hotter
TARGET_ONLY = SpeculationParams(method="autoregressive")


@click.command(context_settings={"show_default": True})
@click.option("--prompt", default=PROMPT)
@click.option(
    "--temperature",
    type=NumberList(float),
    default="0,1",
    help="Values of the temperature; at each, both texts must be the same.",
)
@click.option("-k", "--num-speculative-tokens", type=click.IntRange(1), default=4, help="K: most proposals in a round.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=160)
@click.option("--seed", type=int, default=1)
@click.option("--repetitions", type=click.IntRange(1), default=3, help="Measurements of each, after the texts.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of each service.")
@click.option("--target-model", default="builtin:target")
@click.option("--draft-model", default="builtin:draft")
@click.option(
    "--chat", is_flag=True, help="Chat with --target-model instead; proposals are looked up, without --draft-model."
)
@as_json
@shows_errors
@click.pass_context
def demo(context: click.Context, prompt: str, temperature: list[float], as_json: bool, chat: bool, **values: Any) -> None:  # fmt: skip
    """See the embedded pair write a story, next to the target only.

    Starts both services on free loopback ports, shows the texts as they come, measures both methods alternately, and
    stops the services. With --chat it starts a target only, and answers what is typed, as `outrider chat` does.
    """
    if chat:
        _chat(context, values["target_model"], values["threads"])
        return
    models = values["target_model"], values["draft_model"]
    with started_pair(*models, values["threads"]) as pair, SpeculativeClient(pair.target, pair.draft) as client:
        texts = [_show(client, prompt, value, values, quiet=as_json) for value in temperature]
        samples, vocab_size, settings = _measure(client, prompt, temperature, values)
        notice = DraftNotice(pair.draft)
        for sample in samples:
            if sample.stats:
                notice.say(sample.stats)
    rows = summarise(samples, vocab_size)
    if as_json:
        print_json({"texts": texts, "summary": [row.as_dict() for row in rows]})
        return
    out.print()
    pair_name = f"{values['target_model']} with {values['draft_model']}"
    out.print(speed_table(rows, f"{pair_name}, {settings.rule_name}, {values['threads']} thread each"))


def _chat(context: click.Context, model: str, threads: int) -> None:
    """Answer what is typed with a target that is started for it, and with proposals from the conversation itself."""
    is_given = lambda name: context.get_parameter_source(name) is not ParameterSource.DEFAULT  # noqa: E731
    given = {param.name: param.opts[-1] for param in context.command.params if is_given(param.name)}
    for name in given.keys() - {"chat", "target_model", "threads"}:
        raise click.UsageError(f"--chat takes no {given[name]}: use `outrider chat` with a service")
    if "target_model" not in given:
        raise click.UsageError(
            "--chat needs --target-model, a model with a chat template; `make chat` fetches a small one"
        )
    with started_pair(model, None, threads) as pair, SpeculativeClient(pair.target, pair.draft) as client:
        Chat(client, CHAT, SpeculationParams(), DraftNotice(pair.draft)).run()


def _show(
    client: SpeculativeClient, prompt: str, temperature: float, values: dict[str, Any], quiet: bool
) -> dict[str, Any]:
    """Write the text with the target only and with the pair; return both."""
    sampling = SamplingParams(temperature=temperature, seed=values["seed"], max_new_tokens=values["max_new_tokens"])
    pair = SpeculationParams(num_speculative_tokens=values["num_speculative_tokens"])
    if quiet:
        single, together = (client.generate(prompt, sampling, how) for how in (TARGET_ONLY, pair))
    else:
        out.rule(f"target only, temperature {temperature:g}", align="left")
        single = write(client, prompt, sampling, TARGET_ONLY, False)
        out.rule(
            f"the pair, temperature {temperature:g}: [{DRAFTED_STYLE}]accepted from the draft[/], [{TARGET_STYLE}]the target's own[/]",
            align="left",
        )
        together = write(client, prompt, sampling, pair, True)
        if single.token_ids == together.token_ids:
            out.print(f"At temperature {temperature:g} the two texts are the same, token for token.", style="italic")
        else:
            out.print("The two texts differ: two tokens were equally likely up to rounding.", style="bold red")
    return {"temperature": temperature, "autoregressive": single.as_dict(), "speculative": together.as_dict()}


def _measure(
    client: SpeculativeClient, prompt: str, temperatures: list[float], values: dict[str, Any]
) -> tuple[list[Sample], int, Settings]:
    """Return the samples, the target's vocabulary size, and the settings."""
    grid = make_grid(("autoregressive", "speculative"), temperatures, [values["num_speculative_tokens"]])
    sampling = SamplingParams(seed=values["seed"], max_new_tokens=values["max_new_tokens"], ignore_eos=True)
    target = client.info().target
    settings = Settings(values["repetitions"], sampling=sampling).resolved(target)
    prompt_ids = prompt_to_ids(prompt, client.tokenizer, target.vocab_size)
    return measure_grid(client, [prompt_ids], grid, settings), target.vocab_size, settings
