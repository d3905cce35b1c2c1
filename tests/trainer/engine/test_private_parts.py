"""A DeepSpeed whose private parts have moved is named before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from models.common.errors import InputError
from trainer.engine.private_parts import ENGINE, OPTIMIZER, check_private_parts


@pytest.mark.parametrize("stage", sorted(OPTIMIZER))
def test_each_missing_part_is_named_with_the_version(stage: int) -> None:
    optimizer = SimpleNamespace(**dict.fromkeys(OPTIMIZER[stage]))
    engine = SimpleNamespace(**{**dict.fromkeys(ENGINE), "optimizer": optimizer})
    check_private_parts(engine, stage)
    for name in OPTIMIZER[stage]:
        fewer = SimpleNamespace(**{key: None for key in OPTIMIZER[stage] if key != name})
        with pytest.raises(InputError, match=rf"DeepSpeed \d+\.\d+.* has no SimpleNamespace\.{name}, which"):
            check_private_parts(SimpleNamespace(**{**vars(engine), "optimizer": fewer}), stage)
