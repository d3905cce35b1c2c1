"""Shared by all multi-token heads: the configuration of their layers, their norms, their initialization.

A layer is one of the decoder from scratch and adds no positions: the states already contain them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.attention import register
from models.memory_efficient import MemoryEfficientRMSNorm
from models.mtp.base import MtpConfig
from models.scratch_decoder import ScratchDecoderConfig, is_writer


def build_heads(config: MtpConfig, language: Any) -> nn.Module:
    """The heads that `config` names for a language model's configuration, initialized from torch's global generator."""
    layer = ScratchDecoderConfig(
        hidden_size=int(language.hidden_size),
        intermediate_size=int(language.intermediate_size),
        num_attention_heads=int(language.num_attention_heads),
        rms_norm_eps=float(language.rms_norm_eps),
    )
    layer._attn_implementation = register()
    heads = config.build(layer)
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.1 if is_writer(module) else 1.0))
    return heads


def new_norm(layer: ScratchDecoderConfig) -> MemoryEfficientRMSNorm:
    """RMSNorm of the layers' width with weights of 1."""
    return MemoryEfficientRMSNorm(nn.Parameter(torch.ones(layer.hidden_size)), layer.rms_norm_eps)
