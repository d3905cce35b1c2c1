"""The report: the schema that programs read, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.evaluation import Opened, evaluate
from eval.run import prepare
from eval.tasks.config import CaptionConfig, VqaConfig
from models.common.errors import InputError, run_cli
from tests.support.benchmarks import PROMPT, Seer, TinyBenchmark, make_benchmark
from tools.examples.report import ScoredModel, StageResult, build_report
from tools.examples.report.__main__ import main
from tools.examples.report.charts import log_ticks, running_mean

SECONDS = {"world": 1.5, "align": 61.0}


class Blind(Seer):
    """Says the same whatever it is shown, with characters that HTML must not take for its own."""

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        del decoding
        return ["<script>alert('red')</script>"] * len(queries)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run: blind before alignment, seeing afterwards, two training logs."""
    tiny = make_benchmark(tmp_path)
    with monkeypatch.context() as without_java:
        without_java.setenv("PATH", "")  # plain words: Java costs half a second a task
        for name in ("before", "align", "lora", "nf4"):
            measure(Blind() if name == "before" else Seer(), tiny, tmp_path / "eval" / f"{name}.json")
    tuned = {"projector": {"kind": "full"}, "language": {"kind": "lora"}}
    stages = {"align": {"tune": {**tuned, "language": None}}, "lora": {"tune": tuned}}
    (tmp_path / "recipe.json").write_text(json.dumps({"stages": stages}))
    for name in ("align", "lora"):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "loss": 4.0 / step, "samples_per_s": 100.0, "tokens_per_s": 2e3} for step in range(1, 40)
        ]
        log = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(log + '{"step": 40, "lo')
    (tmp_path / "seconds.json").write_text(json.dumps(SECONDS))
    return tmp_path


