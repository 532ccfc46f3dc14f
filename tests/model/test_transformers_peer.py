"""What the benchmark compares with: transformers' own generate, without the defaults that would change the task."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider_client.bench.samples import PEERS, Cell, Settings
from outrider_client.bench.transformers_peer import PeerOptions, TransformersPeer, draft_config, load_peer
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams
from tests import tiny_models

PROMPT = [5, 40, 33]
LENGTH = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A pair whose checkpoints name an end of sequence that the target says soon, and sample by themselves."""
    folder = tmp_path_factory.mktemp("peers")
    target = tiny_models.make_model("llama", 1)
    models = {"target": target, "draft": tiny_models.disagreeing_copy(target, 2)}
    for model in models.values():
        model.generation_config.update(eos_token_id=greedy_ids(target)[2], do_sample=True, top_k=1, max_length=5)
    return {name: tiny_models.save(model, folder / name) for name, model in models.items()}


def greedy_ids(model) -> list[int]:
    token_ids = list(PROMPT)
    for _ in range(LENGTH):
        with torch.inference_mode():
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(PROMPT) :]


def make_peer(paths, ignore_eos: bool = True, eos_token_ids: tuple[int, ...] = (), context_length: int = 128):
    options = PeerOptions(paths["target"], paths["draft"], "float64", "cpu", context_length, eos_token_ids, threads=1)
    return load_peer(options, Settings(sampling=SamplingParams(max_new_tokens=LENGTH, ignore_eos=ignore_eos)))


@pytest.fixture(scope="module")
def peer(paths) -> TransformersPeer:
    return make_peer(paths)


def test_it_has_the_processors_of_the_settings(paths):
    asked = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_tokens": 2}
    sampling = SamplingParams(max_new_tokens=LENGTH, bad_words=[[3], [4, 5]], logit_bias={6: 1.5}, **asked)
    options = PeerOptions(paths["target"], paths["draft"], "float64", "cpu", 128, (), threads=1)
    config = load_peer(options, Settings(sampling=sampling))._config(Cell("transformers", 0.0), len(PROMPT))
    assert (config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens) == (1.3, 3, 2)
    assert (config.bad_words_ids, config.sequence_bias) == ([[3], [4, 5]], [[[6], 1.5]])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", PEERS["transformers"])
def test_every_method_makes_texts_of_the_length_asked_for(peer, method, temperature):
    timeline, stats = peer.generate(PROMPT, Cell(method, temperature, 3), seed=1)
    assert timeline.num_tokens == LENGTH
    assert timeline.arrivals_s == sorted(timeline.arrivals_s)
    assert 0 < timeline.arrivals_s[-1] <= timeline.wall_s
    assert stats is None
    assert (timeline.num_tokens_per_chunk == [1] * LENGTH) == (method == "transformers")


def test_assistance_by_the_target_itself_accepts_everything(paths):
    """Three proposals and a bonus token in each round, as transformers does it."""
    peer = make_peer({"target": paths["target"], "draft": paths["target"]})
    timeline, _ = peer.generate(PROMPT, Cell("transformers-assisted", 0.0, 3), seed=1)
    assert timeline.num_tokens_per_chunk == [4, 4, 4]


def test_texts_end_where_the_services_texts_end(paths):
    """The third greedy token is the end of sequence; it counts, as with us."""
    model = AutoModelForCausalLM.from_pretrained(paths["target"], dtype=torch.float64)
    end = greedy_ids(model)[2]
    peer = make_peer(paths, ignore_eos=False, eos_token_ids=(end,))
    assert peer.generate(PROMPT, Cell("transformers", 0.0), seed=1)[0].num_tokens == greedy_ids(model).index(end) + 1
    assert make_peer(paths, ignore_eos=False).generate(PROMPT, Cell("transformers", 0.0), 1)[0].num_tokens == LENGTH


def test_the_context_limits_a_text(paths):
    peer = make_peer(paths, context_length=len(PROMPT) + 4)
    assert peer.generate(PROMPT, Cell("transformers", 0.0), seed=1)[0].num_tokens == 4


def test_a_batch_has_prompts_of_several_lengths_and_a_timeline_for_each(peer):
    timelines = peer.generate_batch([PROMPT, PROMPT[:1], PROMPT * 2], Cell("transformers", 1.0, num_users=3), seed=1)
    assert [one.num_tokens_per_chunk for one in timelines] == [[1] * LENGTH] * 3


def test_constant_assistance_is_constant_and_the_librarys_own_is_left_alone():
    constant = draft_config(Cell("transformers-assisted", 0.0, 7))
    assert (constant.num_assistant_tokens, constant.num_assistant_tokens_schedule) == (7, "constant")
    assert constant.assistant_confidence_threshold == 0.0
    assert draft_config(Cell("transformers-heuristic", 0.0)).num_assistant_tokens_schedule == "heuristic"
    dynamic = draft_config(Cell("transformers-dynamic", 0.0))
    assert dynamic.num_assistant_tokens is dynamic.assistant_confidence_threshold is None


def test_what_the_heuristic_learns_is_kept_for_the_next_text_of_its_cell(paths):
    peer = make_peer({"target": paths["target"], "draft": paths["target"]})
    cell = Cell("transformers-heuristic", 0.0)
    first, _ = peer.generate(PROMPT, cell, seed=1)
    second, _ = peer.generate(PROMPT, cell, seed=1)
    assert first.num_tokens_per_chunk[0] == 6  # five and the bonus token
    assert second.num_tokens_per_chunk[0] > 6


def test_a_model_that_is_not_here_is_named(paths):
    with pytest.raises(InvalidRequestError, match="loads the services' models here: /nowhere/at/all cannot be loaded"):
        make_peer({"target": paths["target"], "draft": "/nowhere/at/all"})
