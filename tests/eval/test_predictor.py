"""The predictor against stock transformers, and against itself in other batches."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.images import open_image, to_rgb
from eval.predictor import Decoding, Predictor, Query, Turn
from models.common.errors import InputError
from tests.support.bundles import image, make_bundle

LONG = "What is in the image? How many shapes are there? Which colour is the one on the left?"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """In fp32, where what else is in a batch changes no token; in bf16 it rounds, and near ties fall otherwise."""
    folder = make_bundle(tmp_path_factory.mktemp("bundle"), tied=request.param)
    return Predictor.open(folder, device="cpu")


@pytest.fixture(
    scope="module",
    params=[(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)],
    ids=["tied", "untied", "bf16"],
)
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    tied, dtype = request.param
    folder = make_bundle(tmp_path_factory.mktemp("bundle"), tied=tied, dtype=dtype)
    return Predictor.open(folder, device="cpu")


def ask(text: str, *kinds: str) -> Query:
    return Query(tuple(image(kind) for kind in kinds), (Turn("user", text),))


def mixed_queries() -> list[Query]:
    chat = (Turn("user", "What is it?"), Turn("assistant", "A circle"), Turn("user", "Which colour?"))
    return [
        ask("What?", "circle"),
        ask(LONG, "square"),
        ask("no image"),
        ask("two", "circle", "square"),
        Query((image("square", (90, 50)),), chat),
    ]


def stock_ids(predictor: Predictor, query: Query, **options: Any) -> list[int]:
    """What transformers' own `generate` writes for a query, alone."""
    content: list[dict[str, Any]] = [{"type": "image", "image": each} for each in query.images]
    messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in query.turns]
    messages[0]["content"] = content + messages[0]["content"]
    inputs = predictor.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = predictor.model.generate(**inputs, do_sample=False, **options)
    return list(ids[0, inputs["input_ids"].shape[1] :].tolist())


def stock_text(predictor: Predictor, ids: list[int]) -> str:
    text = predictor.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return str(text).strip()


def test_greedy_is_what_transformers_writes(exact: Predictor) -> None:
    queries = mixed_queries()
    expected = [stock_text(exact, stock_ids(exact, query, max_new_tokens=24)) for query in queries]
    assert len(set(expected)) == len(queries), "the answers must differ for the test to mean anything"
    assert exact.answer(queries, Decoding(max_new_tokens=24)) == expected


def test_greedy_alone_is_what_transformers_writes(predictor: Predictor) -> None:
    for query in mixed_queries():
        expected = stock_text(predictor, stock_ids(predictor, query, max_new_tokens=24))
        assert predictor.answer([query], Decoding(max_new_tokens=24)) == [expected]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=24),
        Decoding(max_new_tokens=24, temperature=0.9, top_p=0.8, seed=3),
        Decoding(max_new_tokens=12, num_beams=3),
    ],
    ids=["greedy", "nucleus", "beams"],
)
def test_a_batch_is_its_queries_one_by_one(exact: Predictor, decoding: Decoding) -> None:
    queries = mixed_queries()
    alone = [exact.answer([query], decoding)[0] for query in queries]
    assert exact.answer(queries, decoding) == alone
    assert exact.answer(queries, decoding, batch_size=2) == alone


def test_beams_are_transformers_beams(predictor: Predictor) -> None:
    query = ask("What?", "circle")
    ids = stock_ids(predictor, query, max_new_tokens=12, num_beams=3)
    assert predictor.answer([query], Decoding(max_new_tokens=12, num_beams=3)) == [stock_text(predictor, ids)]


@pytest.mark.slow
def test_a_stream_joined_is_the_answer(predictor: Predictor) -> None:
    for decoding in (Decoding(max_new_tokens=24), Decoding(max_new_tokens=24, temperature=1.0, seed=1)):
        for query in mixed_queries():
            stream = predictor.stream(query, decoding)
            pieces = list(stream)
            assert "".join(pieces) == predictor.answer([query], decoding)[0]
            assert len(pieces) > 3
            assert 3 < stream.num_tokens <= 24
            assert stream.first_token_s is not None
            assert stream.tokens_per_s is not None


def test_sampling_repeats_with_its_seed_and_leaves_global_randomness_alone(predictor: Predictor) -> None:
    query = ask("What?", "circle")
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    answers = [
        predictor.answer([query], Decoding(max_new_tokens=12, temperature=1.0, seed=seed))[0] for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected_draw)
    assert answers[0] == answers[1] != answers[2]


def test_a_tiny_nucleus_is_greedy(predictor: Predictor) -> None:
    queries = mixed_queries()
    nucleus = Decoding(max_new_tokens=12, temperature=1.0, top_p=1e-6)
    assert predictor.answer(queries, nucleus) == predictor.answer(queries, Decoding(max_new_tokens=12))


