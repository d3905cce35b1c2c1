"""Two whole programs on the same published model and the same photos: `trainer.main`, and TRL's SFTTrainer.

    python -m tools.bench.sft DATA --tokenizer DIR [--work runs/bench/sft] [--tuned lora full]

DATA has captions.json and images/, as `make photos` takes it. The model is a Llava with CLIP ViT-L/14-336 and the
language model of Qwen2.5-0.5B, drawn once and written as a directory that both open. Both read and decode the photos by
8 processes, take one caption as the answer, 16 rows a step in bf16, and learn projector and language model (adapters of
rank 16 on every linear layer, or all of it). The peer runs with its defaults, which recompute every layer, and again
without that. Samples a second are those of the steps after the first third.

Needs trl and datasets. Owns the two set-ups.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli
from models.common.files import read_lines, write_json

if TYPE_CHECKING:
    from tools.dev.bench.measure import Row

PACKAGES = ["torch", "transformers", "peft", "deepspeed", "trl"]
PROMPT = "Describe the picture."
RANK = 16
WORKERS = 8
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(argv: list[str]) -> int:
    """Draw the model once, run both programs, print the table and write runs/bench/sft.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.sft", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path, help="a folder with captions.json and images/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with Qwen2's tokenizer")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/sft"), help="where model, shards and runs go")
    parser.add_argument("--tuned", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--peer", choices=["recomputing", "keeping"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 3:
        raise InputError("--steps: at least 3")
    if arguments.peer is not None:
        return _run_peer(arguments)
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)}: not installed; the peer needs trl and datasets")
    _prepare(arguments)
    rows = [row for tuned in arguments.tuned for row in _compare(arguments, tuned)]
    from tools.dev.bench.measure import report

    report("sft", rows)
    return 0


def _compare(arguments: argparse.Namespace, tuned: str) -> list[Row]:
    from tools.dev.bench.measure import row

    ours = _ours(arguments, tuned)
    rows = []
    for how, says in (("recomputing", "its defaults"), ("keeping", "nothing recomputed")):
        peer = _peer(arguments, tuned, how)
        rows.append(row(f"{tuned}, the peer with {says}", "samples/s", ours, peer, PACKAGES))
        print(f"{rows[-1].what}: {ours:.1f} and {peer:.1f} samples/s", flush=True)
    return rows


def _prepare(arguments: argparse.Namespace) -> None:
    """The model's directory and the shards, where they are not there yet."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").is_dir():
        _draw_model(arguments, work / "model")
    if not (work / "shards").is_dir():
        source = ("--captions", arguments.data / "captions.json", "--images", arguments.data / "images")
        _run("tools.shards", "make", work / "shards", *source, "--prompt", PROMPT)


def _draw_model(arguments: argparse.Namespace, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from tools.dev.bench.pair import SHAPES, TINY, build_peer

    shape = (TINY if arguments.tiny else SHAPES)["qwen05b"]
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, trust_remote_code=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if arguments.tiny:
        shape.language["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    model = build_peer(shape, torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.image_token_id = model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    for config in (model.config.get_text_config(), model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    side = shape.vision["image_size"]
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    model.save_pretrained(folder)


def _ours(arguments: argparse.Namespace, tuned: str) -> float:
    """Samples a second of `trainer.main` over a recipe, from its own log."""
    work: Path = arguments.work
    run = work / f"ours_{tuned}_{time.time_ns()}"
    language = {"kind": "lora", "learning_rate": 2e-4, "rank": RANK, "alpha": 2 * RANK}
    stage = {
        "tune": {
            "projector": {"kind": "full", "learning_rate": 1e-3},
            "language": language if tuned == "lora" else {"kind": "full", "learning_rate": 2e-5},
        },
        "data": {
            "sources": [{"path": str(work / "shards")}],
            "template": {"kind": "model"},
            "max_length": 2048,
            "num_workers": WORKERS,
        },
        "duration": {"unit": "steps", "count": arguments.steps},
        "batch": {"global_rows": arguments.rows, "micro_rows": arguments.rows},
        "engine": {"precision": "bf16", "zero": "zero1"},
        "checkpoint": {"every_steps": 10 * arguments.steps},
    }
    recipe = {
        "name": "sft",
        "run": str(run),
        "model": {"kind": "published", "path": str(work / "model")},
        "stages": {"sft": stage},
        "tracking": {"log_every_steps": 1},
    }
    file = work / f"{run.name}.json"
    write_json(file, recipe)
    _run("trainer.main", file, "--stage", "sft")
    lines = read_lines(run / "sft" / "metrics.jsonl")
    rates = [float(each["samples_per_s"]) for each in lines if "samples_per_s" in each]
    return statistics.harmonic_mean(rates[len(rates) // 3 :])


def _peer(arguments: argparse.Namespace, tuned: str, how: str) -> float:
    options = ("--tokenizer", arguments.tokenizer, "--work", arguments.work, "--tuned", tuned, "--peer", how)
    given = (*options, "--steps", arguments.steps, "--rows", arguments.rows)
    said = _run("tools.dev.bench.sft", arguments.data, *given)
    return float(said.strip().splitlines()[-1].rpartition(" ")[2])


def _run(module: str, *arguments: object) -> str:
    """What a command of this project prints; raises InputError with its last lines where it fails."""
    print(f"{module} {' '.join(map(str, arguments))}", flush=True)
    command = [sys.executable, "-m", module, *(str(each) for each in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{module}: {done.returncode}: {' | '.join((done.stdout + done.stderr).splitlines()[-12:])}")
    return done.stdout


def _run_peer(arguments: argparse.Namespace) -> int:
    """SFTTrainer in this process; the last line printed has its samples a second."""
    import torch
    from datasets import Dataset, Image, Sequence
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from models.opening import open_model, open_processor
    from tools.examples.photos.split import read_entries

    folder = arguments.work / "model"
    tuned, has_gpu = arguments.tuned[0], torch.cuda.is_available()
    entries = read_entries(arguments.data)
    rows = [
        {
            "images": [str(arguments.data / "images" / each["file_name"])],
            "prompt": [{"role": "user", "content": PROMPT}],
            "completion": [{"role": "assistant", "content": each["caption"]}],
        }
        for each in entries
    ]
    photos = Dataset(InMemoryTable.from_pylist(rows), fingerprint="photos")  # to make one, pyarrow 26 is not pickled
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            if has_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    settings = SFTConfig(
        output_dir=str(arguments.work / "peer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        gradient_checkpointing=arguments.peer == "recomputing",
        bf16=True,
        use_cpu=not has_gpu,
        dataloader_num_workers=WORKERS,
        max_length=None,
        learning_rate=2e-5,
        save_strategy="no",
        report_to=[],
        logging_steps=arguments.steps,
        disable_tqdm=True,
    )
    model = open_model(folder, torch.device("cpu"))
    adapter = None
    if tuned == "lora":
        linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        adapter = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=linears,
            modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM",
        )  # fmt: skip
    else:
        model.model.vision_tower.requires_grad_(False)
    SFTTrainer(
        model=model,
        args=settings,
        train_dataset=photos.cast_column("images", Sequence(Image())),
        processing_class=open_processor(folder),
        peft_config=adapter,
        callbacks=[Clock()],
    ).train()
    kept = ends[len(ends) // 3 :]
    print(f"samples/s {arguments.rows * (len(kept) - 1) / (kept[-1] - kept[0])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
