"""open_clip's encoders under transformers' names: the features are open_clip's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.common.errors import InputError
from models.encoders.open_clip import OpenClipVision
from models.spec import CropImage
from tests.support.backbones import make_clip
from tests.support.paths import REPOSITORY
from tests.support.with_open_clip import SITE, environment
from tools.examples.synthetic.open_clip import write_open_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A random CLIP as open_clip saves one: (architecture, weights)."""
    folder = tmp_path_factory.mktemp("open_clip")
    write_open_clip(make_clip(folder / "clip"), folder / "made")
    return str(folder / "made" / "architecture.json"), str(folder / "made" / "open_clip_model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not SITE.is_dir(), reason="open_clip is not there: make open-clip")
def test_features_of_every_layer_are_open_clips_own(files: tuple[str, str]) -> None:
    """Its own model of the same file; fp32, sums in another order."""
    command = [sys.executable, "-m", "tests.support.with_open_clip", "tests.support.open_clip_features", *files]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_features_are_those_of_the_clip_it_was_made_of(files: tuple[str, str]) -> None:
    from models.encoders.pretrained import TransformersVision

    architecture, weights = files
    clip = str(Path(weights).parents[1] / "clip")
    pixels = torch.randn(2, 3, 48, 48)
    ours = OpenClipVision(architecture=architecture, weights=weights, feature_layer=-2).load(torch.float32)
    theirs = TransformersVision(kind="clip", path=clip, feature_layer=-2).load(torch.float32)
    assert torch.equal(ours(pixels), theirs(pixels))
    assert OpenClipVision(architecture=architecture, weights=weights).image_spec(CropImage()).num_features == 16


def test_what_does_not_fit_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    architecture, weights = files
    facts = json.loads(Path(architecture).read_text())
    facts["vision_cfg"]["layers"] = 5
    (tmp_path / "deeper.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="not the weights of"):
        OpenClipVision(architecture=str(tmp_path / "deeper.json"), weights=weights).load(torch.float32)
    facts["vision_cfg"]["timm_model_name"] = "convnext_base"
    (tmp_path / "timm.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"no plain vision transformer: \['timm_model_name'\]"):
        OpenClipVision(architecture=str(tmp_path / "timm.json"), weights=weights).image_spec(CropImage())
