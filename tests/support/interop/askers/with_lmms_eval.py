"""lmms-eval's own model `llava_hf`, unchanged, on requests as its tasks make them."""

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.models.simple.llava_hf import LlavaHf
from PIL import Image


def asked(job: dict[str, Any]) -> dict[str, Any]:
    model = LlavaHf(pretrained=job["directory"], device="cpu", device_map="cpu")
    rows = job["questions"]
    model.task_dict["interop"] = {"test": rows}

    def picture(row: dict[str, str]) -> list[Any]:
        return [Image.open(row["image"]).convert("RGB")]

    requests = []
    for place, row in enumerate(rows):
        arguments = (row["question"], {"max_new_tokens": job["tokens"]}, picture, place, "interop", "test")
        metadata = {"task": "interop", "doc_id": place, "repeats": 1}
        requests.append(Instance("generate_until", arguments, 0, metadata))
    return {"llava_hf": model.generate_until(requests)}


def main(jobs: str, out: str) -> None:
    found = dict[str, Any]()
    for job in json.loads(Path(jobs).read_text()):
        try:
            found[job["name"]] = asked(job)
        except Exception as error:  # lmms-eval's own: what it says goes into the table
            found[job["name"]] = f"{type(error).__name__}: {error}"
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