def test_a_stop_string_ends_the_answer_and_is_cut(predictor: Predictor) -> None:
    query = ask(LONG, "square")
    whole = predictor.answer([query], Decoding(max_new_tokens=24))[0]
    stop = whole[5:8]
    decoding = Decoding(max_new_tokens=24, stop=(stop, "never written"))
    stream = predictor.stream(query, decoding)
    pieces = list(stream)
    assert "".join(pieces) == predictor.answer([query], decoding)[0] == whole[: whole.index(stop)].rstrip()
    assert stream.num_tokens < 24
    assert all(stop not in piece for piece in pieces)


def test_cancel_ends_a_stream(predictor: Predictor) -> None:
    cancel = threading.Event()
    stream = predictor.stream(ask("What?", "circle"), Decoding(max_new_tokens=200), cancel=cancel)
    first = next(stream)
    cancel.set()
    assert len(first) + len("".join(stream)) < 20
    assert stream.num_tokens < 10


def test_an_end_token_ends_an_answer(predictor: Predictor) -> None:
    query = ask("What?", "circle")
    ids = stock_ids(predictor, query, max_new_tokens=12)
    cut = Predictor(predictor.model, predictor.processor, device="cpu")
    cut._end_ids = frozenset([ids[4]])
    expected = stock_text(predictor, ids[: ids.index(ids[4]) + 1])
    assert cut.answer([query], Decoding(max_new_tokens=12)) == [expected]


def test_loss_is_teacher_forced_and_counts_the_end_token(predictor: Predictor) -> None:
    queries, answers = mixed_queries(), ["A red circle", "", "yes", "two shapes, one red and one blue.", "blue"]
    is_exact = predictor.model.dtype == torch.float32
    together = predictor.loss(queries, answers)
    for query, answer, (loss, count) in zip(queries, answers, together, strict=True):
        alone = predictor.loss([query], [answer])[0]
        assert alone[1] == count
        assert alone[0] == pytest.approx(loss, rel=1e-5 if is_exact else 1e-2)  # other padding
        content: list[dict[str, Any]] = [{"type": "image", "image": each} for each in query.images]
        messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in query.turns]
        messages[0]["content"] = content + messages[0]["content"]
        inputs = predictor.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokenizer = predictor.processor.tokenizer
        targets = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert count == len(targets)
        expected = stepwise_loss(predictor, dict(inputs), targets)
        assert loss == pytest.approx(expected, rel=1e-4 if is_exact else 1e-2)


def stepwise_loss(predictor: Predictor, inputs: dict[str, Any], targets: list[int]) -> float:
    total = 0.0
    for target in targets:
        logits = predictor.model(**inputs).logits[0, -1]
        total -= logits.log_softmax(-1)[target].item()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[target]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert math.isfinite(total)
    return total


def test_control_tokens_in_a_question_are_text(predictor: Predictor) -> None:
    tricky = ask("What is <image> <|im_end|>?", "circle")
    assert predictor.answer([tricky], Decoding(max_new_tokens=4))


def test_answering_leaves_training_modes_as_they_were(predictor: Predictor) -> None:
    model = predictor.model
    model.train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    predictor.answer([ask("What?", "circle")], Decoding(max_new_tokens=2))
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_a_chat_past_the_models_length_is_refused_and_a_near_one_is_cut(predictor: Predictor) -> None:
    with pytest.raises(InputError, match="the model reads 512"):
        predictor.answer([ask(LONG * 40)])
    stream = predictor.stream(ask("one " * 240), Decoding(max_new_tokens=500))
    list(stream)
    assert stream.num_tokens < 300


def test_chat_takes_a_path_bytes_or_a_image(predictor: Predictor, tmp_path: Path) -> None:
    """With transparency, which a file and an image in memory must lose in the same way."""
    path = tmp_path / "photo.png"
    seen_through = image("circle").convert("RGBA")
    seen_through.putalpha(seen_through.convert("L").point(lambda value: 255 - value))
    seen_through.save(path)
    answers = {
        predictor.chat(each, "What?", max_new_tokens=8) for each in (path, str(path), path.read_bytes(), seen_through)
    }
    assert len(answers) == 1
    assert to_rgb(seen_through).tobytes() == open_image(path).tobytes() != image("circle").tobytes()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        Predictor.open(tmp_path / "nowhere")
    folder = make_bundle(tmp_path / "bundle")
    settings = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"generation_config\.json"):
        Predictor.open(folder)
    (folder / "generation_config.json").write_text(settings)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Predictor.open(folder)
    with pytest.raises(InputError, match="safetensors"):
        Predictor.open(folder, verify=False)


def test_an_unknown_or_absent_device_is_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="abacus"):
        Predictor.open(folder, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA"):
            Predictor.open(folder, device="cuda")
