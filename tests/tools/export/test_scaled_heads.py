"""Bundles of parts that stock Llava would compute otherwise: scaled logits, and a tower with registers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.bundle import verify
from tests.support.backbones import make_language, make_tokenizer
from tests.support.checkpoints import write_finished
from tests.support.towers import make_dinov3
from tests.tools.conftest import merge, run_of


def make_granite(folder: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.1,
        logits_scaling=4.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    GraniteForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_what_stock_llava_leaves_out_is_in_the_bundle(tmp_path: Path) -> None:
    """The parity report compares logits, which would be four times as large, and five more features an image."""
    recipe = run_of(tmp_path)
    make_language(tmp_path / "language", width=32)  # its tokenizer
    make_granite(tmp_path / "language")
    make_dinov3(tmp_path / "dinov3")
    recipe["model"]["vision"] |= {"kind": "dinov3", "path": str(tmp_path / "dinov3")}
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    checks = {check.name: check for check in verify(tmp_path / "bundle").parity.checks}
    assert checks["largest relative logit difference"].value < 1e-5
    assert checks["golden answers' loss difference"].value < 1e-5
    assert checks["prompt ids differ"].value == 0
