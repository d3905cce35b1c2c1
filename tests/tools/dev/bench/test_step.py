"""The step's exact counts: what is executed over what is needed, and what is kept for the backward, beside the peer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import PadPacking, RowPacking
from models.common.errors import InputError
from tools.dev.bench import gpu
from tools.dev.bench.balance import waits
from tools.dev.bench.count import flops_of
from tools.dev.bench.pair import SHAPES, TINY, Length, make_samples, padded_batches
from tools.dev.bench.step import count_rows, count_step, count_whole, head_row


def test_attention_on_a_cpu_is_counted() -> None:
    """Causally half the pairs and the diagonal; two products forward, five backward."""
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    attended: list[torch.Tensor] = []
    run = torch.nn.functional.scaled_dot_product_attention
    assert flops_of(lambda: attended.append(run(q, k, v, is_causal=True))) == 2 * 3 * 15 * 8 * 4
    assert flops_of(attended[0].sum().backward) == 2 * 3 * 15 * 8 * 10
    assert flops_of(lambda: run(q, k, v)) == 2 * 3 * 25 * 8 * 4


@pytest.mark.slow
def test_a_layer_more_adds_what_every_layer_adds() -> None:
    """What towers of 2 and 3 layers tell of those of 3 and 4 is what is counted over these, to the last byte."""
    tiny = TINY["vicuna7b"]
    shape = replace(tiny, language={**tiny.language, "num_hidden_layers": 4})
    photo = np.zeros((48, 48, 3), np.uint8)
    batches = padded_batches(make_samples(shape, [Length(9, 4), Length(5, 2)], [photo]), shape, 2)
    assert count_whole(shape, "lora", batches, is_peer=False) == count_step(shape, "lora", batches, is_peer=False)


@pytest.mark.slow
def test_stage_1_executes_what_is_needed_and_keeps_less() -> None:
    """Vicuna-7B and CLIP ViT-L/14-336, 726 tokens of which 100 are learnt: exact, so that any change shows."""
    rows = count_rows(SHAPES["vicuna7b"], "7B", "projector", [Length(150, 100)] * 2)
    found = {row.what.removeprefix("7B: "): row for row in rows}
    print({name: (row.ours, row.peer, row.ratio) for name, row in found.items()})
    executed = found["executed over needed"]
    assert 1.0 <= executed.ours < 1.05
    assert 1.4 < executed.peer < 1.5  # transformers stops a recomputation once nothing more was saved
    assert found["kept for the backward, nothing recomputed"].ratio > 1.4
    assert found["positions over real tokens"].ours == 1.0


def test_the_loss_head_is_cheaper_where_few_positions_are_learnt() -> None:
    """7.26 times fewer products; with a head this small, other work has a larger share."""
    assert head_row(256, 8192, "float32", rounds=2).ratio > 3


def test_packed_rows_leave_ranks_little_to_wait_for_and_dealt_rows_less_than_others() -> None:
    dealt, as_they_come, once = waits(PadPacking())
    assert once <= dealt < as_they_come
    packed, _, packed_once = waits(RowPacking(row_tokens=4096))
    assert packed_once <= packed < dealt


@pytest.mark.slow
def test_the_accelerator_s_table_is_made_by_the_same_code_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photos/one.jpg")
    tiny = ["--pictures", "photos", "--device", "cpu", "--tiny", "--samples", "6", "--minutes", "0.01"]
    assert gpu.main(tiny) == 0
    rows = {row["what"]: row for row in json.loads(Path("runs/bench/gpu.json").read_text())}
    assert len(rows) == len(gpu.PLANS) * 4  # a CPU counts no memory
    for plan in gpu.PLANS:
        rate, work = rows[f"{plan.title}: samples"], rows[f"{plan.title}: needed work"]
        assert 0 < rate["ours"] < 1e6
        assert work["ours"] / rate["ours"] == pytest.approx(work["peer"] / rate["peer"])
    assert "qwen05b full: share of the measured ceiling" in capsys.readouterr().out
    with pytest.raises(InputError, match="no title begins so"):
        gpu.main([*tiny, "--only", "vicuna13b"])
    with pytest.raises(InputError, match=r"no \*.whl there"):
        gpu.main([*tiny, "--wheels", "photos"])
