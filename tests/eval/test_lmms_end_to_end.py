"""lmms-eval itself, with its own tasks, asks a bundle through our entry point: the answers of `eval.run`.

Needs an environment in which lmms-eval and Sightline are installed: SIGHTLINE_LMMS names its Python (`make lmms`). The
tables have the hub's columns and lie here, because nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from eval.predictor import Decoding, Predictor, Query, Turn
from eval.score import Sources, score
from eval.tasks import make_task
from eval.tasks.config import BenchmarkConfig
from tests.support.bundles import image, make_bundle

LMMS = os.environ.get("SIGHTLINE_LMMS", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LMMS, reason="no environment with lmms-eval: make lmms makes one and runs this"),
]

TASKS = {"mme": "mme", "pope": "pope", "chartqa": "chartqa", "ocrbench": "ocrbench"}
"""Our benchmark, and lmms-eval's task of the same protocol but for MME's limit of tokens."""
TOKENS = {"mme": 16}
NUM_ROWS = 6


def png(place: int) -> dict[str, Any]:
    stream = io.BytesIO()
    image(("circle", "square")[place % 2], (64, 56 + 4 * place)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{place}.png"}


def rows(name: str, said: list[str]) -> list[dict[str, Any]]:
    """A table of a benchmark; half of the right answers of ChartQA and OCRBench are what the model says."""
    right = [text if place % 2 else "nothing" for place, text in enumerate(said)]
    found = []
    for place in range(NUM_ROWS):
        common = {"question": f"What is {place}?", "image": png(place)}
        yes = {"question_id": f"existence/{place // 2}.png", "answer": ("Yes", "No")[place % 2]}
        own: dict[str, dict[str, Any]] = {
            "mme": {"category": "existence", **yes, "image": png(place // 2)},
            "pope": {"question_id": str(place), "category": "random", "answer": yes["answer"].lower()},
            "chartqa": {"type": ("human_test", "augmented_test")[place % 2], "answer": right[place]},
            "ocrbench": {"dataset": "IIIT5K", "question_type": "Regular Text Recognition", "answer": [right[place]]},
        }
        found.append({**common, **own[name]})
    return found


def write(path: Path, table: list[dict[str, Any]]) -> str:
    """A table as `datasets` writes it: which column is an image stands in the schema."""
    text = {"dtype": "string", "_type": "Value"}
    kinds = {dict: {"_type": "Image"}, list: {"feature": text, "_type": "List"}, str: text}
    features = {name: kinds[type(value)] for name, value in table[0].items()}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata(schema), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, and for each task the table and a YAML that is lmms-eval's own but for where the table lies."""
    folder = tmp_path_factory.mktemp("lmms")
    make_bundle(folder / "bundle")
    predictor = Predictor.open(folder / "bundle", device="cpu")
    found = subprocess.run(
        [LMMS, "-c", "import lmms_eval; print(lmms_eval.__path__[0])"], capture_output=True, text=True, check=True
    )
    tasks = Path(found.stdout.strip().splitlines()[-1]) / "tasks"
    for name, official in TASKS.items():
        said = []
        if name in ("chartqa", "ocrbench"):
            file = write(folder / f"{name}_asked.parquet", rows(name, ["?"] * NUM_ROWS))
            task: Any = make_task(BenchmarkConfig(benchmark=name, questions=(file,)))
            decoding = Decoding(max_new_tokens=task._max_new_tokens)
            pictures = [image(("circle", "square")[place % 2], (64, 56 + 4 * place)) for place in range(NUM_ROWS)]
            queries = [Query((each,), (Turn("user", task.prompt_of(place)),)) for place, each in enumerate(pictures)]
            said = [text.strip() or "empty" for text in predictor.answer(queries, decoding)]
        write(folder / f"{name}.parquet", rows(name, said or ["yes"] * NUM_ROWS))
        own = {
            "include": str(tasks / official / f"{official}.yaml"),
            "task": f"{name}_here",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.parquet")}},
        }
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


@pytest.fixture(scope="module")
def lmms_results(folder: Path) -> dict[str, Any]:
    command = [
        LMMS,
        "-m",
        "lmms_eval",
        "--model",
        "sightline",
        "--model_args",
        f"pretrained={folder}/bundle,device=cpu",
    ]
    command += ["--tasks", ",".join(f"{name}_here" for name in TASKS), "--include_path", str(folder / "tasks")]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PYTHONPATH": ""}
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    written = list((folder / "out").rglob("*_results.json"))
    assert len(written) == 1, done.stdout[-4000:]  # it reports an error, and ends with 0
    return dict(json.loads(written[0].read_text())["results"])


@pytest.mark.parametrize("name", TASKS)
def test_lmms_eval_gets_the_answers_of_our_own_evaluation(
    name: str, folder: Path, lmms_results: dict[str, Any]
) -> None:
    (samples,) = (folder / "out").rglob(f"*_samples_{name}_here.jsonl")
    file = str(folder / f"{name}.parquet")
    task = make_task(BenchmarkConfig(benchmark=name, questions=(file,), max_new_tokens=TOKENS.get(name)))
    ours = task.run(Predictor.open(folder / "bundle", device="cpu"), 2)
    theirs = score(name, Sources((str(samples),), (file,)))
    assert [line["answer"].strip() for line in theirs.samples] == [line["answer"].strip() for line in ours.samples]
    assert theirs.metrics == ours.metrics
    figures = lmms_results[f"{name}_here"]
    if name == "chartqa":
        assert 100 * figures["relaxed_overall,none"] == ours.metrics["accuracy"] == 50.0
    elif name == "ocrbench":
        assert 1000 * figures["ocrbench_accuracy,none"] == ours.metrics["score"] == NUM_ROWS / 2
