"""Scoring answers that are there: published figures to the last digit, without torch, quickly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.spec import load, names
from eval.score import Sources, main, score
from tests.support.paths import REPOSITORY, data, needs_data
from tools.dev.bench.evaluate import scoring_s

OFFICIAL = {
    "pope": "pope",
    "mme": "mme",
    "mmbench": "mmbench_dev",
    "seed": "seed",
    "mmmu": "mmmu_val_seed42",
    "mathvista": "mathvista",
    "chartqa": "chartqa",
    "docvqa": "docvqa",
    "gqa": "gqa",
    "scienceqa": "scienceqa",
    "mmvet": "mmvet",
    "llavabench": "llava_bench",
}
"""Our benchmark for each set of real answers, by the beginning of its name."""

NAMES = {
    "mean_f1": "f1/mean",
    "all": "accuracy",
    "img": "accuracy_with_picture",
    "overall": "accuracy",
    "acc": "accuracy",
    "image": "accuracy/image",
    "video_known": "accuracy/video",
    "test_human": "accuracy/test_human",
    "test_augmented": "accuracy/test_augmented",
}


def folder() -> Path:
    return data("eval", "predictions_official")


def sets() -> list[str]:
    from tests.support.paths import DATA

    path = DATA / "eval/predictions_official/reference.json" if DATA is not None else None
    if path is None or not path.is_file():
        return []
    return [name for name in json.loads(path.read_text()) if not name.startswith("paired")]


def named(benchmark: str, reference: dict[str, Any]) -> dict[str, float]:
    """The figures of the reference under our names."""
    found: dict[str, float] = {}
    for key, value in reference.items():
        if isinstance(value, dict):
            short = {"f1": "f1", "acc": "accuracy", "yes": "yes_share"}
            found |= {f"{short[figure]}/{key}": each for figure, each in value.items()}
        elif key == "runs":
            found |= {f"total/{run}": each for run, each in enumerate(value, start=1)}
        elif key == "open":
            found["accuracy/short-answer"] = 100 * value[1] / value[0]
        elif benchmark == "mme" and key not in ("perception", "cognition"):
            found[f"score/{key}"] = value
        elif benchmark == "llava_bench":
            found[f"relative/{key}"] = value
        elif key != "questions":
            found[NAMES.get(key, key)] = value[1] if isinstance(value, list) else value
    return found


def decimals(value: float) -> int:
    return len(str(value).partition(".")[2])


@needs_data
@pytest.mark.parametrize("name", sets())
def test_real_answers_get_the_official_figures_to_all_digits(name: str) -> None:
    benchmark = next(ours for beginning, ours in OFFICIAL.items() if name.startswith(beginning))
    reference = json.loads((folder() / "reference.json").read_text())[name]["reference"]
    result = score(benchmark, Sources((str(folder() / f"{name}.jsonl"),)))
    figures = {**result.metrics, **result.details["groups"]}
    expected = named(benchmark, reference)
    assert expected
    assert {key: round(figures[key] or 0.0, decimals(value)) for key, value in expected.items()} == expected


DOCUMENTED = (
    *("pope_llava13b", "mme_llava13b", "scienceqa_test_llava13b", "mmbench_dev_llava13b", "seed_llava13b"),
    *("mmmu_val_llava1.5_13b", "mathvista_llava", "gqa_testdev_part_llava13b", "chartqa_qwen25vl7b"),
    *("docvqa_val1000_qwen2_vl_2b_instruct", "mmvet_judged_llava13b", "llavabench_judged_llava13b"),
)
"""The sets whose figures stand in the table of benchmarks."""


def documented(benchmark: str) -> list[str]:
    """The cells of a benchmark's row in the table of docs/evaluation.md."""
    text = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| `") and f"`{benchmark}`" in line.split("|")[1])
    return [cell.strip() for cell in row.strip("|").split("|")]


@needs_data
@pytest.mark.parametrize("name", sorted(set(DOCUMENTED).intersection(sets())))
def test_the_table_of_benchmarks_has_the_figures_of_these_answers(name: str) -> None:
    benchmark = next(ours for beginning, ours in OFFICIAL.items() if name.startswith(beginning))
    result = score(benchmark, Sources((str(folder() / f"{name}.jsonl"),)))
    headline = result.details["headline"]
    runs = [value for key, value in result.details["groups"].items() if key in {f"{headline}/{run}" for run in "123"}]
    found = re.match(r"[\d.]+(, [\d.]+)*", documented(benchmark)[-1])
    assert found
    written = [float(number) for number in found.group().split(", ")]
    figures = runs if len(written) > 1 else [result.metrics[headline]]
    assert written == [round(figure or 0.0, decimals(number)) for figure, number in zip(figures, written, strict=True)]


@pytest.mark.parametrize("benchmark", [name for name in names() if load(name).published])
def test_the_table_of_benchmarks_has_the_published_figures(benchmark: str) -> None:
    """POPE's F1 is a share here and a percentage there."""
    written = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", documented(benchmark)[4])}
    for each in load(benchmark).published:
        assert written & {each.value, round(100 * each.value, 1)}, each


def pope(path: Path, count: int) -> str:
    rows = [
        {
            "question_id": place,
            "category": "random",
            "image": f"{place // 6}.jpg",
            "label": ("yes", "no")[place % 2],
            "prediction": ("Yes", "No", "Yes")[place % 3],
        }
        for place in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_needs_no_torch_and_scores_its_own_samples_again(tmp_path: Path) -> None:
    predictions, out = pope(tmp_path / "answers.jsonl", 60), tmp_path / "out.json"
    code = (
        "import sys; from eval.score import main;"
        f"main(['pope', '--predictions', {predictions!r}, '--out', {str(out)!r}]);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    (first,) = json.loads(out.read_text())["results"]
    assert first["protocol_facts"]["asked"] == "elsewhere"
    for again in (out, tmp_path / first["samples"]):
        assert main(["pope", "--predictions", str(again), "--out", str(tmp_path / "again.json")]) == 0
        (second,) = json.loads((tmp_path / "again.json").read_text())["results"]
        assert second["metrics"] == first["metrics"]
        assert second["intervals"] == first["intervals"]


@pytest.mark.slow
def test_eighteen_thousand_rows_take_less_than_five_seconds_of_a_core() -> None:
    """Time that the process itself had: other processes of the machine do not count."""
    assert scoring_s(18_000) < 5.0


def test_results_in_lmms_evals_form_are_read_back_as_its_samples(tmp_path: Path) -> None:
    predictions, out, folder = pope(tmp_path / "answers.jsonl", 14), tmp_path / "out.json", tmp_path / "lmms"
    assert main(["pope", "--predictions", predictions, "--out", str(out), "--lmms-eval", str(folder)]) == 0
    found = json.loads((folder / "results.json").read_text())
    (result,) = json.loads(out.read_text())["results"]
    assert found["results"]["pope"]["f1/mean,none"] == result["metrics"]["f1/mean"]
    interval = result["intervals"]["yes_share"]
    assert interval["high"] > interval["low"]
    assert found["results"]["pope"]["yes_share_stderr,none"] == (interval["high"] - interval["low"]) / 3.92
    assert found["n-samples"]["pope"]["effective"] == 14
    assert score("pope", Sources((str(folder / "samples_pope.jsonl"),))).metrics == result["metrics"]


def test_a_judges_name_is_part_of_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"id": "v1_0", "scores": [0.5, 1.0]}\n{"id": "v1_2", "scores": [0.0, 0.1]}\n')
    results = [score("mmvet", Sources((str(path),)), judge=judge) for judge in ("one", "other")]
    assert results[0].metrics == results[1].metrics == {"total": pytest.approx(40.0)}
    assert results[0].details["groups"] == {"total/1": pytest.approx(25.0), "total/2": pytest.approx(55.0)}
    assert results[0].protocol != results[1].protocol