def measure(predictor: Seer, tiny: TinyBenchmark, out: Path, **options: object) -> None:
    out.parent.mkdir(exist_ok=True)
    vqa = {"questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images, **options}
    caption = {"captions": tiny.captions, "images": tiny.images, "prompt": PROMPT, "meteor": False}
    configs = [
        config
        for shuffled in (False, True)
        for config in (
            VqaConfig.model_validate({**vqa, "shuffle_pictures": shuffled}),
            CaptionConfig.model_validate({**caption, "shuffle_pictures": shuffled}),
        )
    ]
    evaluate(Opened(lambda: predictor, lambda _: {}), prepare(configs), out, model="model", batch_size=8)


class Page(HTMLParser):
    """Collects what a page is made of, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_json_has_the_schema_and_the_figures(run: Path) -> None:
    assert main([str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert list(report) == ["seconds", "stages"]
    assert report["seconds"] == SECONDS
    assert list(report["stages"]) == ["before", "align", "lora", "nf4"]
    for stage in report["stages"].values():
        assert list(stage) == ["vqa_accuracy", "vqa_accuracy_shuffled", "cider", "cider_shuffled"]
    assert (report["stages"]["before"]["vqa_accuracy"], report["stages"]["nf4"]["vqa_accuracy"]) == (0.0, 100.0)
    assert report["stages"]["nf4"]["vqa_accuracy_shuffled"] == 0.0
    assert report["stages"]["nf4"]["cider"] > report["stages"]["nf4"]["cider_shuffled"]


def test_page_is_whole_and_needs_nothing_else(run: Path) -> None:
    main([str(run)])
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", text)
    for words in (
        "LoRA: projector and language",
        "After LoRA, the model answers 100.0 % of 4 held-out",
        "NF4 bundle",
        "<script>alert('red')</script>",
    ):
        assert words in page.text
    assert page.tags.count("polyline") == 4


def test_text_and_page_say_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run)])
    text = (run / "report.txt").read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"after LoRA +100\.0 \[100\.0, 100\.0\] +0\.0", text)
    assert "1 min 01 s" in text


def test_a_stage_that_does_not_look_and_a_gradient_that_bf16_lost_are_told_with_what_to_try(run: Path) -> None:
    file = run / "eval" / "align.json"
    evaluation = json.loads(file.read_text())
    gain = {"low": -0.019, "high": 0.068, "estimate": 0.022, "level": 0.95, "num_resamples": 2000}
    result = {
        "task": "image_gain",
        "shuffled": False,
        "metrics": {"image_gain": 0.022},
        "intervals": {"image_gain": gain},
    }
    evaluation["results"].append({**result, "name": "gain", "samples": evaluation["results"][0]["samples"]})
    file.write_text(json.dumps(evaluation))
    log = run / "lora" / "metrics.jsonl"
    first = {"step": 0, "loss": 5.0, "numerics/cosine/projector": 0.41, "numerics/norm_ratio/projector": 1.3}
    log.write_text(json.dumps(first) + "\n" + log.read_text())
    assert main([str(run)]) == 0
    page, text = Page((run / "report.html").read_text()).text, (run / "report.txt").read_text()
    for said in (page, text):
        assert "image gain 0.022 [-0.019, 0.068] nats a token" in said
        assert said.count("the image is not looked at") == 1  # not of the stages that look, nor of the untrained one
        assert "data.template.opening" in said
    assert "First gradient beside fp32's: projector cosine 0.410, norm x 1.30." in page
    assert "carries little of the first gradient" in page


def test_same_run_same_page(run: Path) -> None:
    main([str(run)])
    first = (run / "report.html").read_bytes()
    main([str(run)])
    assert (run / "report.html").read_bytes() == first


def test_figures_of_different_protocols_are_not_set_side_by_side(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    measure(Seer(), make_benchmark_again(run), run / "eval" / "lora.json", normalisation="evalai")
    with pytest.raises(InputError, match="the vqa figures of stages before and lora do not compare"):
        main([str(run)])
    assert not (run / "report.json").exists()


def make_benchmark_again(run: Path) -> TinyBenchmark:
    shutil.rmtree(run / "images")
    return make_benchmark(run)


def test_captions_alone_make_a_report(run: Path, tmp_path: Path) -> None:
    evaluation = json.loads((run / "eval" / "lora.json").read_text())
    evaluation["results"] = [result for result in evaluation["results"] if result["task"] == "caption"]
    stage = StageResult(ScoredModel("lora", "stage"), evaluation, run / "eval")
    report = build_report(tmp_path / "captions", seconds={}, stages={"lora": stage}, curves={})
    assert json.loads(report.json.read_text())["stages"]["lora"]["vqa_accuracy"] is None
    assert "What it still gets wrong" not in Page(report.html.read_text()).text


def test_large_images_become_thumbnails(run: Path) -> None:
    for path in (run / "images").glob("*.png"):
        Image.effect_noise((900, 600), 60).convert("RGB").save(path)
    main([str(run)])
    assert (run / "report.html").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("eval", "holds no eval/NAME.json of the models before, align, lora, nf4, int8"),
        ("eval/lora.vqa.jsonl", "lora.vqa.jsonl is missing; run eval.run again"),
    ],
)
def test_what_is_missing_is_named(run: Path, missing: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_cli(main, [str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not list(run.glob("report.*"))


def test_a_run_with_other_stages_is_told_by_its_recipe(run: Path) -> None:
    recipe = {"stages": {"contrast": {"tune": {"projector": {"kind": "full"}}}, "align": {"tune": {}}}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    for path in (run / "eval").glob("lora.*"):
        path.rename(path.with_name(path.name.replace("lora", "contrast")))
    evaluation = json.loads((run / "eval" / "contrast.json").read_text().replace('"lora.', '"contrast.'))
    (run / "eval" / "contrast.json").write_text(json.dumps(evaluation))
    (run / "lora").rename(run / "contrast")
    assert main([str(run)]) == 0
    assert list(json.loads((run / "report.json").read_text())["stages"]) == ["before", "contrast", "align", "nf4"]
    text = (run / "report.txt").read_text()
    assert text.index("before training") < text.index("after contrast") < text.index("after align")
    assert "NF4 bundle minus align" in text
    assert "contrast: projector" in Page((run / "report.html").read_text()).text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there; give the directory that `run` names"):
        main([str(tmp_path)])


def test_axis_and_mean() -> None:
    assert log_ticks(0.53, 4.6) == [0.5, 1.0, 2.0, 5.0]
    assert log_ticks(1.0, 1.0) == [1.0, 2.0]
    assert running_mean([1.0, 2.0, 3.0, 4.0], 1) == [1.5, 2.0, 3.0, 3.5]
    assert running_mean([2.0] * 5, 10) == [2.0] * 5


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_draws_it_without_sideways_scrolling(run: Path) -> None:
    main([str(run)])
    page = run / "report.html"
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None
    assert int(found[1]) <= int(found[2])
