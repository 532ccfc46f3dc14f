"""What a position may see in each layer: learnt from the masks that a model asks for, not from what its family says.

A model asks transformers' mask interface for its masks, one for each kind of layer, and hands what it gets to the
layers. Here it gets an `AskedMask`. At start the mask's function is evaluated for some positions of the whole context,
which takes no pass of that length. What it says must be causal, a sliding window, or chunks; all else is refused.

Shapes: C context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

_ALL_UP_TO = 256  # of a context that short, every position is looked at


@dataclass(frozen=True)
class Visible:
    """Position p sees itself and what is before it, back to p + 1 − `sliding_window` or to the start of its chunk."""

    sliding_window: int | None = None
    chunk_size: int | None = None

    def first(self, position: int) -> int:
        """Return the first position that is seen."""
        if self.sliding_window is not None:
            return max(0, position + 1 - self.sliding_window)
        return 0 if self.chunk_size is None else position // self.chunk_size * self.chunk_size


CAUSAL = Visible()


@dataclass(frozen=True)
class AskedMask:
    """What a model asks of the mask interface; it travels to the attention function in the place of a mask."""

    function: Callable[..., torch.Tensor]  # of indices (batch, head, query, key), as transformers.masking_utils has it
    size: int | None  # of the window or chunk, as the model says beside it
    needs_vmap: bool
    padding: torch.Tensor | None  # [1, T], 1 where there is a token
    device: torch.device | str = "cpu"  # of what the function holds

    def __getitem__(self, index: Any) -> AskedMask:
        """Models cut their mask to the keys that there are, which leaves this one what it is."""
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, slice) and part.start is None and part.step is None for part in parts):
            return self
        raise TypeError("it changes the masks that it asks for")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it changes the masks that it asks for, and looks for their {name}")

    def visible(self, context_length: int) -> Visible:
        """Return what positions see.

        Raises:
            TypeError: it is neither causal, nor a window, nor chunks.
        """
        if self.padding is not None and not self.padding.all():
            raise TypeError("it hides tokens of a text from the others")
        first = {at: self._first_seen(at, context_length) for at in _positions(context_length, self.size)}
        for candidate in _candidates(first, self.size):
            if all(candidate.first(at) == start for at, start in first.items()):
                return candidate
        raise TypeError("its masks are neither causal, nor sliding windows, nor chunks")

    def _first_seen(self, position: int, context_length: int) -> int:
        try:
            row = sdpa_mask(
                batch_size=1,
                q_length=1,
                kv_length=min(context_length, 2 * position + _ALL_UP_TO),  # beyond, there is nothing to look for
                q_offset=position,
                mask_function=self.function,
                allow_is_causal_skip=False,
                use_vmap=self.needs_vmap,
                device=self.device,
            )
        except IndexError as error:
            raise TypeError("its masks depend on more than positions") from error
        assert row is not None
        seen = row.flatten()
        first = int(seen.int().argmax())
        if not seen[first : position + 1].all() or int(seen.sum()) != position + 1 - first:
            raise TypeError(f"what position {position} sees is not one stretch of text that ends there")
        return first


def _positions(context_length: int, size: int | None) -> list[int]:
    """Return the positions at which a mask is looked at, in ascending order."""
    if context_length <= _ALL_UP_TO:
        return list(range(context_length))
    steps = [1 << exponent for exponent in range(context_length.bit_length())]
    steps += [times * size for times in (1, 2, 3) if size]
    steps += [context_length // 3, context_length]
    near = {step + by for step in steps for by in (-1, 0, 1)}
    return sorted(position for position in near if 0 <= position < context_length)


def _candidates(first: dict[int, int], size: int | None) -> list[Visible]:
    last, start = max(first.items())
    if start == 0 and not any(first.values()):
        return [CAUSAL]
    sizes = {math.gcd(*first.values()), size}
    return [Visible(sliding_window=last + 1 - start), *(Visible(chunk_size=chunk) for chunk in sizes if chunk)]


@dataclass
class LayerVisibility:
    """What positions see in each layer of one model; learnt when it first attends, which must be in a lone text."""

    context_length: int
    _layers: dict[int, tuple[Visible, int | None]] = field(default_factory=dict)

    def of(self, layer: int, mask: object) -> Visible:
        """Return what positions see in a layer that was given `mask`.

        Raises:
            TypeError: the layer has no mask from the interface, one that cannot be served, or another than at first.
        """
        if not isinstance(mask, AskedMask):
            raise TypeError(f"layer {layer} attends with a mask of the model's own making")
        known = self._layers.get(layer)
        if known is None:
            known = self._layers[layer] = (mask.visible(self.context_length), mask.size)
        if known[1] != mask.size:
            raise TypeError(f"layer {layer} changes the size of its mask from {known[1]} to {mask.size}")
        return known[0]

    @property
    def layers(self) -> list[Visible]:
        """What positions see, layer by layer."""
        return [visible for _, (visible, _) in sorted(self._layers.items())]


def ask_mask(
    *args: Any,
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> AskedMask:
    """Return what the model asks for; a mask function for transformers' AttentionMaskInterface."""
    return AskedMask(mask_function, local_size, use_vmap, attention_mask, device)
