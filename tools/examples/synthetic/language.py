"""A tiny causal language model that reads only text: its tokenizer, its pretraining, and its folder on disk.

Owns a byte-level BPE with a chat template of three tokens a turn (none for images), and a Llama (or Qwen3) of a few
layers. It is trained on text.jsonl to imitate questions and answers, which it can only guess: it never sees an image.
Aligning it with images is the projector's task.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from models.common.errors import InputError
from models.common.files import new_directory, read_lines
from tools.examples.synthetic.optimise import Schedule, fit

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + ('<|end|>' if message['role'] == 'assistant' else '') }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NUM_CHECKED = 128
"""Texts at the file's end that are not trained on: the scores are measured on them."""
_SORTED_TOGETHER = 16
"""Batches per group of texts sorted by length, so that there is little padding."""
_IGNORED = -100


@dataclass(frozen=True)
class LanguageSize:
    """The model's shape; its output matrix is not tied to its embedding."""

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 3
    num_heads: int = 2
    max_positions: int = 1024
    initializer_range: float = 0.1
    """About 1 / sqrt(hidden_size): at Llama's own 0.02 attention stays flat for hundreds of steps."""


class Row(NamedTuple):
    """A tokenized conversation: ids, and whether each belongs to an assistant turn."""

    ids: list[int]
    spoken: list[bool]


def pretrain_language(
    world: Path, out: Path, steps: int, batch_size: int, seed: int, *, kind: str = "llama"
) -> dict[str, float]:
    """Train tokenizer and model (one of KINDS) on `world`/text.jsonl; write a Hugging Face folder with reached.json.

    Returns the loss per answer token and the share of answers that are exactly right (each token the most likely one,
    given those before it), on texts that were not trained on.
    """
    import torch

    texts = read_texts(world / "text.jsonl")
    learnt, checked = texts[:-NUM_CHECKED], texts[-NUM_CHECKED:]
    with new_directory(out, replace=False) as folder:
        tokenizer = train_tokenizer([message["content"] for text in learnt for message in text])
        torch.manual_seed(seed)
        model = build_language(LanguageSize(), tokenizer, kind)
        rows = [encode(tokenizer, text) for text in learnt]
        drawn = draw_batches(rows, batch_size, random.Random(f"{seed}:language"))
        batches = (collate(batch, tokenizer.pad_token_id) for batch in drawn)
        losses = (model(input_ids=ids_BL, labels=labels_BL).loss for ids_BL, labels_BL in batches)
        train_loss = fit(model, losses, steps, Schedule(peak=2e-3), "language")
        unseen = collate([encode(tokenizer, text) for text in checked], tokenizer.pad_token_id)
        reached = {"steps": steps, "train_loss": train_loss, **examine(model, *unseen)}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "reached.json").write_text(json.dumps(reached, indent=1) + "\n", encoding="utf-8")
    return reached


def read_texts(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a text.jsonl."""
    if not path.is_file():
        raise InputError(f"no {path}: make a world first (python -m tools.toy world OUT)")
    texts = [line["messages"] for line in read_lines(path)]
    if len(texts) <= NUM_CHECKED:
        raise InputError(f"{path} holds {len(texts)} texts, not over {NUM_CHECKED}: draw a world of more scenes")
    return texts


def train_tokenizer(contents: Sequence[str]) -> Any:
    """A byte-level BPE with the chat template's markers; eos is `<|end|>`, and padding has a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LanguageSize.vocab_size,
        special_tokens=[USER, ASSISTANT, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*contents, "\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=LanguageSize.max_positions
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


KINDS = {"llama": "Llama", "qwen3": "Qwen3"}
"""The kinds of language model -> what their classes in transformers begin with."""


def build_language(size: LanguageSize, tokenizer: Any, kind: str) -> Any:
    """A fresh model from PyTorch's current random state."""
    import transformers

    config = getattr(transformers, f"{KINDS[kind]}Config")(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.hidden_size // size.num_heads,
        max_position_embeddings=size.max_positions,
        initializer_range=size.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config)


def encode(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Row:
    """A conversation tokenized by CHAT_TEMPLATE; answers and their end markers are targets."""
    parts: list[tuple[str, bool]] = []
    for message in messages:
        said = message["role"] == "assistant"
        parts.append((f"<|{message['role']}|>", False))
        parts.append((message["content"] + (END if said else ""), said))
    pieces = tokenizer([text for text, _ in parts], add_special_tokens=False).input_ids
    ids = [token for piece in pieces for token in piece]
    spoken = [said for piece, (_, said) in zip(pieces, parts, strict=True) for _ in piece]
    return Row(ids, spoken)


def draw_batches(rows: Sequence[Row], batch_size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Batches without end, of rows with similar lengths; each row once per epoch, except for the remainder."""
    window = min(batch_size * _SORTED_TOGETHER, len(rows) // batch_size * batch_size)
    if not window:
        raise InputError(f"a batch of {batch_size} needs as many texts, and there are {len(rows)}")
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - window + 1, window):
            run = sorted(order[start : start + window], key=lambda index: len(rows[index].ids))
            cuts = list(range(0, window, batch_size))
            rng.shuffle(cuts)
            for cut in cuts:
                yield [rows[index] for index in run[cut : cut + batch_size]]


def collate(rows: Sequence[Row], pad_id: int) -> tuple[Any, Any]:
    """(ids_BL, labels_BL), padded on the right; only assistant turns have labels."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids_BL = torch.full((len(rows), longest), pad_id)
    labels_BL = torch.full((len(rows), longest), _IGNORED)
    for index, row in enumerate(rows):
        ids_L = torch.tensor(row.ids)
        ids_BL[index, : len(row.ids)] = ids_L
        labels_BL[index, : len(row.ids)] = ids_L.where(torch.tensor(row.spoken), _IGNORED)
    return ids_BL, labels_BL


def examine(model: Any, ids_BL: Any, labels_BL: Any) -> dict[str, float]:
    """Loss per answer token, and the share of answers of which every token is the most likely one."""
    import torch

    with torch.no_grad():
        output = model(input_ids=ids_BL, labels=labels_BL)
    said_BL = labels_BL[:, 1:] != _IGNORED
    wrong_BL = said_BL & (output.logits[:, :-1].argmax(-1) != labels_BL[:, 1:])
    starts_BL = said_BL & ~torch.nn.functional.pad(said_BL, (1, 0))[:, :-1]
    answer_BL = starts_BL.cumsum(1)  # which answer of its row a token belongs to, from 1
    row_BL = torch.arange(len(ids_BL)).unsqueeze(1) * int(answer_BL.max() + 1)
    failed = (answer_BL + row_BL)[wrong_BL].unique().numel()
    return {"loss": float(output.loss), "exact": 1 - failed / int(starts_BL.sum())}
