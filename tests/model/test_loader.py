"""What is loaded describes itself rightly; what cannot be run exactly is refused by name, in one sentence."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from outrider.engine.backends.batch import Feed
from outrider.engine.models.loader import (
    FINGERPRINT_BLOCK,
    LoadedModel,
    ModelOptions,
    ModelRefusedError,
    TokenizerFiles,
    load,
)
from outrider.engine.models.probe import Probe
from outrider.engine.models.streaming import gguf_names, outline_of
from tests.gguf_files import write_gguf
from tests.model.against_transformers import fastest_pass
from tests.tiny_models import CONTEXT_LENGTH, FAMILIES, REFUSED_FAMILIES, VOCAB_SIZE, byte_tokenizer, make_model, save


def load_from(folder: Path | str, **options) -> LoadedModel:
    return load(ModelOptions(**({"model": str(folder), "dtype": "float64", "device": "cpu"} | options)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Return the folder of a model with a tokenizer whose embedding has rows beyond it."""
    return save(
        make_model("llama", 0, vocab_size=300, eos_token_id=1), tmp_path_factory.mktemp("llama"), byte_tokenizer()
    )


class TestLoaded:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_describes_itself(self, family, tmp_path):
        model = load_from(save(make_model(family, 0), tmp_path))
        assert (model.architecture, model.vocab_size, model.context_length) == (family, VOCAB_SIZE, CONTEXT_LENGTH)
        assert (model.device, model.dtype, model.eos_token_ids, model.tokenizer) == ("cpu", "float64", (), None)

    def test_rows_are_those_of_the_saved_weights(self, llama):
        ids = [5, 80, 255, 7]
        runner = load_from(llama).choice.runner
        rows = runner.forward([Feed(runner.new_cache(), ids, 4)])
        own = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
        with torch.inference_mode():
            expected = own(input_ids=torch.tensor([ids])).logits[0]
        assert (rows - expected).abs().max() < 1e-5  # transformers' norms go through float32, whose rounding is 6e-8

    def test_accelerate_places_the_same_model(self, llama):
        ids = [5, 80, 255, 7]
        placed, plain = load_from(llama, device_map="auto").choice.runner, load_from(llama).choice.runner
        rows = [runner.forward([Feed(runner.new_cache(), ids, 4)]) for runner in (placed, plain)]
        assert torch.equal(*rows)

    @pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
    def test_weights_have_the_type_that_was_asked_for(self, llama, dtype):
        """On a CPU, auto is float32 whatever the checkpoint has: half precision is slow there."""
        model = load_from(llama, dtype=dtype)
        assert model.dtype == ("float32" if dtype == "auto" else dtype)
        rows = model.choice.runner.forward([Feed(model.choice.runner.new_cache(), [5, 80, 255], 1)])
        assert rows.isfinite().all()

    def test_the_vocabulary_is_that_of_the_head_and_the_pieces_those_of_the_tokenizer(self, llama):
        model = load_from(llama)
        assert model.tokenizer is not None
        assert (model.vocab_size, len(model.tokenizer.pieces)) == (300, 258)

    @pytest.mark.parametrize(
        ("in_generation_config", "in_config", "expected"),
        [(1, None, (1,)), ([1, 5], 1, (1, 5)), (None, 7, (7,)), (None, [7, 8], (7, 8)), (None, None, ())],
    )
    def test_end_of_sequence_ids_are_the_generations_before_the_models(
        self, tmp_path, in_generation_config, in_config, expected
    ):
        model = make_model("llama", 0, eos_token_id=in_config)
        model.generation_config.eos_token_id = in_generation_config
        model.generation_config.pad_token_id = 0
        folder = save(model, tmp_path)
        assert load_from(folder).eos_token_ids == expected


