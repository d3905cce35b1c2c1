"""Stock transformers, 4.57 or 5: one by one, in a batch padded on the left, and by its pipeline; peft for adapters."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

NEWEST = int(transformers.__version__.split(".", maxsplit=1)[0]) >= 5


def chat(row: dict[str, str]) -> list[dict[str, Any]]:
    image = {"type": "image", "image": Image.open(row["image"]).convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]


def together(model: Any, processor: Any, rows: list[dict[str, str]], tokens: int, padding: bool) -> list[str]:
    words: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    words |= {"processor_kwargs": {"padding": True}} if NEWEST and padding else {"padding": True} if padding else {}
    chats = [chat(row) for row in rows]
    inputs = processor.apply_chat_template(chats if padding else chats[0], return_tensors="pt", **words)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(ids, skip_special_tokens=True)


def by_pipeline(model: Any, processor: Any, rows: list[dict[str, str]], tokens: int) -> list[str]:
    words = (
        {"generate_kwargs": {"do_sample": False, "max_new_tokens": tokens}}
        if not NEWEST
        else {"max_new_tokens": tokens}
    )
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    found = pipe(text=[chat(row) for row in rows], batch_size=8, return_full_text=False, **words)
    return [(each[0] if isinstance(each, list) else each)["generated_text"] for each in found]


def asked(job: dict[str, Any]) -> dict[str, Any]:
    directory, rows, tokens = job["directory"], job["questions"], job["tokens"]
    backend = {"backend": "pil"} if NEWEST else {}
    processor = AutoProcessor.from_pretrained(directory, **backend)
    model, report = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"weights that are missing: {report['missing_keys']}")
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    asking = {
        "single": lambda: [together(model, processor, [row], tokens, padding=False)[0] for row in rows],
        "batch": lambda: together(model, processor, rows, tokens, padding=True),
        "pipeline": lambda: by_pipeline(model, processor, rows, tokens),
    }
    return {mode: asking[mode]() for mode in job["modes"]}


def main(jobs: str, out: str) -> None:
    found = dict[str, Any]()
    for job in json.loads(Path(jobs).read_text()):
        try:
            found[job["name"]] = asked(job)
        except Exception as error:  # the other program's own: what it says goes into the table
            found[job["name"]] = f"{type(error).__name__}: {error}"
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
