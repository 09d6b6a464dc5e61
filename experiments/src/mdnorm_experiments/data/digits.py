"""Handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak, 1998), coloured as in Coloured MNIST.

Arjovsky et al., arXiv:1907.02893, section 5.2; here the colour is continuous. See docs/image.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdnorm.design import polynomial
from mdnorm.extras import requires
from mdnorm_experiments.data.confounded import Samples

CLASSES = ("0 to 4", "5 to 9")
COUNT = 1797
LABEL_NOISE = 0.25
_SCALE = 2


def colour_digits(rows: Tensor, *, seed: int, correlation: float = 0.8) -> Samples:
    """Colour some of the digits; `rows` (N,) int64 are numbers below `COUNT`.

    Images are (N, 3, 16, 16), the one confounder is the colour from 0 (red) to 1 (green). The label is
    whether a digit is above 4, wrong for a share `LABEL_NOISE`; a share `correlation`, from 0 to 1, of the
    digits has its colour from the label's half of the scale. ValueError for a row or a correlation out of
    range, MissingExtraError without scikit-learn.
    """
    with requires("image", "mdnorm-experiments"):
        from sklearn.datasets import load_digits

    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be between 0 and 1, got {correlation}.")
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < COUNT):
        raise ValueError(
            f"rows must be between 0 and {COUNT - 1}, got {int(rows.min())} to {int(rows.max())}."
        )
    pixels, digits = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    grey = torch.from_numpy(pixels).float()[rows].reshape(-1, 1, 8, 8) / 16
    grey = grey.repeat_interleave(_SCALE, 2).repeat_interleave(_SCALE, 3)
    labels = (torch.from_numpy(digits)[rows] > 4).long()
    wrong = torch.rand(len(rows), generator=generator) < LABEL_NOISE
    labels = torch.where(wrong, 1 - labels, labels)
    decided = torch.rand(len(rows), generator=generator) < correlation
    uniform = torch.rand(len(rows), generator=generator)
    colour = torch.where(decided, 0.5 * labels + 0.5 * uniform, uniform)
    tint = torch.stack([1 - colour, colour, torch.full_like(colour, 0.2)], 1)
    powers = polynomial(colour, 3, low=0, high=1)
    return Samples(grey * tint[:, :, None, None], labels, powers, colour.unsqueeze(1), (colour > 0.5).long())