class TestGguf:
    """The format of llama.cpp, read by transformers: the same tensors under other names, rotary halves interleaved."""

    def test_a_file_gives_the_model_that_was_written(self, tmp_path):
        """float32: three layers of sums that round by 2^-24 of values up to 10 make some 1e-5."""
        model, path, ids = make_model("llama", 0, vocab_size=259), tmp_path / "tiny.gguf", [5, 80, 258, 7]
        write_gguf(model, path)
        loaded = load_from(path, dtype="float32")
        assert (loaded.architecture, loaded.vocab_size, loaded.context_length) == ("llama", 259, CONTEXT_LENGTH)
        assert loaded.eos_token_ids == (1,)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0]
        rows = loaded.choice.runner.forward([Feed(loaded.choice.runner.new_cache(), ids, 4)])
        assert (rows - expected).abs().max() < 1e-4
        assert loaded.tokenizer is not None
        tokenizer = Tokenizer.from_str(loaded.tokenizer.tokenizer_json.decode())
        assert tokenizer.decode(tokenizer.encode("the € end").ids) == "the € end"
        assert 258 in tokenizer.encode("the").ids

    @pytest.mark.parametrize("part", ["00001", "00003"])
    def test_files_of_a_split_model_are_one(self, tmp_path, part):
        """Any of them names it. The head is in the last, and the settings are in the first."""
        model, ids = make_model("llama", 0, vocab_size=259), [5, 80, 258, 7]
        write_gguf(model, tmp_path / "tiny.gguf", most_tensors=12)
        assert len(list(tmp_path.iterdir())) == 3
        runner = load_from(tmp_path / f"tiny-{part}-of-00003.gguf", dtype="float32").choice.runner
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0]
        assert (runner.forward([Feed(runner.new_cache(), ids, 4)]) - expected).abs().max() < 1e-4

    def test_a_split_model_without_one_of_its_files(self, tmp_path):
        write_gguf(make_model("llama", 0, vocab_size=259), tmp_path / "tiny.gguf", most_tensors=12)
        (tmp_path / "tiny-00002-of-00003.gguf").unlink()
        with pytest.raises(
            ModelRefusedError,
            match=r"is one of 3 files, and tiny-00002-of-00003\.gguf is not beside it: fetch all",
        ):
            load_from(tmp_path / "tiny-00001-of-00003.gguf")

    @pytest.mark.parametrize("family", ["rwkv6", "homemade"])
    def test_a_family_that_is_not_read(self, tmp_path, family):
        path = tmp_path / "odd.gguf"
        writer = gguf.GGUFWriter(path, family)
        writer.add_context_length(CONTEXT_LENGTH)
        writer.add_head_count(4)
        writer.add_tensor("token_embd.weight", torch.zeros(50, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(
            ModelRefusedError, match=f"nothing here reads a GGUF file of the family {family} .*: give the model as safe"
        ):
            load_from(path)

    @pytest.mark.parametrize(
        ("family", "architecture", "more"),
        [("llama", "llama", {}), ("mistral", "llama", {}), ("gpt2", "gpt2", {}), ("gemma2", "gemma2", {}),
         ("qwen2", "qwen2", {}), ("qwen3", "qwen3", {}), ("phi3", "phi3", {}), ("bloom", "bloom", {})],
    )  # fmt: skip
    def test_names_are_those_of_transformers(self, family, architecture, more):
        outline = outline_of(make_model(family, 0, **more).config)
        expected = get_gguf_hf_weights_map(outline, TensorProcessor({}), architecture)
        assert gguf_names(outline, architecture) == expected

    @pytest.mark.parametrize("name", ["rope_freqs__weight", "blk__3__attn_q__weight", "extra__weight"])
    def test_a_tensor_that_transformers_passes_over_refuses_the_file(self, tmp_path, name):
        """As the rotary factors of Llama 3.1, without which a long text would be another."""
        path = tmp_path / "tiny.gguf"
        write_gguf(make_model("llama", 0, vocab_size=259), path, **{name: torch.ones(32, 32)})
        with pytest.raises(
            ModelRefusedError, match=f"its files have {name.replace('__', '.')}, which this architecture"
        ):
            load_from(path, dtype="float32")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("rope__scaling__type", "linear"), ("rope__scaling__factor", 4.0), ("rope__scale_linear", 4.0),
         ("attention__sliding_window", 8), ("final_logit_softcapping", 30.0), ("attention__scale", 0.5),
         ("attention__causal", False), ("logit_scale", 0.1)],
    )  # fmt: skip
    def test_a_setting_that_transformers_passes_over_refuses_the_file(self, tmp_path, name, value):
        """As the window of Phi-3, or factors of a long context."""
        path = tmp_path / "tiny.gguf"
        write_gguf(make_model("llama", 0, vocab_size=259), path, **{name: value})
        with pytest.raises(
            ModelRefusedError, match=f"its files have llama.{name.replace('__', '.')}, which this architecture"
        ):
            load_from(path, dtype="float32")

    def test_settings_that_change_nothing_do_not(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        idle = {
            "rope__scaling__type": "none",
            "rope__scaling__factor": 1.0,
            "attention__sliding_window": CONTEXT_LENGTH,
        }
        write_gguf(make_model("llama", 0, vocab_size=259), path, **idle, attention__causal=True, logit_scale=1.0)
        assert load_from(path, dtype="float32").context_length == CONTEXT_LENGTH

    def test_a_context_length_that_would_be_made_up_refuses_the_file(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        write_gguf(make_model("llama", 0, vocab_size=259), path, context_length=None)
        with pytest.raises(ModelRefusedError, match=r"tiny\.gguf does not say llama\.context_length"):
            load_from(path, dtype="float32")


class TestTokenizer:
    def test_travels_as_tokenizer_json(self, llama):
        files = load_from(llama).tokenizer
        assert files is not None
        tokenizer = Tokenizer.from_str(files.tokenizer_json.decode())
        assert tokenizer.decode(tokenizer.encode("a € é").ids) == "a € é"
        assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert files.chat_template == ""

    def test_brings_its_chat_template(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        files = load_from(save(make_model("llama", 0, vocab_size=300), tmp_path, tokenizer)).tokenizer
        assert files is not None
        assert files.chat_template == tokenizer.chat_template

    @pytest.mark.parametrize(("names", "expected"), [(("tool_use", "default"), "default"), (("a", "b"), "")])
    def test_of_several_chat_templates_brings_the_default(self, tmp_path, names, expected):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {name: name for name in names}
        files = load_from(save(make_model("llama", 0, vocab_size=300), tmp_path, tokenizer)).tokenizer
        assert files is not None
        assert files.chat_template == expected

    def test_that_splits_special_tokens_is_refused(self, tmp_path):
        """A setting of transformers' that does not travel: prompts would be encoded as it does not."""
        folder = save(make_model("llama", 0, vocab_size=300), tmp_path, byte_tokenizer())
        configure_tokenizer(tmp_path, split_special_tokens=True)
        with pytest.raises(ModelRefusedError, match="take split_special_tokens out of its tokenizer_config"):
            load_from(folder)

    @pytest.mark.parametrize("template", [5, {"default": 5}, "\ud800"], ids=ascii)
    def test_with_a_chat_template_that_is_no_text_is_refused(self, tmp_path, template):
        folder = save(make_model("llama", 0, vocab_size=300), tmp_path, byte_tokenizer())
        configure_tokenizer(tmp_path, chat_template=template)
        with pytest.raises(ModelRefusedError, match=r"the chat template of .* is no text"):
            load_from(folder)

    def test_that_is_missing_is_said_once_and_served_without(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, "outrider.engine.backends.choice"):
            assert load_from(save(make_model("llama", 0), tmp_path)).tokenizer is None
        assert [record.message for record in caplog.records if "clients must send token ids" in record.message] != []


def configure_tokenizer(folder: Path, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


class TestFingerprint:
    """common.proto: for each 1,024 ids the first 8 bytes, little-endian, of SHA-256 over id NUL piece NUL."""

    @staticmethod
    def digests(pieces: dict[int, str]) -> list[int]:
        return TokenizerFiles(b"", "", {}, pieces).block_digests()

    def test_follows_the_definition_of_the_protocol(self):
        whole = b"".join(
            f"{token_id}".encode() + b"\0" + piece + b"\0" for token_id, piece in ((0, b"a"), (2, "é".encode()))
        )
        assert self.digests({2: "é", 0: "a"}) == [int.from_bytes(hashlib.sha256(whole).digest()[:8], "little")]

    def test_has_one_digest_for_each_block_up_to_the_last_piece(self):
        empty = int.from_bytes(hashlib.sha256(b"").digest()[:8], "little")
        digests = self.digests({0: "a", 2 * FINGERPRINT_BLOCK: "b"})
        assert len(digests) == 3
        assert digests[1] == empty

    def test_of_nothing_is_empty(self):
        assert self.digests({}) == []

    def test_tells_shifted_and_swapped_pieces_apart(self):
        variants = [{0: "a", 1: "b"}, {0: "b", 1: "a"}, {1: "a", 2: "b"}, {0: "a", 2: "b"}, {0: "ab", 1: ""}, {0: "a"}]
        assert len({tuple(self.digests(pieces)) for pieces in variants}) == len(variants)


class TestRefused:
    @pytest.mark.parametrize(
        ("family", "class_name"),
        [("gptj", "GPTJForCausalLM"), ("bloom", "BloomForCausalLM"), ("falcon", "FalconForCausalLM")],
    )
    def test_families_that_do_not_follow_the_attention_interface(self, family, class_name, tmp_path):
        assert family in REFUSED_FAMILIES
        with pytest.raises(ModelRefusedError, match=f"{class_name} .*attention"):
            load_from(save(make_model(family, 0), tmp_path))

    def test_encoder_decoders(self, tmp_path):
        config = AutoConfig.for_model("t5", d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
        config.save_pretrained(tmp_path)
        with pytest.raises(ModelRefusedError, match=r"\(t5\) is an encoder-decoder: give a decoder-only model"):
            load_from(tmp_path)

    def test_attention_sinks(self):
        """gpt_oss follows the interface and passes sinks, which packed attention would leave out of the softmax."""
        config = AutoConfig.for_model(
            "gpt_oss", vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with pytest.raises(ModelRefusedError, match=r"GptOssForCausalLM .*attention sinks"):
            fastest_pass(model)

    def test_a_model_with_a_layer_of_another_kind(self):
        """Half of a cache is worse than none: every layer must go through the interface."""
        model = make_model("llama", 0)
        model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
        with pytest.raises(
            ModelRefusedError, match="LlamaForCausalLM calls the attention interface in 2 of its 3 layers"
        ):
            fastest_pass(model)

    def test_a_model_that_differs_from_its_own_attention(self):
        """One layer scales its result wherever packed attention is on."""
        model = make_model("gpt2", 0)
        attention = model.transformer.h[1].attn
        forward = attention.forward

        def scaled(*args, **kwargs):
            output, weights = forward(*args, **kwargs)
            return output * (1.5 if "packed" in kwargs else 1.0), weights

        attention.forward = scaled
        with pytest.raises(ModelRefusedError, match="GPT2LMHeadModel differs from its own attention"):
            fastest_pass(model)

    def test_weights_that_a_pass_took_are_read_again_where_it_is_not_used(self, llama, monkeypatch):
        """The reference is whole, although the pass that was tried before it has taken its products."""
        why_not, objections = Probe.why_not, ["it differs"]
        monkeypatch.setattr(Probe, "why_not", lambda *its: objections.pop() if objections else why_not(*its))
        ids, choice = [5, 80, 255, 7], load_from(llama).choice
        assert (choice.backend, choice.notes[-1]) == ("transformers", "torch: it differs")
        own = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
        with torch.inference_mode():
            expected = own(input_ids=torch.tensor([ids])).logits[0]
        assert (choice.runner.forward([Feed(choice.runner.new_cache(), ids, 4)]) - expected).abs().max() < 1e-5

    def test_a_faster_forward_pass_that_differs_is_not_used(self, caplog):
        """A Llama whose activation was changed behind its configuration's back runs as transformers has it."""
        model = make_model("llama", 0)
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
        with caplog.at_level(logging.WARNING, "outrider.engine.models.loader"):
            forward_pass = fastest_pass(model)
        assert type(forward_pass).__name__ == "TransformersForward"
        assert "the model does not run by torch: rows differ by a total variation" in caplog.text

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (
                "builtin:nothing",
                "there is no builtin:nothing: the embedded models are builtin:target and builtin:draft",
            ),
            ("/nowhere/model.gguf", "there is no file /nowhere/model.gguf"),
            ("/nowhere/model", "/nowhere/model cannot be loaded"),
        ],
    )
    def test_names_of_nothing(self, model, reason):
        with pytest.raises(ModelRefusedError, match=reason):
            load_from(model)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ModelRefusedError, match="cannot be loaded"):
            load_from(tmp_path)

    def test_a_folder_without_weights(self, tmp_path):
        make_model("llama", 0).config.save_pretrained(tmp_path)
        with pytest.raises(ModelRefusedError, match="cannot be loaded"):
            load_from(tmp_path)

    def test_code_from_a_checkpoint_unless_it_is_trusted(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps(
                {
                    "model_type": "homemade",
                    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
                }
            )
        )
        (tmp_path / "code.py").write_text("raise SystemExit('this must not run')")
        with pytest.raises(ModelRefusedError, match="trust_remote_code"):
            load_from(tmp_path)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float64, float32, bfloat16, float16"),
            ({"device": "abacus"}, "device 'abacus' is not known to torch"),
            ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ],
    )
    def test_types_and_devices_that_are_none(self, llama, options, reason):
        with pytest.raises(ModelRefusedError, match=reason):
            load_from(llama, **options)
