"""The tower that is taken out of an ONNX graph is the one that went in; what cannot be named is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError, run_cli
from models.encoders.pretrained import TransformersVision
from models.spec import CropImage
from tests.support.foreign import PICTURE, Headed, export_onnx, make_dinov2
from tools.convert.__main__ import main
from tools.convert.vision import read_tower

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.slow  # tracing a model takes two seconds


@pytest.fixture(scope="module")
def backbone() -> Any:
    return make_dinov2()


@pytest.fixture(scope="module")
def graph(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(Headed(backbone), tmp_path_factory.mktemp("onnx") / "tiny.onnx")


def test_the_tower_gives_what_it_gave_before_it_was_exported(
    backbone: Any, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, [str(graph.parent), str(tmp_path / "out"), "--image-size", str(PICTURE)]) == 0
    said = capsys.readouterr().out
    assert "2 tensors of other parts left out" in said
    assert "pictures of 28 pixels (positions of 42)" in said
    vision = TransformersVision(kind="dinov2", path=str(tmp_path / "out"), feature_layer=-1, image_size=PICTURE)
    assert vision.size_doubt() is None
    assert vision.image_spec(CropImage()).num_features == 4
    pixels = torch.randn(2, 3, PICTURE, PICTURE)
    with torch.no_grad():
        expected = backbone(pixels).last_hidden_state
        found = vision.load_model(torch.float32)(pixels).last_hidden_state
    assert torch.equal(found, expected)  # the same weights, and positions by the same interpolation
    again = tmp_path / "again"
    assert run_cli(main, [str(graph), str(again), "--image-size", str(PICTURE)]) == 0
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_a_graph_of_the_tower_alone_is_read_too(backbone: Any, tmp_path: Path) -> None:
    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in backbone.named_children():
                self.add_module(name, module)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(self.embeddings(pixels))
            out: torch.Tensor = self.layernorm(hidden.last_hidden_state)
            return out

    file = export_onnx(Alone(), tmp_path / "alone.onnx")
    tower = read_tower(file, onnx.load(file))
    assert tower.prefix == ""
    assert tower.others == []
    assert run_cli(main, [str(file), str(tmp_path / "out")]) == 0
    vision = TransformersVision(kind="dinov2", path=str(tmp_path / "out"), feature_layer=-1)
    pixels = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        found = vision.load_model(torch.float32)(pixels).last_hidden_state
        assert torch.equal(found, backbone(pixels).last_hidden_state)


def changed(graph: Path, folder: Path, edit: Any) -> Path:
    model = onnx.load(graph)
    edit(model.graph)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def initialiser(graph: Any, end: str) -> Any:
    return next(tensor for tensor in graph.initializer if tensor.name.endswith(end))


def test_what_cannot_be_accounted_for_is_one_line(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop(graph: Any) -> None:
        graph.initializer.remove(initialiser(graph, "layer.1.norm2.bias"))

    def rename(graph: Any) -> None:
        tensor = initialiser(graph, "layer.1.norm2.bias")
        node = next(node for node in graph.node if tensor.name in node.input)
        node.input[list(node.input).index(tensor.name)] = tensor.name = "backbone.encoder.layer.1.norm7.bias"

    def add(graph: Any) -> None:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(initialiser(graph, "layer.1.norm2.bias"))
        tensor.name = "backbone.encoder.layer.1.extra"
        graph.initializer.append(tensor)

    def no_tower(graph: Any) -> None:
        tensor = initialiser(graph, "projection.weight")
        node = next(node for node in graph.node if tensor.name in node.input)
        node.input[list(node.input).index(tensor.name)] = tensor.name = "stem.weight"

    for edit, line in (
        (drop, "its weights lack encoder.layer.1.norm2.bias"),
        (rename, "its weights lack encoder.layer.1.norm2.bias"),
        (add, "1 weights are unknown to transformers: encoder.layer.1.extra"),
        (no_tower, "0 tensors are named"),
    ):
        assert run_cli(main, [str(changed(graph, tmp_path, edit)), str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_is_refused(graph: Path, tmp_path: Path) -> None:
    """The weights fit by name and shape, and still the model is another one: an activation of another kind."""

    def other(graph: Any) -> None:
        node = next(node for node in graph.node if node.op_type == "Erf")
        node.op_type = "Tanh"

    from tools.convert.vision import write_vision

    with pytest.raises(InputError, match="the converted tower differs from the graph by"):
        write_vision(changed(graph, tmp_path, other), tmp_path, None)
