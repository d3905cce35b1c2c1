"""A bundle as a model of lmms-eval: with its real base class where it is installed, else with one of its shape."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from eval.predictor import Decoding, Predictor, Query, Turn
from models.common.errors import InputError
from tests.support.bundles import image, make_bundle


class _Base:
    """lmms_eval.api.model.lmms, as far as a model uses it (0.7.3)."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank


@pytest.fixture(scope="module")
def lmms() -> Iterator[Any]:
    """`eval.lmms`."""
    patch = pytest.MonkeyPatch()
    try:
        import lmms_eval.api.model  # noqa: F401
    except ImportError:
        names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")
        for name in names:
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = _Base  # type: ignore[attr-defined]
    import eval.lmms

    yield eval.lmms
    patch.undo()
    sys.modules.pop("eval.lmms", None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("lmms") / "bundle")


DOCS = [{"question": f"What is {place}?", "image": image("circle", (64, 64 + place))} for place in range(3)]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}],
        }
    ]


def request(place: int, **options: Any) -> Any:
    return SimpleNamespace(args=("", messages, options, place, "task", "test"))


def test_answers_are_the_predictors_whatever_decodings_are_mixed(lmms: Any, bundle: Path) -> None:
    model = lmms.SightlineModel(pretrained=str(bundle), batch_size="2", device="cpu")
    assert not model.is_simple
    model.task_dict = {"task": {"test": DOCS}}
    until = {"until": ["\n\n"], "do_sample": False, "temperature": 0}
    requests = [request(place, max_new_tokens=4 + 4 * (place == 1), **until) for place in range(3)]
    found = model.generate_until(requests)
    predictor = Predictor.open(bundle, device="cpu")
    expected = [
        predictor.answer(
            [Query((doc["image"],), (Turn("user", doc["question"]),))],
            Decoding(max_new_tokens=4 + 4 * (place == 1), stop=("\n\n",)),
        )[0]
        for place, doc in enumerate(DOCS)
    ]
    assert found == expected
    targets = [
        SimpleNamespace(args=(doc["question"], "yes", lambda doc: [doc["image"]], place, "task", "test"))
        for place, doc in enumerate(DOCS)
    ]
    losses = predictor.loss([Query((doc["image"],), (Turn("user", doc["question"]),)) for doc in DOCS], ["yes"] * 3)
    likelihoods = model.loglikelihood(targets)
    assert [value for value, _ in likelihoods] == pytest.approx([-loss for loss, _ in losses])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "video", "url": "a.mp4"}], "shows a video"),
        ([{"type": "audio", "url": "a.wav"}], "shows a audio"),
        ([{"type": "image", "url": "nowhere.png"}], "is no image"),
    ],
)
def test_what_a_bundle_does_not_see_is_refused(lmms: Any, content: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lmms.query_of([{"role": "user", "content": content}])


def test_a_chat_keeps_its_turns_and_its_first_images(lmms: Any) -> None:
    small = Image.new("RGB", (8, 8))
    first = {"role": "user", "content": [{"type": "image", "url": small}, {"type": "text", "text": "a?"}]}
    chat = [first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"}]
    query = lmms.query_of(chat)
    assert len(query.images) == 1
    assert [(turn.role, turn.text) for turn in query.turns] == [("user", "a?"), ("assistant", "b"), ("user", "c?")]
    with pytest.raises(InputError, match="in a later turn"):
        lmms.query_of([*chat[:2], first])
    with pytest.raises(InputError, match="a turn of system"):
        lmms.query_of([{"role": "system", "content": "be brief"}, first])


def test_sampling_and_unknown_arguments_are_refused(lmms: Any, bundle: Path) -> None:
    with pytest.raises(InputError, match="does not draw at random"):
        lmms._decoding({"do_sample": True, "temperature": 0.7})
    with pytest.raises(InputError, match="max_num_frames"):
        lmms.SightlineModel(pretrained=str(bundle), max_num_frames=8)
