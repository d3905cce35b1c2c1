"""A bundle for llama.cpp: `sightline export RUN-or-BUNDLE OUT --to gguf`.

    OUT/model.gguf     the language model (tools.export.gguf_language), tokenizer (gguf_tokenizer), chat template
    OUT/mmproj.gguf    tower and projector (tools.export.gguf_vision)
    OUT/parity.json, README.md

Where the package xllamacpp is installed, llama.cpp itself is asked about the golden set's pictures, made square, and
compared with stock transformers on the bundle.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError
from models.common.files import new_directory

if TYPE_CHECKING:
    from models.bundle import Check, Parity
    from tools.export.formats import ExportOptions
    from tools.export.golden import Probe
    from tools.export.llama_cpp import Answer

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
NUM_TOKENS = 6
"""Tokens of an answer."""

BOUND = {"fp32": 0.05, "fp16": 0.2, "bf16": 0.2}
"""Largest difference of a first token's log probability, in nats. llama.cpp computes GELU by tanh, the projector's as
well, from a table in fp16."""


def export(bundle: Path, out: Path, options: ExportOptions) -> str:
    """Write both files, and compare llama.cpp's answers where it is installed.

    Raises:
        InputError: the bundle is damaged or quantized, llama.cpp would compute it otherwise, or parity fails.
    """
    from models.bundle import verify
    from models.opening import open_config
    from tools.export.card import write_card
    from tools.export.gguf_language import write_language
    from tools.export.gguf_vision import PAD_COLOUR, check_vision, write_vision
    from tools.export.public import check_stock
    from tools.export.report import insist, write_parity

    if find_spec("gguf") is None:
        raise InputError("the package gguf is needed: pip install 'sightline[gguf]'")
    manifest = verify(bundle)
    if manifest.precision not in BOUND:
        raise InputError(
            f"{bundle}: it is {manifest.precision} already; export the merged bundle it was made from, and quantize"
            " model.gguf with llama-quantize"
        )
    config, name = open_config(bundle), str(manifest.recipe.get("name", "sightline"))
    check_stock(config, bundle, "gguf")
    check_vision(config, bundle)
    with new_directory(out) as directory:
        counts = (
            write_language(bundle, directory / MODEL, config, name),
            write_vision(bundle, directory / MMPROJ, config, name),
        )
        parity = _compare(bundle, directory, options, manifest.precision)
        insist(parity, f"{out}: llama.cpp's answers differ from those of {bundle}", options.force)
        write_parity(directory, parity)
        write_card(directory, "gguf", manifest.recipe, parity, options, family=config.model_type)
    return (
        f"{counts[0]} tensors of the language model, {counts[1]} of the image part; llama.cpp pads pictures that are"
        f" not square with the colour {PAD_COLOUR}, whatever training did"
    )


def _compare(bundle: Path, directory: Path, options: ExportOptions, precision: str) -> Parity:
    from models.bundle import Check, Parity
    from models.opening import open_config
    from tools.export.llama_cpp import ask, is_installed

    reference = "stock transformers on the bundle"
    if not is_installed():
        note = "not tried, xllamacpp is not installed (pip install 'sightline[gguf]')"
        check = Check(name="opened by llama.cpp", value=0.0, bound=None, passed=True, note=note)
        return Parity(reference=reference, num_prompts=0, checks=(check,))
    side = int(open_config(bundle).vision_config.image_size)
    probes = [dataclasses.replace(each, image=each.image.resize((side, side))) for each in options.probes]
    asked = [(probe.image, probe.question) for probe in probes]
    found = ask(directory / MODEL, directory / MMPROJ, asked, NUM_TOKENS)
    checks = compare_answers(bundle, probes, found, BOUND[precision])
    return Parity(reference=reference, num_prompts=len(probes), checks=checks)


def compare_answers(bundle: Path, probes: list[Probe], found: list[Answer], bound: float) -> tuple[Check, ...]:
    """llama.cpp's answers against those of stock transformers, on the same prompts and pictures."""
    import torch

    from models.bundle import Check
    from models.opening import open_model, open_processor
    from tools.export.parity import device_of_this_machine, stock_inputs

    device, processor = device_of_this_machine(), open_processor(bundle)
    model = open_model(bundle, device).float()
    ends = processor.tokenizer.all_special_ids
    lengths, gap, num_firsts, num_compared, num_answers = 0, 0.0, 0, 0, 0
    for probe, answer in zip(probes, found, strict=True):
        inputs = {name: value.to(device) for name, value in stock_inputs(processor, probe).items()}
        num_prompt = inputs["input_ids"].shape[1]
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=NUM_TOKENS, output_logits=True, return_dict_in_generate=True)
        lengths += num_prompt != answer.num_prompt
        text = processor.tokenizer.decode(made.sequences[0, num_prompt:], skip_special_tokens=True)
        num_answers += text.strip() == answer.text.strip()
        first_V = made.logits[0][0].float().log_softmax(-1)
        first = int(first_V.argmax())
        if first in ends or "\ufffd" in processor.tokenizer.decode([first]) or not answer.top:
            continue  # llama.cpp names no probabilities of an end, and later those of half a character
        num_compared += 1
        num_firsts += float(first_V[first] - first_V[answer.top[0][0][0]]) <= bound  # two may be almost alike
        gap = max(gap, *(abs(float(first_V[token]) - value) for token, value in answer.top[0]))
    same, share = num_firsts / max(1, num_compared), num_answers / len(found)
    note = f"of {num_compared} that begin with a whole character"
    return (
        Check(name="prompts of another length", value=float(lengths), bound=0.0, passed=lengths == 0),
        Check(name="largest difference of a log probability", value=gap, bound=bound, passed=gap <= bound),
        Check(
            name="share of first tokens that are likeliest in both",
            value=same,
            bound=0.9,
            passed=same >= 0.9,
            note=note,
        ),
        Check(name=f"share of same answers of {NUM_TOKENS} tokens", value=share, bound=None, passed=True),
    )
