"""Quantizes a decoder's linear layers on what really flows through them, one decoder layer in memory at a time.

    golden set --tower, projector, embedding--> inputs of layer 0
    layer n: run --> linear layers' inputs --GPTQ--> weights on the grid; run again with them --> inputs of layer n + 1

So each layer also makes up for the errors of those before it. Owns the order; `tools.export.gptq` owns the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.common.errors import InputError
from tools.export.gptq import Hessian, gptq, group_scales
from tools.export.streamed import Unit

Keep = Callable[[str, Tensor, Tensor, float], None]
"""Called with a linear layer's full name, its weight on the grid, its scales, and its output's relative error."""


class _ReachedError(Exception):
    """The first decoder layer was reached: what it gets is known, and nothing behind it needs to run."""


@torch.no_grad()
def calibrate(
    model: Any,
    layers: nn.ModuleList,
    *,
    prefix: str,
    inputs: list[dict[str, Tensor]],
    units: dict[str, Unit],
    args: Any,
    dtype: torch.dtype,
    keep: Keep,
) -> None:
    """Quantize every linear layer of `layers` in turn, and hand each to `keep`.

    Args:
        model: stock Llava, which loads everything but `layers` by itself.
        prefix: the full name of `layers`, with a dot behind it.
        inputs: of the whole model, one prompt each.
        units: what loads and frees each layer, by its full name.
        args: compressed-tensors' QuantizationArgs.
        dtype: of the scales.

    Raises:
        InputError: the layers differ in what they attend to, so one layer's mask is not the other's.
    """
    kinds = set(getattr(model.config.text_config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise InputError(
            f"{type(model.language_model if hasattr(model, 'language_model') else model).__name__}: its layers mix"
            f" {' and '.join(sorted(kinds))}, which GPTQ does not follow; `sightline quantize --to nf4` can"
        )
    flowing = _first_inputs(model, layers[0], inputs)
    for number, layer in enumerate(layers):
        name = f"{prefix}{number}"
        units[name].load()
        linears = {f"{name}.{inner}": each for inner, each in layer.named_modules() if type(each) is nn.Linear}
        with _measuring(linears) as hessians:
            for hidden, more in flowing:
                layer(hidden, **more)
        for full_name, linear in linears.items():
            weight, hessian = linear.weight.data, hessians[full_name]
            scales = group_scales(weight, args).to(dtype)
            found = gptq(weight, hessian, scales, args)
            keep(full_name, found, scales, hessian.relative_error(weight, found))
            linear.weight.data = found
        flowing = [(_states(layer(hidden, **more)), more) for hidden, more in flowing]
        units[name].free()


def _first_inputs(model: Any, first: nn.Module, inputs: list[dict[str, Tensor]]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first decoder layer gets for each prompt: hidden states, and everything else by its name."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def reached(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        more = dict(more)
        hidden = args[0] if args else more.pop("hidden_states")
        found.append((hidden, more))
        raise _ReachedError

    handle = first.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        for each in inputs:
            try:
                model.model(**each, use_cache=False)
            except _ReachedError:
                continue
    finally:
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


def _states(output: Any) -> Tensor:
    """Hidden states of a decoder layer's output; some classes return them in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
