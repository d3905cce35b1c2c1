"""The quickstart at a size that takes a minute: every real command, far too little training to learn anything."""

from __future__ import annotations

from tools.examples.quickstart.steps import QuickstartSizes

TINY = QuickstartSizes(
    num_scenes=400,
    num_held_out=24,
    num_scored=12,
    clip_steps=3,
    language_steps=3,
    overrides=(
        "stages.align.duration={unit: steps, count: 3}",
        "stages.lora.duration={unit: steps, count: 3}",
        "tracking.log_every_steps=1",
    ),
)
