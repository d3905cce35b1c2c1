"""Paired statistics beside counting by hand, exact tests and simulation."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from itertools import product

import numpy as np
import pytest

from eval.benchmarks.figures import Mean, Scored, YesNo
from eval.benchmarks.row import Row
from eval.paired import Comparison, clustered_error, compare, holm, mcnemar
from tests.support.paths import data, needs_data


def scored(scores: Sequence[float], truth: str = "yes") -> Scored:
    rows = [Row((str(place),), "?", truth) for place in range(len(scores))]
    return Scored(rows, np.array(scores, dtype=np.float64), np.array(scores, dtype=np.float64))


def compared(before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Comparison:
    places = clusters or range(len(before))
    return compare("m", [Mean(name="m")], [], scored(before), scored(after), clusters=places)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (5, 2), (2, 5), (6, 6), (9, 1)])
def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven(better: int, worse: int) -> None:
    throws = [sum(coins) for coins in product((0, 1), repeat=better + worse)]
    as_uneven = [min(heads, better + worse - heads) <= min(better, worse) for heads in throws]
    assert mcnemar(better, worse) == pytest.approx(min(1.0, sum(as_uneven) / len(throws)))


def test_mcnemar_of_many_is_exact_and_finite() -> None:
    assert mcnemar(30, 24) == pytest.approx(0.4966, abs=1e-3)
    assert 0 <= mcnemar(9000, 3000) < 1e-300 or mcnemar(9000, 3000) == 0


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_hard_for_both_cancels_out() -> None:
    before = [float(place % 2) for place in range(200)]
    after = list(before)
    after[0] = after[2] = after[4] = after[6] = after[8] = after[10] = 1.0
    found = compared(before, after)
    assert found.difference.estimate == pytest.approx(0.03)
    assert found.difference.low > 0
    assert found.unpaired_error > 3 * found.paired_error
    assert (found.num_better, found.num_worse, found.test) == (6, 0, "McNemar")
    assert found.p_value == pytest.approx(2 / 2**6)


def test_questions_of_one_picture_are_no_evidence_of_their_own() -> None:
    before, after = [0.0] * 100, [float(place < 50) for place in range(100)]
    alone, together = compared(before, after), compared(before, after, [place // 50 for place in range(100)])
    assert together.paired_error > 5 * alone.paired_error
    assert together.smallest_difference > 5 * alone.smallest_difference


def test_scores_between_right_and_wrong_have_the_test_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    before = generator.random(400)
    found = compared(list(before), list(before + generator.normal(0.0, 0.1, 400)))
    assert found.test == "paired z"
    assert found.paired_error == pytest.approx(0.1 / 20, rel=0.1)
    # A normal difference leaves its interval in one of twenty sets; this seed's does not.
    assert found.p_value > 0.05
    assert found.difference.low < 0 < found.difference.high


def test_a_figure_that_is_no_mean_is_compared_as_itself() -> None:
    figures = [YesNo()]
    before, after = scored([1.0, 0.0] * 20), scored([1.0] * 40)
    found = compare("f1", figures, [], before, after, clusters=range(40))
    assert (found.before, found.after) == (pytest.approx(2 / 3), 1.0)
    assert found.difference.estimate == pytest.approx(1 / 3)


def test_the_smallest_difference_is_found_four_times_of_five() -> None:
    """With a true difference of that size, 80 % of sets show it; 300 sets vary by 2.3 % (one standard deviation)."""
    generator = np.random.default_rng(2)
    before = generator.random(400)
    size = compared(list(before), list(before + generator.normal(0, 0.5, 400))).smallest_difference
    found = [generator.normal(size, 0.5, 400) for _ in range(300)]
    shown = [abs(each.mean()) > 1.96 * clustered_error(each, range(400)) for each in found]
    assert 0.72 < np.mean(shown) < 0.88


@needs_data
@pytest.mark.parametrize(
    ("name", "before", "after"), [("base_vs_lora", "base", "finetuned"), ("bf16_vs_awq", "bf16", "awq")]
)
def test_real_pairs_have_their_published_errors(name: str, before: str, after: str) -> None:
    folder = data("eval", "predictions_official")
    if not (folder / "reference.json").is_file():
        pytest.skip("the data hold no published answers")
    rows = [json.loads(line) for line in (folder / f"paired_chartqa_{name}.jsonl").read_text().splitlines()]
    expected = json.loads((folder / "reference.json").read_text())[f"paired_chartqa_{name}"]["reference"]
    found = compared([row[before] for row in rows], [row[after] for row in rows])
    assert {
        before: found.before,
        after: found.after,
        "better": found.num_better,
        "worse": found.num_worse,
        "diff_pp": round(100 * found.difference.estimate, 2),
        "paired_se_pp": round(100 * found.paired_error, 3),
        "unpaired_se_pp": round(100 * found.unpaired_error, 3),
    } == expected
