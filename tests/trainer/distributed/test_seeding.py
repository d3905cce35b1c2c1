"""Seeds are part of what a run's numbers follow from: pinned, since a change of them changes every run."""

from __future__ import annotations

from trainer.distributed.seeding import derive_seed


def test_seeds_stay_what_they_were() -> None:
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(7, "align", "order") == 4265860568902871269
    assert derive_seed(7, "align", "dropout", 3, 1) == 4938437390018990890


def test_every_purpose_has_a_stream_of_its_own() -> None:
    purposes = [
        (stage, what, step) for stage in ("align", "lora") for what in ("order", "dropout") for step in range(50)
    ]
    seeds = {derive_seed(seed, *purpose) for seed in range(5) for purpose in purposes}
    assert len(seeds) == 5 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) == derive_seed(1, "2")
