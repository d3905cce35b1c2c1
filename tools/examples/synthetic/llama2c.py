"""karpathy's llama2.c files (a .bin of weights, a tokenizer.bin) as a Hugging Face Llama directory.

Owns the reading of both formats: the weights as `export.py` of llama2.c writes them in its version 0 and `run.c` reads
them, the vocabulary as `tokenizer.py` writes it. Its rotary embedding turns neighbouring pairs of a head's channels,
that of transformers turns halves, so the rows of wq and wk are reordered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError
from models.common.files import new_directory

if TYPE_CHECKING:
    import torch

_HEADER = struct.Struct("<7i")
_ENTRY = struct.Struct("<fi")
_FIRST_BYTE, _NUM_BYTES = 3, 256
_SPECIALS = ("<unk>", "<s>", "</s>")
"""The first ids; llama2.c writes the latter two with line ends around them."""


@dataclass(frozen=True)
class Header:
    """The seven integers a .bin begins with; a negative vocabulary means a separate output matrix."""

    width: int
    hidden_width: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_positions: int
    tied: bool

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads


def import_llama2c(model: Path, tokenizer: Path, out: Path) -> Header:
    """Write `out` as a Hugging Face directory: a LlamaForCausalLM and a tokenizer that gives the same ids."""
    header, tensors = read_weights(model)
    pieces = read_pieces(tokenizer, header.vocab_size)
    with new_directory(out, replace=False) as folder:
        build_model(header, tensors).save_pretrained(folder)
        build_tokenizer(pieces, header.max_positions).save_pretrained(folder)
    return header


def read_header(data: bytes, path: Path) -> Header:
    """The header of a .bin's bytes."""
    if len(data) < _HEADER.size:
        raise InputError(f"{path} is too short for a llama2.c model: name its .bin of weights")
    width, hidden, layers, heads, key_value_heads, vocab, positions = _HEADER.unpack_from(data)
    header = Header(width, hidden, layers, heads, key_value_heads, abs(vocab), positions, tied=vocab > 0)
    positive = min(width, hidden, layers, heads, key_value_heads, abs(vocab), positions) > 0
    if not positive or width % heads or heads % key_value_heads:
        raise InputError(f"{path} does not begin with a llama2.c header (version 0): name its .bin of weights")
    return header


def read_weights(path: Path) -> tuple[Header, dict[str, torch.Tensor]]:
    """The header, and the tensors under transformers' names and in its order of channels."""
    import torch

    data = _read(path)
    header = read_header(data, path)
    shapes = _layout(header)
    num_floats = sum(torch.Size(shape).numel() for _, shape in shapes)
    if len(data) != _HEADER.size + 4 * num_floats:
        raise InputError(f"{path} has {len(data)} bytes where its header asks for {_HEADER.size + 4 * num_floats}")
    flat = torch.frombuffer(bytearray(data[_HEADER.size :]), dtype=torch.float32)
    parts = flat.split([torch.Size(shape).numel() for _, shape in shapes])
    stored = {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
    return header, _rename(stored, header)


def _layout(header: Header) -> list[tuple[str, tuple[int, ...]]]:
    """What a .bin holds after its header, in order."""
    layers, width, hidden = header.num_layers, header.width, header.hidden_width
    key_value = header.num_key_value_heads * header.head_width
    rotary = (header.max_positions, header.head_width // 2)
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (header.vocab_size, width)),
        ("input_layernorm", (layers, width)),
        ("self_attn.q_proj", (layers, width, width)),
        ("self_attn.k_proj", (layers, key_value, width)),
        ("self_attn.v_proj", (layers, key_value, width)),
        ("self_attn.o_proj", (layers, width, width)),
        ("post_attention_layernorm", (layers, width)),
        ("mlp.gate_proj", (layers, hidden, width)),
        ("mlp.down_proj", (layers, width, hidden)),
        ("mlp.up_proj", (layers, hidden, width)),
        ("model.norm.weight", (width,)),
        ("rotary cosines", rotary),
        ("rotary sines", rotary),
    ]
    return shapes if header.tied else [*shapes, ("lm_head.weight", (header.vocab_size, width))]


def _rename(stored: dict[str, torch.Tensor], header: Header) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith("rotary"):
            continue  # transformers computes them
        if name.endswith(".weight"):
            tensors[name] = tensor
            continue
        for layer, weight in enumerate(tensor):
            turned = name in ("self_attn.q_proj", "self_attn.k_proj")
            tensors[f"model.layers.{layer}.{name}.weight"] = _pairs_to_halves(weight, header) if turned else weight
    if header.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def _pairs_to_halves(weight: torch.Tensor, header: Header) -> torch.Tensor:
    rows = weight.shape[0] // header.head_width
    return weight.reshape(rows, header.head_width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def build_model(header: Header, tensors: dict[str, torch.Tensor]) -> Any:
    """A LlamaForCausalLM with these weights; they must include every tensor of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.width,
        intermediate_size=header.hidden_width,
        num_hidden_layers=header.num_layers,
        num_attention_heads=header.num_heads,
        num_key_value_heads=header.num_key_value_heads,
        max_position_embeddings=header.max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, strict=True)
    return model


def read_pieces(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """(piece, score) in the order of ids; a space is written as sentencepiece's "▁"."""
    data = _read(path)
    pieces: list[tuple[str, float]] = []
    try:
        offset = 4  # the longest piece's length, which only `run.c` needs
        for _ in range(vocab_size):
            score, length = _ENTRY.unpack_from(data, offset)
            offset += _ENTRY.size + length
            pieces.append((data[offset - length : offset].decode("utf-8").replace(" ", "▁"), score))
    except (struct.error, UnicodeDecodeError):
        offset = -1
    if offset != len(data):
        raise InputError(f"{path} is no llama2.c tokenizer of {vocab_size} pieces: name the one made for this model")
    names = [*_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(_NUM_BYTES))]
    if [piece.strip() for piece, _ in pieces[: len(names)]] != names:
        raise InputError(f"{path} does not begin with {', '.join(_SPECIALS)} and the bytes: no llama2.c tokenizer")
    return [*((name, 0.0) for name in names), *pieces[len(names) :]]


def build_tokenizer(pieces: list[tuple[str, float]], max_positions: int) -> Any:
    """A fast tokenizer that merges as `run.c` does: the pair of neighbours with the highest-scored union first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    bpe = models.BPE(vocabulary, _merges(pieces, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _SPECIALS])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest-scored piece first."""
    learnt = sorted(pieces[_FIRST_BYTE + _NUM_BYTES :], key=lambda entry: -entry[1])
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in learnt
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"no file {path}: name a llama2.c model and its tokenizer.bin")
    return path.read_bytes()
