"""A tiny Qwen3-VL of the synthetic world: a tower that has learnt labels, and a language model that has read only text.

    worlds of several sizes --> tower of native resolution, trained to classify the shape at each place
    Qwen3 (language.py)     --> decoder, with four more tokens for images
    both                    --> a Hugging Face folder of `Qwen3VLForConditionalGeneration`: a published model in small

The two have never met: aligning them is the mergers' task, as in the other families. Does not own the world or the
language model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.errors import InputError
from models.common.files import new_directory
from models.common.source import directory_of
from tools.examples.synthetic.clip import MEAN, STD, load_pixels, read_captions
from tools.examples.synthetic.encoders import NUM_CHECKED, POSITION_SCALE, WORDS, examine, labels, sum_of_losses
from tools.examples.synthetic.language import END
from tools.examples.synthetic.optimise import Schedule, fit
from tools.examples.synthetic.world import PLACES, SHAPES

VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class NativeSize:
    """The tower's shape: an image token stands for a quarter of the smallest image."""

    patch_size: int = 12
    merge: int = 2
    width: int = 96
    num_layers: int = 3
    num_heads: int = 4
    table_side: int = 4
    """Rows of learnt positions, which are stretched over an image."""
    level: int = 1
    """The block whose features the decoder's first layer gets."""


