"""Quantizes a decoder's linear layers on what really flows through them, one decoder layer in memory at a time.

    golden set --tower, projector, embedding--> inputs of layer 0
    layer n: run --> linear layers' inputs --GPTQ--> weights on the grid; run again with them --> inputs of layer n + 1
                     + features of the image between the first layers, where the family has them (DeepStack)

So each layer also makes up for the errors of those before it. Owns the order; `tools.export.gptq` owns the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.common.errors import InputError
from tools.export.gptq import Grid, Hessian, gptq
from tools.export.streamed import Fetch, Unit, stream

if TYPE_CHECKING:
    from tools.export.golden import Probe

Keep = Callable[[str, Tensor, Tensor, float], None]
"""Called with a linear layer's full name, its weight, that on the grid, and its output's relative error."""


class _ReachedError(Exception):
    """The first decoder layer was reached: what it gets is known, and nothing behind it needs to run."""


@torch.no_grad()
def calibrate(
    model: Any,
    fetch: Fetch,
    processor: Any,
    probes: Sequence[Probe],
    *,
    grid: Grid,
    device: torch.device,
    keep: Keep,
    chosen: Collection[str] | None = None,
) -> None:
    """Quantize the linear layers of a decoder in turn, and hand each to `keep`.

    Args:
        model: a stock model without weights, with a `language_model` of decoder layers.
        probes: prompts, which are read with their answers.
        chosen: full names of the linear layers to quantize; None: all of the decoder layers'.

    Raises:
        InputError: the layers have several masks.
    """
    _check(model)
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    units = {f"{prefix}.{key}": Unit(f"{prefix}.{key}", each, fetch, device) for key, each in layers.named_children()}
    stream(model, fetch, device, by_hand=units)
    inputs = [_with_answer(model, processor, probe, device) for probe in probes]
    flowing = _first_inputs(model, layers[0], inputs)
    named = tqdm(units.items(), desc="calibrate", unit="layer")
    for place, ((name, unit), layer) in enumerate(zip(named, layers, strict=True)):
        unit.load()
        linears = {f"{name}.{inner}": each for inner, each in layer.named_modules() if type(each) is nn.Linear}
        linears = {name: each for name, each in linears.items() if chosen is None or name in chosen}
        with _measuring(linears) as hessians:
            for each in flowing:
                each.through(layer)
        for full_name, linear in linears.items():
            weight, hessian = linear.weight.data, hessians[full_name]
            found = gptq(weight, hessian, grid.scales(weight), grid)
            keep(full_name, weight, found, hessian.relative_error(weight, found))
            linear.weight.data = found
        flowing = [each.behind(place, each.through(layer)) for each in flowing]
        unit.free()


def _check(model: Any) -> None:
    """Raise InputError where layers do not all have the same mask."""
    kinds = set(getattr(model.config.text_config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise InputError(
            f"{type(model).__name__}: its layers mix {' and '.join(sorted(kinds))}, which GPTQ does not follow;"
            " `sightline quantize --to nf4` without --calibrate can"
        )


@dataclass(frozen=True)
class Flowing:
    """What a decoder layer gets of one prompt: hidden states [1, L, D], and everything else by its name."""

    hidden: Tensor
    more: dict[str, Any]
    is_image: Tensor | None = None
    """[1, L]: the image's tokens."""
    levels: tuple[Tensor, ...] = ()
    """Features [I, D] that are added to the image's tokens behind the first layers."""

    def through(self, layer: nn.Module) -> Tensor:
        """The hidden states that a layer makes; some classes return them in a tuple."""
        output: Any = layer(self.hidden, **self.more)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def behind(self, place: int, hidden: Tensor) -> Flowing:
        """What the layer behind the `place`-th gets of that one's hidden states."""
        if place < len(self.levels):
            assert self.is_image is not None
            hidden = hidden.clone()
            hidden[self.is_image] += self.levels[place].to(hidden)
        return replace(self, hidden=hidden)


def _with_answer(model: Any, processor: Any, probe: Probe, device: torch.device) -> dict[str, Tensor]:
    """What a stock model gets of a probe: its prompt, with the golden answer behind it."""
    from tools.export.parity import answer_ids, stock_inputs, token_types

    each: dict[str, Tensor] = {name: value.to(device) for name, value in stock_inputs(processor, probe).items()}
    answer = torch.tensor([answer_ids(processor.tokenizer, probe)], device=device, dtype=torch.long)
    each["input_ids"] = torch.cat([each["input_ids"], answer], dim=1)
    return each | token_types(model, each["input_ids"])


def _first_inputs(model: Any, first: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Flowing]:
    """What the first decoder layer gets for each prompt, and what the decoder will add behind it."""
    found: list[Flowing] = []
    between: dict[str, Any] = {}

    def entered(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        del args
        levels = more.get("deepstack_visual_embeds") or ()  # as Qwen3-VL's decoder calls them
        between.update(is_image=more.get("visual_pos_masks"), levels=tuple(levels))

    def reached(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        more = dict(more)
        hidden = args[0] if args else more.pop("hidden_states")
        found.append(Flowing(hidden, more, **between))
        raise _ReachedError

    handles = [
        model.get_decoder().register_forward_pre_hook(entered, with_kwargs=True),
        first.register_forward_pre_hook(reached, with_kwargs=True),
    ]
    try:
        for each in inputs:
            try:
                model.model(**each, use_cache=False)
            except _ReachedError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _measuring(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Hessian]]:
    """While layers run, add up what each linear layer gets."""
    found = {name: Hessian(each.in_features, each.weight.device) for name, each in linears.items()}

    def hook(hessian: Hessian) -> Any:
        return lambda _module, args: hessian.add(args[0])

    handles = [each.register_forward_pre_hook(hook(found[name])) for name, each in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
