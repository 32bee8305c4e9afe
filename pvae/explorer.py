"""The latent explorer of a run's page: images that are decoded beforehand.

The page cannot run the decoder. So one picture, the sprite, holds in its cells all images that the
sliders and the plane of the page can show.
"""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pvae import evaluate
from pvae.data import Observed, pixels
from pvae.report import Drawing
from pvae.vae import VAE

_BYTES = 500_000  # of all cells, before the PNG packs them
_STARTS, _UNITS = 3, 6  # test images to start from; units that have a slider
_REACH = 3  # standard deviations of the codes to either side of their mean
_POINTS = 400  # codes on the plane


@dataclass(frozen=True)
class Explorer:
    """Decoded images, and the layout of their cells.

    Args:
        sprite: a PNG of equal cells, row by row.
        layout: for the page's script: the size of a cell and the number of columns; `side`, the
            number of values of a unit; `joined`, the number of units that move together; `values`
            of each unit; and for each start its code and its first cell. The cells of a start are
            the image, its decoded code, the joined units, and then each other unit alone.
        units, starts: their names on the page.
        points: codes of test images on the plane, in steps from its lower left corner, each with
            the index of its class in `classes`.
        classes: the names of the classes.
        codes: the number of test images from whose codes the values are computed.
        shrunk: the factor by which each side of an image is reduced.
    """

    sprite: bytes
    layout: dict[str, Any]
    units: list[str]
    starts: list[str]
    points: list[tuple[float, float, int]]
    classes: list[str]
    codes: int
    shrunk: int


def explore(
    vae: VAE, data: Observed, *, class_names: Sequence[str] | None = None, seed: int = 0
) -> Explorer | None:
    """Decodes the images of an explorer of the pair's (first) latent; None if data are no images.

    The two most active units move together, on a plane. Each other unit moves alone, from the code
    of a test image. A unit's values reach from 3 standard deviations below the mean of the test
    images' codes to 3 above it, whatever the prior is.

    >>> import pvae
    >>> from pvae.data import load, observe
    >>> vae = pvae.build((1, 28, 28), latent_dim=3, net="mlp", hidden=8)
    >>> explorer = explore(vae, observe(load("digits"), "dynamic"))
    >>> len(explorer.units), len(explorer.starts), explorer.layout["side"]
    (2, 3, 11)
    """
    first = data.test.first(1000)
    if first.images.dim() != 4 or first.images.shape[1] not in (1, 3):
        return None
    x, y = pixels(first.images), vae.given(first.y)
    label = "label " if class_names is None else ""
    of, names = _classes(first.labels, class_names)
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        codes = evaluate.posterior_means(vae.guide, x, y)
        variances = evaluate.unit_variances(codes)
        count = min(_UNITS, codes.shape[1], max(2, evaluate.active_units(codes)))
        units, joined = variances.argsort(descending=True)[:count], min(2, count)
        units[:2] = units[:2].sort().values
        whole = codes.shape[1] <= 2 and y is None  # the plane is then the same for all starts
        side, shrunk = _fitting(x[0].numel(), joined, count - joined, whole)
        cells = 2 + side**joined + side * (count - joined)  # of each start
        room = _BYTES * shrunk**2 // (x[0].numel() * cells)
        starts = _of_other_classes(of, len(x), 1 if whole else min(_STARTS, room))
        steps = torch.linspace(-_REACH, _REACH, side).to(codes)
        values = codes.mean(0)[units, None] + variances.sqrt()[units, None] * steps  # (U, side)
        drawing = Drawing.of(data)  # scales standardised data back to their units
        images: list[Tensor] = []
        for start in starts:
            z = _moved(codes[start], units, values, joined)
            given = None if y is None else y[start]
            images += map(drawing, (x[start : start + 1], vae.decode(z, given).mean))
    small = avg_pool2d(torch.cat(images), shrunk, ceil_mode=True)
    columns = math.ceil(math.sqrt(len(small)))
    return Explorer(
        sprite=_png(small, columns),
        layout={
            "width": small.shape[-1],
            "height": small.shape[-2],
            "columns": columns,
            "side": side,
            "joined": joined,
            "values": values.tolist(),
            "starts": [
                {"first": i * cells, "code": codes[start][units].tolist()}
                for i, start in enumerate(starts)
            ],
        },
        units=[f"z{unit}" for unit in units.tolist()],
        starts=[
            f"test image {start}" + (f", {label}{names[of[start]]}" if of else "")
            for start in starts
        ],
        points=_points(codes[:_POINTS, units[:2]], values[:2], of) if joined == 2 else [],
        classes=names,
        codes=len(codes),
        shrunk=shrunk,
    )


def _fitting(size: int, joined: int, alone: int, whole: bool) -> tuple[int, int]:
    """The number of values of a unit, and the factor by which images shrink, so that the cells of
    one start fit into `_BYTES`."""
    for shrunk in itertools.count(1):
        for side in (21, 15, 11, 9, 7) if whole else (11, 9, 7):
            if (2 + side**joined + side * alone) * size <= _BYTES * shrunk**2:
                return side, shrunk
    raise AssertionError("images shrink without end")


def _classes(labels: Tensor | None, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """The index of each label among the classes, and the names of the classes; both are empty if
    the labels are not whole numbers."""
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        return [], []
    classes, of = labels.unique(return_inverse=True)
    return of.tolist(), [str(k) if names is None else names[k] for k in classes.tolist()]


def _of_other_classes(of: Sequence[int], images: int, count: int) -> list[int]:
    """The indices of the first images of different classes, then those of other first images."""
    fresh = [i for i, k in enumerate(of) if k not in of[:i]][:count]
    return [*fresh, *(i for i in range(images) if i not in fresh)][:count]


def _moved(code: Tensor, units: Tensor, values: Tensor, joined: int) -> Tensor:
    """Codes `(N, D)`: the code itself, the joined units at all combinations of their values (the
    last joined unit changes slowest), and then each other unit alone."""
    own = code[units]
    grid = torch.cartesian_prod(*values[:joined].flip(0)).reshape(-1, joined).flip(1)
    rows = [own[None], torch.cat([grid, own[joined:].expand(len(grid), -1)], 1)]
    for unit in range(joined, len(units)):
        alone = own.repeat(values.shape[1], 1)
        alone[:, unit] = values[unit]
        rows.append(alone)
    moved = torch.cat(rows)
    z = code.repeat(len(moved), 1)
    z[:, units] = moved
    return z


def _points(codes: Tensor, values: Tensor, of: Sequence[int]) -> list[tuple[float, float, int]]:
    """Codes `(N, 2)` in steps of the plane, each with its class; codes beyond it are left out."""
    last, low, high = values.shape[1] - 1, values[:, 0], values[:, -1]
    steps = (codes - low) / (high - low).clamp(min=1e-30) * last
    inside = ((steps >= -0.5) & (steps <= last + 0.5)).all(1).tolist()
    classes = of or [0] * len(inside)
    return [
        (round(i, 2), round(j, 2), k)
        for (i, j), k, shown in zip(steps.tolist(), classes, inside, strict=False)
        if shown
    ]


def _png(images: Tensor, columns: int) -> bytes:
    """A PNG of images `(N, C, H, W)` in [0, 1], row by row."""
    missing = -len(images) % columns
    cells = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    cells = cells.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    canvas = (255 * cells.flatten(2, 3).flatten(0, 1)).round().byte().cpu()
    file = io.BytesIO()
    Image.fromarray(canvas.squeeze(2).numpy()).save(file, "PNG")
    return file.getvalue()
