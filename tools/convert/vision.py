"""The DINOv2 tower in an ONNX graph -> a vision encoder in Hugging Face format.

    initialisers --by name, or by the name of the node that multiplies with them--> weights --> Dinov2Model
    the graph up to the tower's last norm --onnx's reference evaluator--> compared with that model's output

PyTorch's exporter keeps the names of biases and norms, and gives transposed matrices and folded constants new ones
(`onnx::MatMul_1966`); the node that uses such a one is named after its module. Of the rest of the graph (a head, a
decoder) nothing is taken. Owns the reading and the comparison; sizes are `tools.convert.image_size`'s.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.common.errors import InputError, single_line
from models.encoders.pretrained import PREPROCESSOR
from tools.convert.image_size import resized, sized
from tools.convert.language import check_report

ANCHOR = "embeddings.patch_embeddings.projection.weight"
"""The weight whose name tells where in the graph the tower is."""
LAST_NORM = "layernorm.bias"
HEAD_WIDTH = 64
"""Of every published DINOv2 (Oquab et al. 2023); a graph does not say it, and the comparison would show another."""
TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output: fp32 in another order of summation gives about 3e-6."""
UNUSED = ("mask_token",)
"""Weights that only DINOv2's own training needs."""
NORMALISATION = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""ImageNet's, as DINOv2's preprocessor_config.json on the hub has them."""


class Tower(NamedTuple):
    """The tower's weights under their names in transformers' checkpoints, and the graph's tensors outside of it."""

    prefix: str
    weights: dict[str, Tensor]
    others: list[str]


def write_vision(source: Path, out: Path, size: int | None) -> str:
    """Write the tower of the ONNX file `source` into `out`, for pictures of `size` pixels; returns a line about it.

    Raises:
        InputError: no such tower, a weight missing or left over, or another output than the graph's.
    """
    import onnx
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        graph = onnx.load(source)
    except Exception as error:  # protobuf's and onnx's own kinds: to the user they all mean the same
        raise InputError(f"{source}: not an ONNX file ({single_line(error)})") from error
    tower = read_tower(source, graph)
    model = build_model(source, tower.weights)
    largest, scale = compare(source, graph, tower.prefix, model)
    native = int(model.config.image_size)
    if size is not None and size != native:
        model = resized(model, size)
    model.save_pretrained(out)
    preprocessing = sized({"image_processor_type": "BitImageProcessor", **NORMALISATION}, size or native)
    (out / PREPROCESSOR).write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{source.name}: {len(tower.weights)} tensors, {total / 1e6:.1f} M parameters; {len(tower.others)} tensors of"
        f" other parts left out\noutput differs from the graph's by at most {largest:.1e} of {scale:.1f}\n"
        f"pictures of {size or native} pixels (positions of {native})"
    )


def read_tower(source: Path, model: Any) -> Tower:
    """Every initialiser under its name in a checkpoint of transformers, or among `others`.

    Raises:
        InputError: no DINOv2 in the graph, or a tensor of the tower that cannot be named.
    """
    from onnx.numpy_helper import to_array

    values = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    anchors = [name for name in values if name.endswith(ANCHOR)]
    if len(anchors) != 1:
        raise InputError(
            f"{source}: {len(anchors)} tensors are named ...{ANCHOR}: a graph with one DINOv2 of transformers is"
            " needed; take the model's directory in Hugging Face format"
        )
    prefix = anchors[0].removesuffix(ANCHOR)
    users = {name: node for node in model.graph.node for name in node.input if name in values}
    weights: dict[str, Tensor] = {}
    positions, others, nameless = [], [], []
    for name, value in values.items():
        node = users.get(name)
        module = "" if node is None else node.name.strip("/").replace("/", ".").rpartition(".")[0] + "."
        is_named = "." in name and ":" not in name
        if is_named and name.startswith(prefix):
            weights[name.removeprefix(prefix)] = torch.from_numpy(value.copy())
        elif is_named or not module.startswith(prefix):
            others.append(name)
        elif node is not None and node.op_type == "MatMul" and value.ndim == 2:
            weights[f"{module.removeprefix(prefix)}weight"] = torch.from_numpy(value.T.copy())
        elif module == f"{prefix}embeddings." and value.ndim == 3:
            positions.append(torch.from_numpy(value.copy()))
        else:
            nameless.append(name)
    if nameless:
        raise InputError(f"{source}: {len(nameless)} tensors of the tower have no name of DINOv2's: {nameless[0]}")
    if positions:
        positions.sort(key=lambda value: value.shape[1])  # folded into the class token's and the patches'
        weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return Tower(prefix, weights, others)


def build_model(source: Path, weights: dict[str, Tensor]) -> Any:
    """A Dinov2Model with these weights, loaded as a checkpoint so that transformers' own table of old names applies.

    Raises:
        InputError: a weight is missing, left over or of another shape.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Model

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, f"{folder}/model.safetensors")
        config_of(source, weights).save_pretrained(folder)
        model, report = Dinov2Model.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    check_report(source, report, UNUSED)
    with torch.no_grad():
        model.embeddings.mask_token.zero_()  # drawn at random: the file would be another at every conversion
    return model.eval()


def config_of(source: Path, weights: dict[str, Tensor]) -> Any:
    """The Dinov2Config that the weights' shapes imply."""
    from transformers import Dinov2Config

    try:
        width, _, patch, _ = weights[ANCHOR].shape
        num_patches = weights["embeddings.position_embeddings"].shape[1] - 1
        inner = weights["encoder.layer.0.mlp.fc1.bias"].shape[0]
    except KeyError as error:
        raise InputError(f"{source}: its DINOv2 lacks {error}") from None
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        mlp_ratio=inner // width,
        image_size=math.isqrt(num_patches) * patch,
        patch_size=patch,
    )


def compare(source: Path, model: Any, prefix: str, ours: Any) -> tuple[float, float]:
    """(largest difference, largest output) of our model and the graph's tower, on one drawn picture.

    Raises:
        InputError: the difference is more than a share `TOLERANCE` of the output.
    """
    from onnx.reference import ReferenceEvaluator

    tower = cut_after(model, f"{prefix}{LAST_NORM}")
    side = tower.graph.input[0].type.tensor_type.shape.dim[-1].dim_value or int(ours.config.image_size)
    picture = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    expected: Any = ReferenceEvaluator(tower).run(None, {tower.graph.input[0].name: picture})
    expected = expected[0]
    with torch.no_grad():
        found = ours(torch.from_numpy(picture)).last_hidden_state.numpy()
    scale = float(np.abs(expected).max())
    largest = float(np.abs(expected - found).max()) if expected.shape == found.shape else math.inf
    if not largest <= TOLERANCE * scale:
        raise InputError(f"{source}: the converted tower differs from the graph by {largest:.3g} of {scale:.3g}")
    return largest, scale


def cut_after(model: Any, last_weight: str) -> Any:
    """The part of a graph that the output of the node with the initialiser `last_weight` needs."""
    from onnx import helper

    graph = model.graph
    end = next(node for node in graph.node if last_weight in node.input)
    needed, nodes = set(end.output), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    output = helper.make_tensor_value_info(end.output[0], 1, None)
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    inputs = [each for each in graph.input if each.name in needed]
    part = helper.make_graph(nodes[::-1], "tower", inputs, [output], kept)
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
