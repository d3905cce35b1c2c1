"""Checkpoints of plain DeepSpeed: read as DeepSpeed's own zero_to_fp32 reads them, bit for bit, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.support.backbones import make_language
from tests.support.deepspeed_checkpoints import PROMPT, Case, write_checkpoints
from tests.support.ranks import run_on_ranks
from tools.export.deepspeed_checkpoint import DeepSpeedCheckpoint
from tools.export.merge import main

pytestmark = pytest.mark.slow  # two process groups with DeepSpeed, 30 s in all

ALONE = [  # every stage; a second each
    Case(1, "fp32", "full"),
    Case(2, "bf16", "full"),
    Case(3, "fp32", "full"),
    Case(3, "bf16", "lora"),
]
ON_TWO = [  # and both precisions, in full and with adapters
    *ALONE,
    Case(1, "bf16", "lora"),
    Case(2, "fp32", "lora"),
    Case(3, "fp32", "lora", exclude_frozen=True),
    Case(0, "fp32", "lora"),
]
CASES = {1: ALONE, 2: ON_TWO}
EVERY = [pytest.param(world, case, id=f"{case.name}-{world}") for world, cases in CASES.items() for case in cases]
SHARDED = [param for param in EVERY if param.values[1].stage > 0]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    make_language(folder / "base", tied=True)
    for world_size, cases in CASES.items():
        run_on_ranks(world_size, write_checkpoints, str(folder / "base"), str(folder / f"world_{world_size}"), cases)
    return folder


def merged(root: Path, checkpoint: Path, out: Path, *words: str) -> int:
    return run_cli(main, [str(checkpoint), str(out), *words])


@pytest.mark.parametrize(("world_size", "case"), SHARDED)
def test_every_weight_is_zero_to_fp32s_bit_for_bit(root: Path, tmp_path: Path, world_size: int, case: Case) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = root / f"world_{world_size}" / case.name
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    checkpoint = DeepSpeedCheckpoint.open(folder)
    assert set(expected) <= set(checkpoint.names())
    for name, value in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype, name
        assert torch.equal(found, value), name
    assert all(checkpoint.read(name).numel() for name in checkpoint.names())
    if case.tuning == "full":
        assert merged(root, folder, tmp_path / "out") == 0
        files = TensorFiles.open(tmp_path / "out")
        assert set(files) == set(expected) - set(checkpoint.aliases)
        assert all(torch.equal(files.read(name), expected[name]) for name in files)


@pytest.mark.parametrize(("world_size", "case"), EVERY)
def test_merged_over_its_base_it_answers_as_trained(root: Path, tmp_path: Path, world_size: int, case: Case) -> None:
    from transformers import AutoModelForCausalLM

    folder = root / f"world_{world_size}" / case.name
    assert merged(root, folder, tmp_path / "out", "--base", str(root / "base"), "--lora-alpha", "8") == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits
    trained = torch.tensor(json.loads((folder / "logits.json").read_text()))
    tolerance = 1e-5 if case.precision == "fp32" else 0.1  # the trained forward itself runs in bf16
    assert torch.allclose(logits, trained, atol=tolerance * float(trained.abs().max()))


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "world_2" / "z2_fp32_lora", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(root: Path, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    words = words or ("--base", str(root / "base"), "--lora-alpha", "8")
    assert merged(root, folder, folder.parent / "out", *words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint"]
    return message


OPTIM_1 = "step_1/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def test_a_missing_file_is_named(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / OPTIM_1).unlink()
    assert f"{folder / OPTIM_1}: missing; the checkpoint was made by 2 ranks" in refused(root, folder, capsys)


def test_another_world_size_is_named(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / OPTIM_1, folder / OPTIM_1.replace("rank_1_", "rank_2_"))
    assert "3 files *_optim_states.pt, though 2 ranks made it" in refused(root, folder, capsys)


def test_a_truncated_file_is_named(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / OPTIM_1).read_bytes()
    (folder / OPTIM_1).write_bytes(content[: len(content) // 2])
    assert str(folder / OPTIM_1) in refused(root, folder, capsys)


def test_nothing_but_tensors_is_unpickled(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Fault:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder.parent / "owned",))

    torch.save({"optimizer_state_dict": Fault()}, folder / OPTIM_1)
    message = refused(root, folder, capsys)
    assert str(folder / OPTIM_1) in message
    assert "not unpickled" in message


def test_another_base_is_refused_by_name(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_language(folder.parent / "other", tied=True, seed=3)
    assert run_cli(
        main, [str(folder), str(folder.parent / "out"), "--base", str(folder.parent / "other"), "--lora-alpha", "8"]
    )
    assert f"{folder.parent / 'other'}: " in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_adapters_without_a_base_are_refused(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --base DIR and --lora-alpha" in refused(root, folder, capsys, "--probes", "1")
