"""Looks at every sample before any is written: `make` writes only what `check` calls good.

Owns the one check that samples of all readers pass, the list of those that fail, and how many may.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.images import open_image
from data_pipeline.record import caption_turns, check_turns, read_turns
from models.common.errors import InputError
from models.common.files import write_text
from tools.shards.raw import RawSample


def usable_samples(samples: Sequence[RawSample], out: Path, *, skip_bad: float = 0.0, jobs: int = 1) -> list[RawSample]:
    """Those that training can use. The others are listed, with the reason, in `OUT.bad.jsonl` beside the set.

    Args:
        skip_bad: the share of samples that may be left out.

    Raises:
        InputError: more than that cannot be used, or nothing is left.
    """
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        problems = list(pool.map(problem_of, samples))
    bad = [problem for problem in problems if problem]
    listed = out.parent / f"{out.name}.bad.jsonl"
    if not bad:
        listed.unlink(missing_ok=True)
        return list(samples)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(listed, "".join(json.dumps({"problem": problem}) + "\n" for problem in bad))
    if len(bad) > skip_bad * len(samples) or len(bad) == len(samples):
        raise InputError(
            f"{len(bad)} of {len(samples)} records cannot be used ({listed} lists them; --skip-bad PERCENT leaves them"
            f" out); the first: {bad[0]}"
        )
    return [sample for sample, problem in zip(samples, problems, strict=True) if not problem]


def problem_of(sample: RawSample) -> str:
    """Why a sample cannot be used, with the name of its record; empty where it can."""
    if sample.problem:
        return sample.problem
    try:
        for image in sample.images:
            open_image(image)  # as training will: a header tells nothing of an end that is cut off
        if sample.record is not None:
            read_turns({"json": json.dumps(sample.record, allow_nan=False).encode()}, len(sample.images))
        else:
            check_turns(caption_turns(sample.caption or "", "", len(sample.images)), len(sample.images))
    except (InputError, TypeError, ValueError) as error:  # json.dumps refuses what is no JSON
        return f"{sample.where}: {error}"
    return ""