def make_native(
    worlds: Sequence[Path], out: Path, steps: int, batch_size: int, seed: int, *, language: Path
) -> dict[str, float]:
    """Train the tower on the images of `worlds`, in turn; join it with the Qwen3 in `language`, and write the whole.

    Returns the share of image tokens, of images that were not trained on, where all attributes are right.
    """
    import torch
    from transformers import AutoTokenizer

    from models.opening import open_language

    size = NativeSize()
    directory = directory_of(str(language))
    tokenizer = with_image_tokens(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
    base = open_language(directory, torch.float32)
    if base.config.model_type != "qwen3":
        raise InputError(f"{language}: a {base.config.model_type}; make one with --kind qwen3")
    drawn = [_read(world) for world in worlds]
    with new_directory(out, replace=False) as folder:
        torch.manual_seed(seed)
        model = build_native(size, base, tokenizer)
        classifier = build_classifier(model.model.visual)
        batches = _draw(drawn, batch_size, random.Random(f"{seed}:native"))
        losses = (sum_of_losses(classifier(pixels), classifier.labels(found, pixels)) for pixels, found in batches)
        train_loss = fit(classifier, losses, steps, Schedule(2e-3), "native")
        shares = [
            examine(classifier, pixels[-NUM_CHECKED:], classifier.labels(found[-NUM_CHECKED:], pixels))
            for pixels, found in drawn
        ]
        reached = {"steps": steps, "train_loss": train_loss, "tokens_right": min(shares)}
        classifier.give_back()
        model.save_pretrained(folder)
        _write_processor(folder, tokenizer, size, [int(pixels.shape[-1]) for pixels, _ in drawn])
        (folder / "reached.json").write_text(json.dumps(reached, indent=1) + "\n", encoding="utf-8")
    return reached


def _read(world: Path) -> tuple[Any, Any]:
    """(pixels [N, 3, S, S], labels [N, places, attributes]) of a world."""
    import torch

    images, captions = read_captions(world)
    return load_pixels(images), torch.tensor([labels(several[0]) for several in captions])


def with_image_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens of an image, and a template that has a place for one."""
    tokenizer.add_special_tokens({"additional_special_tokens": [VISION_START, VISION_END, IMAGE, VIDEO]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_native(size: NativeSize, base: Any, tokenizer: Any) -> Any:
    """A Qwen3-VL with a fresh tower and the weights of `base`; new tokens get the mean of all rows."""
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from models.export import with_image_row

    text = {name: value for name, value in base.config.to_dict().items() if name not in ("model_type", "architectures")}
    half = base.config.head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": sections, "mrope_interleaved": True}
    vision = {
        "depth": size.num_layers,
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_heads": size.num_heads,
        "patch_size": size.patch_size,
        "spatial_merge_size": size.merge,
        "out_hidden_size": base.config.hidden_size,
        "num_position_embeddings": size.table_side**2,
        "deepstack_visual_indexes": [size.level],
    }
    names = {"image_token": IMAGE, "video_token": VIDEO, "vision_start_token": VISION_START}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    ids["vision_end_token_id"] = tokenizer.convert_tokens_to_ids(VISION_END)
    config = Qwen3VLConfig(
        vision_config=vision, text_config={**text, "vocab_size": len(tokenizer)}, tie_word_embeddings=False, **ids
    )
    model = Qwen3VLForConditionalGeneration(config)
    grown = {name: with_image_row(name, value, len(tokenizer)) for name, value in base.state_dict().items()}
    model.lm_head.weight.data = grown.pop("lm_head.weight")
    model.model.language_model.load_state_dict({name.removeprefix("model."): value for name, value in grown.items()})
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(POSITION_SCALE)
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    return model


def build_classifier(visual: Any) -> Any:
    """A tower of transformers and its mergers, with classifiers over its image tokens."""
    import torch

    from models.native.merger import NativeMerger
    from models.native.tower import MERGERS, NativeTower, without_mergers
    from models.patch_plan import plan_patches
    from models.spec import PatchGrid

    class Classifier(torch.nn.Module):
        """Pixels as bytes -> for size, colour, shape and place the logits [B, image tokens, classes]."""

        def __init__(self) -> None:
            super().__init__()
            config = visual.config
            side = round(config.num_position_embeddings**0.5)
            self.grid = PatchGrid(patch_size=config.patch_size, merge=config.spatial_merge_size, table_side=side)
            self.mergers = NativeMerger(visual)
            self.tower = NativeTower(without_mergers(visual), self.grid)
            counts = [len(words) + (words is SHAPES) for words in WORDS]
            self.heads = torch.nn.ModuleList(torch.nn.Linear(config.out_hidden_size, count) for count in counts)

        def forward(self, pixels_BCHW: Any) -> list[Any]:
            num, _, height, width = pixels_BCHW.shape
            normalised = (pixels_BCHW.float() / 255 - MEAN[0]) / STD[0]
            plan = plan_patches(self.grid, [(height, width)] * num)
            last_PV, *_ = self.tower(patches(normalised, self.grid.patch_size, self.grid.merge), plan)
            tokens_BIV = self.mergers.merger(last_PV).unflatten(0, (num, -1))
            return [head(tokens_BIV) for head in self.heads]

        def labels(self, found_BPA: Any, pixels_BCHW: Any) -> Any:
            """The labels of each image token: those of the place in which it lies, [B, image tokens, attributes]."""
            across = round(len(PLACES) ** 0.5)
            times = pixels_BCHW.shape[-1] // self.grid.factor // across
            square = found_BPA.unflatten(1, (across, across))
            return square.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1, 2)

        def give_back(self) -> None:
            """Put the mergers into the tower of transformers again."""
            for name in MERGERS:
                setattr(visual, name, getattr(self.mergers, name))

    return Classifier()


def patches(pixels_BCHW: Any, side: int, merge: int) -> Any:
    """Images as patches [P, C, S, S], block after block of merge x merge, as the processor cuts them."""
    num, channels, height, width = pixels_BCHW.shape
    block = side * merge
    cut = pixels_BCHW.view(num, channels, height // block, merge, side, width // block, merge, side)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels, side, side)


def _draw(drawn: Sequence[tuple[Any, Any]], batch_size: int, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """Batches without end, (pixels, labels), of one world after the other."""
    import torch

    while True:
        for pixels_NCHW, labels_NPA in drawn:
            num = len(pixels_NCHW) - NUM_CHECKED
            chosen_B = torch.tensor(rng.sample(range(num), min(batch_size, num)))
            yield pixels_NCHW[chosen_B], labels_NPA[chosen_B]


def _write_processor(folder: Path, tokenizer: Any, size: NativeSize, sides: Sequence[int]) -> None:
    """The processor's files, which leave images of these sides as they are; named as Qwen3-VL's own."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from models.native.processors import Qwen3VLImagesProcessor

    images = Qwen2VLImageProcessorPil(
        patch_size=size.patch_size,
        merge_size=size.merge,
        size={"shortest_edge": min(sides) ** 2, "longest_edge": max(sides) ** 2},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor = Qwen3VLImagesProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    shared = {name: getattr(images, name) for name in ("patch_size", "merge_size", "temporal_patch_size", "size")}
    video = {
        **shared,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    file = folder / "video_preprocessor_config.json"  # without it transformers and vLLM open no Qwen3-VL
    file.write_text(json.dumps(video, default=dict, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.json"):
        if "VLImagesProcessor" in (written := file.read_text(encoding="utf-8")):
            file.write_text(written.replace("VLImagesProcessor", "VLProcessor"), encoding="utf-8")
