"""Setting 2 of the paper: gender from faces with the skin's shade as metadata; and coloured digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mdnorm.design import polynomial
from mdnorm_experiments.confounded import ConfoundedSetting
from mdnorm_experiments.data import digits, faces, image_folder
from mdnorm_experiments.data.confounded import ConfoundedData, LoadedData, Samples, drawn_data, part_seed
from mdnorm_experiments.data.faces import Faces, make_faces
from mdnorm_experiments.figures import WIDTH, picture_grid
from mdnorm_experiments.networks import ConvolutionalBackbone

GROUPS = ("I–II", "III–IV", "V–VI")
COLOURS = ("red", "green")
_HELD_OUT = 800


def image_backbone(norm: str, channels: Sequence[int] = (16, 32, 32)) -> ConvolutionalBackbone:
    """Return three convolutions for (N, 3, H, W) images of 16 to 64 pixels a side; `norm`: one of `NORMS`."""
    convolutions = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise((3, *channels))]
    pools = {"pool": nn.MaxPool2d(2), "last_pool": nn.AdaptiveAvgPool2d(4)}
    return ConvolutionalBackbone(convolutions, channels, norm, spatial_dims=2, num_positions=4 * 4, **pools)


def _face_samples(images: Tensor, labels: Tensor, shade: Tensor) -> Samples:
    groups = ((shade.round().clamp(1, 6) - 1) // 2).long()
    powers = polynomial(shade, 3, low=1, high=6)
    return Samples(images.float() / 255 - 0.5, labels, powers, shade.unsqueeze(1), groups)


def make_face_data(size: int, seed: int) -> ConfoundedData:
    """Return drawn faces whose shade goes with the label, and confound-free ones."""

    def draw(count: int, part: int, correlation: float) -> Samples:
        drawn: Faces = make_faces(count, seed=part_seed(seed, part), correlation=correlation)
        return _face_samples(drawn.images, drawn.labels, drawn.shade)

    return drawn_data(draw, size, _HELD_OUT, 0.6, faces.CLASSES, GROUPS, {"shade": (0,)})


def load_faces(folder: Path, on_problem: str, columns: Mapping[str, str] | None = None) -> LoadedData:
    """Return a folder of images with a table, see `image_folder.load_image_folder`."""
    found = image_folder.load_image_folder(folder, columns=columns, on_problem=on_problem)
    samples = _face_samples(found.images, found.labels, found.shade)
    return LoadedData(samples, found.classes, GROUPS, {"shade": (0,)}, found.problems.text())


def make_digit_data(size: int, seed: int) -> ConfoundedData:
    """Return coloured digits; none is trained on and held out. ValueError if fewer than 200 are left."""
    if size > digits.COUNT - 200:
        raise ValueError(f"size must be at most {digits.COUNT - 200}, since there are {digits.COUNT} digits.")
    order = torch.randperm(digits.COUNT, generator=torch.Generator().manual_seed(seed))

    def colour(rows: Tensor, part: int, correlation: float) -> Samples:
        return digits.colour_digits(rows, seed=part_seed(seed, part), correlation=correlation)

    parts = (colour(order[:size], 0, 0.6), colour(order[size:], 1, 0.6), colour(order[size:], 2, 0.0))
    # Every digit is taken: none is left for `held_out`.
    unconfounded = partial(colour, order[:size], 3, 0.0)
    return ConfoundedData(*parts, digits.CLASSES, COLOURS, {"colour": (0,)}, unconfounded=unconfounded)


def _examples(data: ConfoundedData, offset: float, label: str, count: int = 8) -> Figure:
    samples, lines = data.train, []
    for number, name in enumerate(data.classes):
        rows = torch.nonzero(samples.labels == number)[:count, 0]
        rows = rows[samples.confounders[rows, 0].argsort()]
        images = (samples.inputs[rows].permute(0, 2, 3, 1) + offset).clamp(0, 1).numpy()
        texts = [f"{label} {value:.1f}" for value in samples.confounders[rows, 0].tolist()]
        lines.append((name, list(zip(images, texts, strict=True))))
    return picture_grid(lines, (WIDTH, 2.3))


SETTING = ConfoundedSetting(
    name="image",
    title="Metadata Normalization on faces",
    introduction=(
        "Drawn faces. Five measures of their geometry tell the label, with overlap. The skin's shade tells "
        "nothing of it, but goes with it in the training data: eight of ten “male” faces are from the darker "
        "half of the scale, eight of ten “female” ones from the lighter half.",
        f"The best rule that looks at the geometry is right in {100 * faces.LIMIT:.1f} % of all faces whose "
        "shade says nothing. A network that judges by the shade is worse there.",
    ),
    make_data=make_face_data,
    backbone=image_backbone,
    slots=("norm1", "norm2", "norm3"),
    base_norm="group",
    batch_size=50,
    epochs=12,
    learning_rate=1e-3,
    size=3000,
    quick_size=1000,
    quick_epochs=8,
    quick_methods=("none", "mdn-last-running"),
    limit=faces.LIMIT,
    examples=partial(_examples, offset=0.5, label="shade"),
    tuned={"adversary": {"strength": 0.1}, "group_dro": {"step_size": 0.1}},
    load=load_faces,
)

DIGITS = ConfoundedSetting(
    name="digits",
    title="Metadata Normalization on coloured digits",
    introduction=(
        "Handwritten digits that scikit-learn ships, coloured as in Coloured MNIST: the label says whether a "
        "digit is above 4, and is wrong for a quarter of them. The colour, from red to green, goes with the "
        "label as it stands.",
        "Who reads the digit is right in 75 % of all cases at best; who reads the colour, in 80 % where it "
        "goes with the label, and in 50 % where it does not.",
    ),
    make_data=make_digit_data,
    backbone=image_backbone,
    slots=("norm1", "norm2", "norm3"),
    base_norm="group",
    batch_size=50,
    epochs=15,
    learning_rate=1e-3,
    size=1200,
    quick_methods=("none", "mdn-last-running"),
    limit=1 - digits.LABEL_NOISE,
    examples=partial(_examples, offset=0.0, label="colour"),
    tuned={"adversary": {"strength": 0.3}, "group_dro": {"step_size": 0.2}},
)
