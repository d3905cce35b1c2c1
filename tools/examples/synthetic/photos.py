"""Real photos for the tiny CLIP: a list of file names and captions -> squares, and their augmentation.

Owns reading such a list with its images, and the random views that keep a tower from memorizing a few photos.
Does not own the training (clip.py). Images are opened and resized as in the training chain.

Shapes: N images, B of a batch, C channels, H = W = the square's side.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.images import fit, open_image
from models.common.documents import read_value
from models.common.errors import InputError
from models.spec import CropImage, ImageSpec
from tools.examples.synthetic.clip import MEAN, NUM_CHECKED, STD, Captioned, ClipSize

SMALLEST_VIEW = 0.6
"""Side of the smallest random view, as a share of the square's."""


def photo_size(image_size: int, patch_size: int) -> ClipSize:
    """Towers for photos: human captions have more and rarer words than the synthetic world's.

    Raises:
        InputError: the patches do not tile the image.
    """
    if min(image_size, patch_size) < 1 or image_size % patch_size:
        raise InputError(f"--size {image_size} --patch {patch_size}: the size must be a multiple of the patch")
    return ClipSize(image_size=image_size, patch_size=patch_size, max_words=96, vocab_size=2048)


def read_photos(captions: Path, images: Path, size: ClipSize) -> Captioned:
    """The photos of a list [{"file_name", "caption"}], shorter side to the tower's size, central square.

    Raises:
        InputError: no such list, an entry that lacks one of both, too few of them, a photo that cannot be read.
    """
    import numpy as np
    import torch

    entries = _read_entries(captions)
    spec = ImageSpec(size=size.image_size, patch_size=size.patch_size, fit=CropImage(), mean=MEAN, std=STD)
    bar = tqdm(entries, desc="photos", unit="photo")
    squares = [fit(open_image(images / name), spec) for name, _ in bar]
    pixels_NCHW = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return Captioned(pixels_NCHW, [[caption] for _, caption in entries], size, random_views)


def _read_entries(path: Path) -> list[tuple[str, str]]:
    """(file name, caption) of every entry."""
    if not path.is_file():
        raise InputError(f'no file {path}: name a JSON list of {{"file_name", "caption"}}')
    try:
        entries = [(str(entry["file_name"]), str(entry["caption"])) for entry in read_value(path)]
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f'{path} is no JSON list of {{"file_name", "caption"}} ({error!r}): mend it') from None
    if len(entries) <= NUM_CHECKED:
        raise InputError(f"{path} lists {len(entries)} photos, not over {NUM_CHECKED}: add some")
    return entries


def random_views(pixels_BCHW: Any, rng: random.Random) -> Any:
    """A random crop of each square, enlarged again, and mirrored with probability 1/2; bytes."""
    import torch

    num, side = len(pixels_BCHW), pixels_BCHW.shape[-1]
    views = []
    for _ in range(num):
        share = rng.uniform(SMALLEST_VIEW, 1.0)
        x, y = (rng.uniform(share - 1, 1 - share) for _ in range(2))
        views.append([[share * rng.choice((-1, 1)), 0.0, x], [0.0, share, y]])
    grid_BHW2 = torch.nn.functional.affine_grid(torch.tensor(views), [num, 3, side, side], align_corners=False)
    sampled_BCHW = torch.nn.functional.grid_sample(
        pixels_BCHW.float(), grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled_BCHW.round().to(torch.uint8)
