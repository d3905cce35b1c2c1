"""What a stage starts from: strict loading, an adapter's base, the pretrained parts' digests, a finished stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.common.errors import InputError
from models.common.files import write_json
from tests.support.backbones import tiny_recipe
from tests.support.checkpoints import write_checkpoint
from trainer.checkpoint.format import Fragment
from trainer.checkpoint.initial_weights import adapted_name, base_digests, finished_checkpoint, load_weights
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import Recipe


def checkpoint(root: Path, weights: dict[str, Tensor]) -> CheckpointReader:
    fragments = [Fragment(name, tuple(value.shape), 0, value.reshape(-1), {}) for name, value in weights.items()]
    return CheckpointReader.open(write_checkpoint(root, 1, fragments=fragments, inherited={}, state={}))


class Adapted(nn.Module):
    """As peft leaves a module: its own weight is a layer further in."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(2, 2, bias=False)


def model() -> Any:
    return nn.ModuleDict({"projector": nn.Linear(2, 2), "language": Adapted()})


def test_weights_are_copied_and_the_others_stay(tmp_path: Path) -> None:
    vlm = model()
    before = vlm["projector"].bias.detach().clone()
    wanted = torch.arange(4.0).reshape(2, 2)
    assert load_weights(vlm, checkpoint(tmp_path, {"projector.weight": wanted})) == ["projector.weight"]
    assert torch.equal(vlm["projector"].weight, wanted)
    assert torch.equal(vlm["projector"].bias, before)


def test_what_learnt_in_full_is_the_base_of_an_adapter(tmp_path: Path) -> None:
    vlm = model()
    wanted = torch.arange(4.0).reshape(2, 2)
    assert adapted_name("language.weight") == "language.base_layer.weight"
    assert load_weights(vlm, checkpoint(tmp_path, {"language.weight": wanted})) == ["language.base_layer.weight"]
    assert torch.equal(vlm["language"].base_layer.weight, wanted)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("projector.scale", (2, 2), r"it holds projector\.scale, which this stage's model does not have$"),
        ("language.lora_A.default.weight", (2, 2), r"does not have; tune\.language must be lora here too"),
        ("projector.weight", (2, 3), r"projector\.weight has shape \(2, 3\), this stage's model wants \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(model(), checkpoint(tmp_path, {name: torch.zeros(shape)}))


def test_a_stage_is_finished_when_it_says_so(tmp_path: Path) -> None:
    assert finished_checkpoint(tmp_path, "align") is None
    (tmp_path / "align" / "checkpoints" / "step_000002").mkdir(parents=True)
    assert finished_checkpoint(tmp_path, "align") is None
    write_json(tmp_path / "align" / "finished.json", {"checkpoint": "step_000002"})
    assert finished_checkpoint(tmp_path, "align") == tmp_path / "align" / "checkpoints" / "step_000002"


def test_the_digest_of_a_part_changes_with_its_weights_alone(tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json(json.dumps(tiny_recipe(tmp_path, Path("none"))))
    before = base_digests(recipe)
    assert before.keys() == {"vision", "language"}
    (tmp_path / "vision" / "README.md").write_text("a note")
    assert base_digests(recipe) == before
    weights = tmp_path / "vision" / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    after = base_digests(recipe)
    assert after["language"] == before["language"]
    assert after["vision"] != before["vision"]
