"""A run's adapter as peft keeps one: over its base it is the merged model, and what has no such base is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import verify
from models.common.errors import InputError, run_cli
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.tools.conftest import beside, run_of
from tools.export.__main__ import main

QUESTIONS = ("What is it?", "How many are there?", "Which colour is the one on the left?")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "embedding": {"targets": ["embed_tokens", "q_proj", "down_proj"]},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a finished run of each kind of adapter, with the bundle and both exports beside it."""
    from tests.tools.conftest import merge

    folder = tmp_path_factory.mktemp(request.param)
    recipe = run_of(folder)
    recipe["stages"]["lora"]["tune"]["language"].update(KINDS[request.param])
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle", "--probes", "1") == 0
    words = ["--to", "adapter", "--probes", "2"]
    assert run_cli(main, [recipe["run"], str(folder / "over_language"), *words]) == 0
    over_base = [str(folder / "over_base"), "--base", str(folder / "base")]
    assert run_cli(main, [recipe["run"], *over_base, *words]) == 0
    return recipe


def stock(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.slow
def test_over_the_language_model_it_is_the_merged_one(run: dict[str, Any]) -> None:
    """The recipe's language model, as anybody opens it, and the bundle's language model without pictures."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Path(run["model"]["language"]["path"])
    tokens = AutoTokenizer.from_pretrained(base)(list(QUESTIONS), return_tensors="pt", padding=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    merged = stock(beside(run, "bundle"))
    with torch.no_grad():
        before = plain(tokens["input_ids"]).logits
        adapted = PeftModel.from_pretrained(plain, str(beside(run, "over_language")))(tokens["input_ids"]).logits
        expected = merged(input_ids=tokens["input_ids"]).logits[..., : adapted.shape[-1]]
    assert (before - expected).abs().max() > 1, "the adapter has learnt something"
    assert (adapted - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_over_the_base_that_was_written_it_gives_the_merged_models_answers(run: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(beside(run, "bundle"), backend="pil")
    merged = stock(beside(run, "bundle"))
    adapted = PeftModel.from_pretrained(stock(beside(run, "base")), str(beside(run, "over_base"))).eval()
    answers = []
    for question in QUESTIONS:
        content = [{"type": "image", "image": image()}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            expected, found = merged(**inputs).logits, adapted(**inputs).logits
            answers.append([model.generate(**inputs, max_new_tokens=8).tolist() for model in (merged, adapted)])
        assert (found - expected)[..., :-1].abs().max() < 1e-4 * expected.abs().max()
    assert all(one == other for one, other in answers)
    assert verify(beside(run, "base")).parity.passed


@pytest.mark.slow
def test_files_names_and_report(run: dict[str, Any]) -> None:
    folder = beside(run, "over_base")
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "parity.json",
        "projector.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert all(name.startswith("model.language_model.") for name in config["target_modules"])
    report = json.loads((folder / "parity.json").read_text())
    assert not report["forced"]
    assert {check["name"] for check in report["checks"]} >= {"largest relative logit difference", "opened by peft"}
    assert str(folder.parent) not in "".join(
        file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors"
    )


@pytest.mark.slow
def test_an_adapter_over_another_base_is_refused(run: dict[str, Any]) -> None:
    """peft only warns; nothing of the adapter would be used."""
    from transformers import AutoModelForCausalLM

    from models.opening import put_adapter

    plain = AutoModelForCausalLM.from_pretrained(run["model"]["language"]["path"])
    with pytest.raises(InputError, match=r"over_base.*(another base|does not open as an adapter)"):
        put_adapter(plain, beside(run, "over_base"))


def test_what_has_no_adapter_is_refused(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "out"), "--to", "adapter"]
    assert run_cli(main, [str(beside(trained, "bundle")), *words]) == 2
    assert "a bundle, in which the adapter is merged already; give the run" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(trained))
    assert run_cli(main, [str(recipe), *words, "--untrained", "--stage", "lora"]) == 2
    assert "no adapter in it, its language model is untrained; --to stock" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_base_that_learnt_in_full_has_to_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No published model is that adapter's base; the one that is written has what was trained before."""
    recipe = run_of(tmp_path)
    generator = torch.Generator().manual_seed(2)
    inherited = {
        "language.model.norm.weight": torch.rand(64, generator=generator) + 0.5,
        "language.model.layers.0.self_attn.q_proj.base_layer.weight": torch.randn(64, 64, generator=generator) / 8,
    }
    write_finished(recipe, "lora", inherited)
    words = [recipe["run"], str(tmp_path / "out"), "--to", "adapter", "--probes", "1"]
    assert run_cli(main, words) == 2
    assert "was trained in full as well, so no published model is this adapter's base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_cli(main, [*words, "--base", str(tmp_path / "base")]) == 0
    base = stock(tmp_path / "base")
    assert torch.equal(base.model.language_model.norm.weight, inherited["language.model.norm.weight"])


@pytest.mark.slow
def test_a_base_with_a_projector_of_one_layer_is_one_that_vllm_takes(tmp_path: Path) -> None:
    """vLLM knows no activation `linear`: two layers with GELU between them compute the same."""
    recipe = run_of(tmp_path, projector="linear")
    write_finished(recipe, "lora")
    words = [recipe["run"], str(tmp_path / "out"), "--to", "adapter", "--base", str(tmp_path / "base"), "--probes", "1"]
    assert run_cli(main, words) == 0
    assert json.loads((tmp_path / "base" / "config.json").read_text())["projector_hidden_act"] == "gelu"
    assert verify(tmp_path / "base").parity.passed
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert not list(tmp_path.glob(".base*"))
