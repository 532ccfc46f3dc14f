"""Real services that are exchanged for others at their ports: a text is one model's, and a draft's is nobody's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator

import pytest

from outrider import ModelChangedError, SamplingParams, SpeculativeClient
from outrider_client.results import GenerationResult
from tests import tiny_models
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, Services

PROMPT, NUM_BEFORE = "Once", 3  # chunks before the exchange
SAMPLING = SamplingParams(seed=7, max_new_tokens=40)


class Pair:
    """A target and a draft with one client, and others to put in their places."""

    def __init__(self, services: Services, paths: dict[str, str]):
        self._services, self._kinds = services, {"target": TARGET, "draft": DRAFT}
        self.running = {name: services.start(kind, paths[name]) for name, kind in self._kinds.items()}
        self.client = SpeculativeClient(
            self.running["target"].address, self.running["draft"].address, patience=NEVER_WITHOUT_DRAFT
        )

    def exchange(self, name: str, path: str) -> None:
        """Put another model in the place of one of the services, at its address."""
        address = self.running[name].address
        self.running[name].stop()
        self.running[name] = self._services.start(self._kinds[name], path, listen=address)

    def write(self, midway: Callable[[], None] = lambda: None, **how) -> GenerationResult:
        """Write the text, with an event behind its first chunks."""
        stream = self.client.stream(PROMPT, SAMPLING, **({"num_speculative_tokens": 2} | how))
        for number, _ in enumerate(stream, start=1):
            if number == NUM_BEFORE:
                midway()
        return stream.result

    def close(self) -> None:
        self.client.close()
        for server in self.running.values():
            server.stop()


@pytest.fixture
def pair(services, paths) -> Iterator[Pair]:
    pair = Pair(services, paths)
    yield pair
    pair.close()


@pytest.fixture(scope="module", params=["weights", "tokenizer"])
def other(request, tmp_path_factory) -> str:
    """Another model of the same shape, or the target itself with a tokenizer whose ids mean other bytes."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tiny_models.byte_tokenizer()
    seed = 3 if request.param == "weights" else 2
    model = tiny_models.make_model("llama", seed, vocab_size=len(tokenizer))
    if request.param == "tokenizer":
        tokenizer = tiny_models.byte_tokenizer(rotated=1)
    return tiny_models.save(model, folder, tokenizer)


def test_another_target_in_mid_text_ends_the_text_and_the_next_begins_afresh(pair, other):
    target_only = pair.write(method="autoregressive")
    with pytest.raises(ModelChangedError) as caught:
        pair.write(lambda: pair.exchange("target", other))
    partial = caught.value.partial.token_ids
    assert 0 < len(partial) < SAMPLING.max_new_tokens
    assert partial == target_only.token_ids[: len(partial)]
    after = pair.write(method="autoregressive")
    with SpeculativeClient(pair.running["target"].address) as fresh:
        assert (after.text, after.token_ids) == as_pair(fresh.generate(PROMPT, SAMPLING, method="autoregressive"))
    assert after.text != target_only.text


def test_a_text_keeps_the_defaults_that_it_began_with(pair, paths, tmp_path):
    """In the target's place comes the same model, whose generation_config sets other defaults."""
    copied = shutil.copytree(paths["target"], tmp_path / "copied")
    file = copied / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.8, "top_k": 2}))
    target_only = pair.write(method="autoregressive")
    result = pair.write(lambda: pair.exchange("target", str(copied)))
    assert as_pair(result) == as_pair(target_only)
    assert result.stats.num_target_retries > 0
    with SpeculativeClient(pair.running["target"].address) as fresh:
        assert fresh.generate(PROMPT, SAMPLING, method="autoregressive").token_ids != target_only.token_ids


def as_pair(result: GenerationResult) -> tuple[str, list[int]]:
    return result.text, result.token_ids


@pytest.mark.parametrize("in_mid_text", [True, False])
def test_another_draft_changes_no_letter(pair, other, in_mid_text):
    target_only = pair.write(method="autoregressive")
    exchange = lambda: pair.exchange("draft", other)  # noqa: E731
    if not in_mid_text:
        assert pair.write().token_ids == target_only.token_ids
        exchange()
    result = pair.write(exchange if in_mid_text else lambda: None)
    assert as_pair(result) == as_pair(target_only)
    assert result.stats.num_draft_failures > 0
    assert as_pair(pair.write()) == as_pair(target_only)
