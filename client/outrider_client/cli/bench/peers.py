"""What `--compare` names: found before services start, and loaded when it is known what they run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from outrider_client.bench.llama_peer import SPECULATIVE_NAMES, LlamaOptions, LlamaPeer, LlamaPrograms, check_gguf
from outrider_client.bench.result_file import num_cores
from outrider_client.bench.samples import Settings
from outrider_client.cli.bench.presenting import missing_extra
from outrider_client.cli.options import err
from outrider_client.pair import PairInfo

# Makes a peer of the pair, the settings, and the prompts by their token ids.
PeerMaker = Callable[[PairInfo, Settings, dict[tuple[int, ...], str]], Any]
_EMBEDDED = "builtin:"


def peer_maker(values: dict[str, Any]) -> PeerMaker | None:
    """Return what makes the peer that a command's values name; None without `--compare`.

    Raises:
        click.ClickException: a library, a program or a file is missing.
    """
    compared = values.get("compare")
    if compared == "llama.cpp":
        return _llama_maker(values)
    if values.get("llama_bench") or values.get("llama_speculative"):
        raise click.UsageError("--llama-bench and --llama-speculative are of --compare llama.cpp")
    return _transformers_maker(values) if compared else None


def num_service_threads(values: dict[str, Any]) -> int:
    """Return the threads of each service that is started here: as many as llama.cpp has if it is compared with."""
    return values["threads"] or (_num_peer_threads(values) if values.get("compare") == "llama.cpp" else 1)


def _num_peer_threads(values: dict[str, Any]) -> int:
    return values["peer_threads"] or num_cores()


def _transformers_maker(values: dict[str, Any]) -> PeerMaker:
    try:
        from outrider_client.bench import transformers_peer
    except ModuleNotFoundError as error:
        raise missing_extra(error, "--compare transformers", "serve") from error

    def make(info: PairInfo, settings: Settings, prompts: dict[tuple[int, ...], str]) -> Any:
        """Load the models that the services run, in their dtype and on their kind of device."""
        assert info.draft
        options = transformers_peer.PeerOptions(
            target_model=info.target.model_id,
            draft_model=info.draft.model_id,
            dtype=info.target.dtype,
            device=info.target.device,
            quantize=(info.target.quantize or None, info.draft.quantize or None),
            context_length=info.target.context_length,
            eos_token_ids=tuple(info.target.eos_token_ids),
            threads=_num_peer_threads(values),
        )
        with err.status("loading both models for transformers"):
            return transformers_peer.load_peer(options, settings)

    return make


def _llama_maker(values: dict[str, Any]) -> PeerMaker:
    bench = values["llama_bench"] or shutil.which("llama-bench")
    if not bench:
        raise click.UsageError("--compare llama.cpp needs --llama-bench PATH: nothing of llama.cpp is installed here")
    programs = LlamaPrograms.found(Path(bench), values["llama_speculative"])
    if not values["target"]:
        check_gguf(Path(values["target_model"]))

    def make(info: PairInfo, settings: Settings, prompts: dict[tuple[int, ...], str]) -> LlamaPeer:
        files = {"target": _file_of("target", info.target.model_id, values)}
        if info.draft and info.draft.model_id.endswith(".gguf"):
            files["draft"] = _file_of("draft", info.draft.model_id, values)
        for file in files.values():
            check_gguf(file)
        threads, timeout_s = _num_peer_threads(values), values["llama_timeout"]
        options = LlamaOptions(programs, files, threads, info.target.context_length, timeout_s)
        with err.status("trying llama.cpp"):
            peer = LlamaPeer(options, settings, prompts)
        if info.draft and len(peer.methods) == 1:
            lacking = f"{SPECULATIVE_NAMES[0]} beside {bench}" if "draft" in files else "GGUF file of the draft"
            err.print(f"llama.cpp's own speculation is not measured: there is no {lacking}")
        return peer

    return make


def _file_of(role: str, served: str, values: dict[str, Any]) -> Path:
    """Return the file of what a service runs; it may lie elsewhere here than there, where `--target-model` names it."""
    named = values[f"{role}_model"]
    if not values[role] or named.startswith(_EMBEDDED):
        return Path(served)
    if Path(named).name != Path(served).name:
        raise click.UsageError(
            f"the {role} service at {values[role]} runs {served}, and not {named}: name its file, or leave out --{role}-model"
        )
    return Path(named)
