"""Random models that are made where they run, so that 26 GB need not be written and read for each.

A folder holds a recipe instead of weights. `python -m benchmarks.made_models target --model FOLDER …` is the
target service with support for such folders; `draft` is the draft service.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.pairs import Shape, further_outputs, make_model, scale_weights

MODEL_TYPE = "made_for_benchmarks"


@dataclass(frozen=True)
class Recipe:
    """How a model is made."""

    shape: Shape
    num_layers: int
    device: str  # where it is made
    scale: float = 1.0  # of the output of the layers that the draft lacks

    def write(self, folder: Path) -> str:
        """Write it to `folder`; return the value for `--model`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, "recipe": asdict(self)}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(folder)

    def make(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model."""
        model = make_model(self.shape, self.num_layers, dtype, self.device)
        scale_weights(further_outputs(model, self.shape), self.scale)
        return model


class MadeConfig(PretrainedConfig):
    """The configuration file of a recipe."""

    model_type = MODEL_TYPE


class MadeModel:
    """The model class that transformers looks up."""

    config_class = MadeConfig

    @classmethod
    def from_pretrained(cls, path: str, *arguments: Any, config: Any, dtype: Any, **settings: Any) -> Any:
        """Return the model of the recipe in `config`, with an empty loading report if one is asked for."""
        kind = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        model = Recipe(**(config.recipe | {"shape": Shape(**config.recipe["shape"])})).make(kind)
        report = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": (), "error_msgs": ()}
        return (model, report) if settings.get("output_loading_info") else model


def register() -> None:
    """Register such folders with transformers."""
    AutoConfig.register(MODEL_TYPE, MadeConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeConfig, MadeModel, exist_ok=True)  # type: ignore[arg-type]


def main() -> None:
    """Run a service."""
    register()
    name = sys.argv.pop(1)
    if name == "target":
        from outrider_target.__main__ import main as serve
    else:
        from outrider_draft.__main__ import main as serve
    serve()


if __name__ == "__main__":
    main()
