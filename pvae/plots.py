"""Figures from tensors: image grids, latent spaces and learning curves, drawn with matplotlib.

This module uses no models, Pyro or data sets. Images are float tensors in [0, 1] with one channel
(grey) or three (RGB), on any device; `drawn` makes such images from data of any other kind. The
other functions return a `Figure` that is not part of pyplot's state: it is freed like any other
object, and importing this module changes nothing outside it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from pvae.files import write_atomically

_DPI = 150
_CELL = 120  # small images are enlarged to this many pixels on their longer side, if they fit
_SIDE = 1600  # the most pixels that a grid is wide or high
_TOLERANCE = 1e-4  # how far pixels may be outside [0, 1], by rounding in a decoder's last layer

# Petroff's ten colours (arXiv:2107.02270) can be told apart with any colour vision. A second marker
# makes them enough for twenty classes.
_COLOURS = [to_hex(colour) for colour in color_sequences["petroff10"]]
_MARKERS = ("o", "^")

_HISTORY = (
    *("epoch", "train_objective", "validation_elbo"),
    *("validation_reconstruction", "validation_kl", "beta"),
)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, completely or not at all; the suffix of `path` names the format.

    Raises:
        ValueError: if matplotlib cannot write files with that suffix.
        FileNotFoundError: if the folder does not exist.

    Example:
        >>> import os, tempfile, torch
        >>> from pvae import plots
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plots.save(plots.samples(torch.rand(4, 1, 8, 8)), f"{folder}/samples.png")
        ...     os.listdir(folder)
        ['samples.png']
    """
    path = Path(path)
    suffix, allowed = path.suffix.lower().lstrip("."), figure.canvas.get_supported_filetypes()
    if suffix not in allowed:
        raise ValueError(f"path must end in one of {', '.join(sorted(allowed))}, not {str(path)!r}")
    write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi="figure"))


def grid(
    images: Tensor,
    columns: int,
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Figure:
    """Draw images `(N, C, H, W)` row by row, with labels left of the rows and above the columns.

    Raises:
        ValueError: if `images` is not of this shape or not in [0, 1], if `columns` is below 1, or
            if there are labels, but not one for each row or column.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.grid(torch.rand(6, 3, 32, 20), columns=3, row_labels=["a", "b"])
        >>> figure.axes[0].images[0].get_array().shape  # 2 rows of 32, 3 columns of 20, RGB
        (64, 60, 3)
    """
    images = _checked("images", images, "(N, C, H, W)")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    rows = math.ceil(len(images) / columns)
    if row_labels:
        _check_count("row_labels", row_labels, rows)
    if column_labels:
        _check_count("column_labels", column_labels, columns)

    height, width = images.shape[-2:]
    scale = min(
        max(1, _CELL / max(height, width)), _SIDE / (columns * width), _SIDE / (rows * height)
    )
    # whole screen pixels for each image pixel, else some image pixels would look wider than others
    scale = math.floor(scale) if scale >= 1 else scale
    size = (columns * width * scale / _DPI, rows * height * scale / _DPI)
    figure = Figure(size, dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(
        _canvas(images, rows, columns).numpy(),
        extent=(0, columns, rows, 0),  # one unit is one cell
        aspect=height / width,
        interpolation="nearest" if scale >= 1 else "antialiased",
    )
    _separate(axes, rows, columns)
    axes.set_title(title, fontsize=10)
    axes.xaxis.tick_top()
    axes.set_xticks([c + 0.5 for c in range(len(column_labels))], _as_they_are(column_labels))
    axes.set_yticks([r + 0.5 for r in range(len(row_labels))], _as_they_are(row_labels))
    axes.tick_params(length=0, labelsize=8)
    _fit(figure)
    return figure


_PANEL, _FINE = (90, 140), 3  # pixels of a drawn datum; it is drawn on a grid 3 times finer
_GREY, _UPON = "#a0a0a0", (_COLOURS[2], _COLOURS[0], _COLOURS[4], _COLOURS[6])


def drawn(
    values: Tensor, over: Tensor | None = None, *, low: float, high: float, bars: bool = False
) -> Tensor:
    """Images `(N, 3, H, W)` of signals `(N, C, L)`, as lines or bars.

    Each channel is a line in its own colour or, with `bars`, has a bar from 0 for each of its L
    values. A panel reaches from `low` to `high`. With `over` `(N, C, L)` the values are grey, and
    those of `over` are lines drawn over them.

    Raises:
        ValueError: if `values` is not of this shape, `over` has another shape, or `high` is not
            above `low`.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> plots.drawn(torch.rand(5, 1, 64), low=0, high=1).shape
        torch.Size([5, 3, 90, 140])
    """
    if values.dim() != 3 or 0 in values.shape:
        raise _misfit("values must have shape (N, C, L), every size at least 1", values)
    if over is not None and over.shape != values.shape:
        raise _misfit("values and over must have one shape", values, over)
    if not low < high:
        raise ValueError(f"high must be above low, {low:g}, not {high:g}")
    canvas = torch.ones(len(values), 3, *_PANEL)
    layers = [(values, bars, over is not None)]
    layers += [] if over is None else [(over, False, False)]
    for layer, as_bars, grey in layers:
        heights = ((layer.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
        base = min(max(-low / (high - low), 0.0), 1.0)
        for channel, height in enumerate(heights.unbind(1)):
            ink = _bars(height, base) if as_bars else _lines(height)  # (N, H, W)
            name = _GREY if grey else _COLOURS[channel % len(_COLOURS)]
            if not grey and over is not None:
                name = _UPON[channel % len(_UPON)]
            rgb = torch.tensor([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            canvas = canvas + ink[:, None] * (rgb[:, None, None] - canvas)
    return canvas.clamp(0, 1)


def _fine_grid() -> tuple[Tensor, Tensor]:
    """Heights `(H, 1)` of the pixels of the fine grid, from 1 at the top to 0, and their
    horizontal places `(W,)` in [0, 1]."""
    rows, columns = (size * _FINE for size in _PANEL)
    heights = 1 - (torch.arange(rows) + 0.5) / rows
    return heights[:, None], (torch.arange(columns) + 0.5) / columns


def _coarse(inked: Tensor) -> Tensor:
    """The share of ink in each pixel, from the ink of the fine grid `(N, H, W)`."""
    return torch.nn.functional.avg_pool2d(inked.float()[:, None], _FINE)[:, 0]


def _bars(height: Tensor, base: float) -> Tensor:
    """The ink of bars from `base` to `height` `(N, L)`, with gaps between them if there is room."""
    heights, places = _fine_grid()
    at = places * height.shape[1]
    top = height[:, at.long()][:, None]  # (N, 1, W)
    inside = (heights <= top.clamp(min=base)) & (heights >= top.clamp(max=base))
    gap = (at.frac() < 0.12) | (at.frac() > 0.88)
    return _coarse(inside & ~(gap & (height.shape[1] * 6 <= len(places))))


def _lines(height: Tensor) -> Tensor:
    """The ink of straight lines through `height` `(N, L)`."""
    heights, places = _fine_grid()
    ends = []
    for side in (-0.5, 0.5):  # the two edges of each fine column
        at = (places + side / len(places)) * height.shape[1] - 0.5
        at = at.clamp(0, height.shape[1] - 1)
        first = at.long()
        second = (first + 1).clamp(max=height.shape[1] - 1)
        ends.append(torch.lerp(height[:, first], height[:, second], at.frac()))
    low, high = (f(*ends)[:, None] for f in (torch.minimum, torch.maximum))
    half = 0.5 / len(heights)
    thin = (heights >= low - half) & (heights <= high + half)
    # thicken the line equally where it is steep and where it is flat
    return _coarse(torch.nn.functional.max_pool2d(thin.float(), 5, stride=1, padding=2))


def reconstructions(originals: Tensor, reconstructed: Tensor, *, title: str = "") -> Figure:
    """Draw each original `(N, C, H, W)` above its reconstruction, at most 16 pairs side by side.

    Raises:
        ValueError: if the two shapes differ, or are not `(N, C, H, W)`, or pixels are outside
            [0, 1].

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> x = torch.rand(4, 1, 28, 28)
        >>> figure = plots.reconstructions(x, x.round())
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['x', 'reconstruction']
    """
    if originals.shape != reconstructed.shape:
        raise _misfit("originals and reconstructed must have one shape", originals, reconstructed)
    originals = _checked("originals", originals, "(N, C, H, W)")
    reconstructed = _checked("reconstructed", reconstructed, "(N, C, H, W)")
    blocks = math.ceil(len(originals) / 16)
    columns = math.ceil(len(originals) / blocks)
    pairs = [
        _fill(x, blocks * columns).unflatten(0, (blocks, columns))
        for x in (originals, reconstructed)
    ]
    rows = torch.stack(pairs, dim=1).flatten(0, 2)
    figure = grid(rows, columns, title=title, row_labels=["x", "reconstruction"] * blocks)
    for block in range(1, blocks):
        figure.axes[0].axhline(2 * block, color="white", linewidth=2)
    return figure


def samples(images: Tensor, *, title: str = "") -> Figure:
    """Draw images `(N, C, H, W)` in about as many rows as columns.

    Raises:
        ValueError: if `images` is not of this shape or not in [0, 1].

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.samples(torch.rand(9, 1, 28, 28), title="prior samples")
        >>> figure.axes[0].images[0].get_array().shape
        (84, 84, 3)
    """
    images = _checked("images", images, "(N, C, H, W)")
    return grid(images, math.ceil(math.sqrt(len(images))), title=title)


def manifold(images: Tensor, axis: Tensor, *, title: str = "") -> Figure:
    """Draw images `(S, S, C, H, W)` decoded on a square grid of two latent units; z1 grows upward.

    `images[i, j]` was decoded from z0 = `axis[j]` and z1 = `axis[i]`, with `axis` of shape `(S,)`.

    Raises:
        ValueError: if the shapes do not fit, if `axis` is not finite, or if the images do not lie
            in [0, 1].

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.manifold(torch.rand(3, 3, 1, 28, 28), torch.tensor([-1.5, 0.0, 1.5]))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['-1.5', '0', '1.5']
    """
    images = _checked("images", images, "(S, S, C, H, W)")
    side = len(images)
    if images.shape[1] != side or axis.shape != (side,):
        raise _misfit("images must have shape (S, S, C, H, W) and axis shape (S,)", images, axis)
    _check_finite("axis", axis)
    every = math.ceil(side / 16)  # more than 16 labels would overlap
    labels = [text if i % every == 0 else "" for i, text in enumerate(_numbers(axis))]
    figure = grid(
        images.flip(0).flatten(0, 1),
        side,
        title=title,
        row_labels=labels[::-1],
        column_labels=labels,
    )
    axes = figure.axes[0]
    axes.xaxis.tick_bottom()
    axes.set_xlabel("z0")
    axes.set_ylabel("z1")
    _fit(figure)
    return figure


def traversals(images: Tensor, values: Tensor, labels: Sequence[str], *, title: str = "") -> Figure:
    """Draw images `(U, T, C, H, W)`: a row for each latent unit, a column for each of its `values`.

    `values` has shape `(T,)`.

    Raises:
        ValueError: if the shapes do not fit, if there is not one label for each of the U rows, if
            a value is not finite, or if the images do not lie in [0, 1].

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> images, values = torch.rand(2, 5, 1, 28, 28), torch.linspace(-3, 3, 5)
        >>> figure = plots.traversals(images, values, ["z7  KL 3.21", "z0  KL 0.02"])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['-3', '-1.5', '0', '1.5', '3']
    """
    images = _checked("images", images, "(U, T, C, H, W)")
    units, steps = images.shape[:2]
    if values.shape != (steps,):
        raise _misfit(
            "images must have shape (U, T, C, H, W) and values shape (T,)", images, values
        )
    _check_finite("values", values)
    _check_count("labels", labels, units)
    return grid(
        images.flatten(0, 1), steps, title=title, row_labels=labels, column_labels=_numbers(values)
    )


def interpolations(images: Tensor, *, title: str = "") -> Figure:
    """Draw images `(P, T, C, H, W)`: a row for each pair, from its one end (0) to the other (1).

    Raises:
        ValueError: if `images` is not of this shape or not in [0, 1], or if T is below 2.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.interpolations(torch.rand(2, 5, 1, 28, 28))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0', '0.25', '0.5', '0.75', '1']
    """
    images = _checked("images", images, "(P, T, C, H, W)")
    steps = images.shape[1]
    if steps < 2:
        raise _misfit("images must have T >= 2 in (P, T, C, H, W), for the two ends", images)
    labels = _numbers(torch.linspace(0, 1, steps))
    return grid(images.flatten(0, 1), steps, title=title, column_labels=labels)


def latents(
    means: Tensor,
    labels: Tensor | None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    axis_labels: tuple[str, str] = ("z0", "z1"),
) -> Figure:
    """Scatter posterior means `(N, 2)`, coloured by their labels `(N,)` if there are any.

    Up to 20 classes of integer labels each get a colour, a marker and an entry in the legend. The
    name of a class is also written at its median, unless it would overlap another name. `names[k]`
    is the name of class `k`; without `names` its number is its name. More classes, or labels that
    are not integers, get a colour bar.

    Raises:
        ValueError: if the shapes do not fit, if a mean or label is not finite, or if a class is not
            an index of `names`.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.latents(torch.randn(100, 2), torch.arange(100) % 3)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['0', '1', '2']
    """
    means = means.detach().cpu().float()
    if means.dim() != 2 or means.shape[1] != 2 or len(means) == 0:
        raise _misfit("means must have shape (N, 2) with N >= 1 (project more latents)", means)
    _check_finite("means", means)
    figure = Figure((6, 5.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, wrap=True)
    axes.set_xlabel(axis_labels[0])
    axes.set_ylabel(axis_labels[1])
    axes.set_aspect("equal", adjustable="datalim")
    _background(axes)
    if labels is None:
        _scatter(axes, means, _COLOURS[0], "o", _size(means))
        return figure

    labels = labels.detach().cpu()
    if labels.shape != means.shape[:1]:
        raise _misfit("means must have shape (N, 2) and labels shape (N,)", means, labels)
    _check_finite("labels", labels)
    if labels.is_floating_point() or len(labels.unique()) > len(_COLOURS) * len(_MARKERS):
        points = _scatter(axes, means, labels.tolist(), "o", _size(means))
        figure.colorbar(points, ax=axes, label="label")
    else:
        _remove_overlapping(figure, _scatter_classes(axes, means, labels, names))
    return figure


def posterior(exact: Tensor, guide: Tensor, units: tuple[int, int], *, title: str = "") -> Figure:
    """Plot draws `(S, D)` of one image's posterior beside draws `(S', D)` of the guide.

    Left: the draws of the two `units`, and for both distributions the mean and the ellipse of two
    standard deviations. Right: mean and two standard deviations of every unit, or of the 20 units
    with the smallest posterior standard deviation.

    Raises:
        ValueError: if the shapes do not fit, a draw is not finite, or a unit is not among the `D`.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.posterior(torch.randn(50, 3), torch.randn(40, 3), (0, 2))
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['z0', 'unit']
    """
    clouds = {"NUTS": exact.detach().cpu().float(), "guide": guide.detach().cpu().float()}
    for name, z in clouds.items():
        if z.dim() != 2 or len(z) < 2 or z.shape[1] != exact.shape[1]:
            wanted = "exact and guide must have shapes (S, D) and (S', D) with S, S' >= 2"
            raise _misfit(wanted, exact, guide)
        _check_finite(name, z)
    if not all(0 <= unit < exact.shape[1] for unit in units):
        raise ValueError(f"units must be from 0 to {exact.shape[1] - 1}, not {units}")
    figure = Figure((9.5, 4.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    shown = clouds["NUTS"].std(0).argsort()[:20].sort().values
    for shift, colour, (name, z) in zip((-0.17, 0.17), _COLOURS[::2], clouds.items(), strict=False):
        _scatter(left, z[:, units], colour, "o", 6)
        left.plot(*_ellipse(z[:, units]).numpy(), color=colour, linewidth=1.6, label=name)
        left.plot(
            *z[:, units].mean(0).tolist(), "+", color=colour, markersize=14, markeredgewidth=2
        )
        right.errorbar(
            torch.arange(len(shown)).numpy() + shift,
            z.mean(0)[shown].numpy(),
            2 * z.std(0)[shown].numpy(),
            fmt="o",
            markersize=3,
            color=colour,
            label=name,
        )
    left.set_title("Two units: draws, and two standard deviations", fontsize=10)
    left.set(xlabel=f"z{units[0]}", ylabel=f"z{units[1]}")
    left.set_aspect("equal", adjustable="datalim")
    right.set_title("Mean and two standard deviations of each unit", fontsize=10)
    right.set_xticks(range(len(shown)), [str(unit) for unit in shown.tolist()], fontsize=7)
    right.set(xlabel="unit", ylabel="z")
    for axes in (left, right):
        _background(axes)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8)
    return figure


def calibration(ranks: Tensor, num_draws: int, p_values: Tensor, *, title: str = "") -> Figure:
    """Draw how far the ranks `(N, D)` of each unit, 0 to `num_draws`, are from uniform.

    A line shows the share of a unit's ranks up to each level, minus the level. The grey band
    contains the lines of all `D` units of an exact guide in 95 % of cases (Dvoretzky, Kiefer and
    Wolfowitz's inequality). Units whose p-value, in `p_values` `(D,)`, is below 0.05 are in colour.
    If the guide is too narrow, the line rises before the middle and falls below zero after it; if
    it is too wide, the reverse; if it is shifted, the line stays on one side.

    Raises:
        ValueError: if there are no ranks from 0 to `num_draws`, or not one p-value for each unit.

    Example:
        >>> import torch
        >>> from pvae import plots
        >>> figure = plots.calibration(torch.randint(0, 11, (50, 3)), 10, torch.ones(3))
        >>> figure.axes[0].get_xlabel()
        'level'
    """
    if ranks.dim() != 2 or ranks.numel() == 0 or ranks.min() < 0 or ranks.max() > num_draws:
        raise ValueError(
            f"ranks must be (N, D) whole numbers from 0 to num_draws = {num_draws}, not of shape "
            f"{tuple(ranks.shape)}"
            + (f", from {ranks.min()} to {ranks.max()}" if ranks.numel() else "")
        )
    count, units = ranks.shape
    if p_values.shape != (units,):
        raise _misfit("p_values must hold one number for each unit of ranks", ranks, p_values)
    levels = torch.arange(num_draws + 1, dtype=torch.float64)
    shares = torch.stack([unit.bincount(minlength=num_draws + 1) for unit in ranks.cpu().T])
    expected = (levels + 1) / (num_draws + 1)
    lines = shares.cumsum(1) / count - expected
    figure = Figure((6, 4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    reach = math.sqrt(math.log(2 * units / 0.05) / (2 * count))
    axes.axhspan(-reach, reach, color="0.92", label="95 % of exact guides, all units")
    exact = "p-value of 0.05 or more"
    for line in lines[p_values.cpu() >= 0.05]:
        axes.plot(expected, line, color="0.55", linewidth=0.8, label=exact)
        exact = ""
    accused = (p_values.cpu() < 0.05).nonzero().flatten()
    worst = accused[p_values.cpu()[accused].argsort()]
    for i, unit in enumerate(worst.tolist()):  # only the first ten get a label
        label = f"unit {unit}" if i < len(_COLOURS) else ""
        axes.plot(
            expected, lines[unit], color=_COLOURS[i % 10], linewidth=1.2, zorder=3, label=label
        )
    axes.set(xlabel="level", ylabel="share of ranks up to the level, less the level", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(title, fontsize=10)
    return figure


def _ellipse(z: Tensor) -> Tensor:
    """The ellipse of two standard deviations of draws `(S, 2)` around their mean, `(2, 100)`."""
    angle = torch.linspace(0, 2 * math.pi, 100)
    values, vectors = torch.linalg.eigh(z.T.cov())
    circle = torch.stack([angle.cos(), angle.sin()])
    return z.mean(0)[:, None] + 2 * vectors @ (values.clamp(min=0).sqrt()[:, None] * circle)


def curves(
    history: Sequence[Mapping[str, float]],
    *,
    title: str = "",
    objective: str = "ELBO",
    unit: str = "image",
) -> Figure:
    """Draw the learning curves of a run: the ELBO and its two terms.

    Each epoch is one mapping with the keys `epoch`, `train_objective`, `validation_elbo`,
    `validation_reconstruction`, `validation_kl` and `beta`, in nats per `unit`; further keys are
    ignored. Values of early epochs that are far from the others are out of view, and the panel says
    so.

    `objective` is the name of the trained objective. The ELBO, if beta = 1 in every epoch, shares
    the panel of the validation ELBO. Any other objective has another scale, and so its own panel.

    Raises:
        ValueError: if there are no epochs, or if a key is missing or not finite in one of them.

    Example:
        >>> from pvae import plots
        >>> epoch = {"epoch": 1, "train_objective": -150.0, "validation_elbo": -140.0, "beta": 1.0}
        >>> epoch |= {"validation_reconstruction": -120.0, "validation_kl": 20.0}
        >>> figure = plots.curves([epoch])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['train', 'validation', 'best: -140.00, epoch 1']
    """
    epochs, train, validation, reconstruction, kl, beta = _columns(history)
    best = validation.index(max(validation))
    together = objective == "ELBO" and set(beta) == {1}
    left = ["elbo", "elbo"] if together else ["elbo", "objective"]
    figure = Figure((9, 4 if together else 5), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplot_mosaic(
        [[left[0], "reconstruction"], [left[1], "kl"]], sharex=True, width_ratios=[3, 2]
    )

    elbo = panels["elbo"]
    elbo.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)  # shared by all panels
    _line(panels[left[1]], epochs, train, _COLOURS[0], "train")
    _line(elbo, epochs, validation, _COLOURS[6], "validation")
    best_label = f"best: {validation[best]:.2f}, epoch {epochs[best]:g}"
    elbo.plot(epochs[best], validation[best], "k*", markersize=9, label=best_label)
    if together:
        _finish_panel(elbo, "ELBO", train, validation)
    else:
        _finish_panel(elbo, "ELBO (beta = 1)", validation)
        name = "ELBO at the beta of each epoch" if objective == "ELBO" else objective
        _finish_panel(panels["objective"], f"train: {name}", train)
    elbo.legend(fontsize=8)

    at_best = f"at epoch {epochs[best]:g}"
    for name, series in (("reconstruction", reconstruction), ("kl", kl)):
        panel = panels[name]
        _line(panel, epochs, series, _COLOURS[6], "validation")
        panel.axvline(epochs[best], color="0.6", linewidth=0.8, linestyle=":")
        text = "KL" if name == "kl" else name
        _finish_panel(panel, f"validation {text}: {series[best]:.2f} {at_best}", series)
    _shade(panels["kl"], epochs, beta)
    for panel in panels.values():
        panel.set_ylabel(f"nats per {unit}", fontsize=8)
    for name in (left[1], "kl"):
        panels[name].set_xlabel("epoch", fontsize=8)
    return figure


def _misfit(wanted: str, *tensors: Tensor) -> ValueError:
    """The error for tensors that do not have the wanted shapes."""
    return ValueError(f"{wanted}, not {' and '.join(str(tuple(t.shape)) for t in tensors)}")


def _checked(name: str, images: Tensor, sizes: str) -> Tensor:
    """The images on the CPU, clamped to [0, 1] if they exceed it only by rounding.

    Raises ValueError if they exceed it by more, or do not have `sizes`.
    """
    images = images.detach().cpu().float()
    shape = images.shape
    if len(shape) != len(sizes.split(",")) or 0 in shape or shape[-3] not in (1, 3):
        raise _misfit(f"{name} must have shape {sizes}, C = 1 or 3, every size at least 1", images)
    inside = (images >= -_TOLERANCE) & (images <= 1 + _TOLERANCE)  # False for NaN
    if not inside.all():
        where = tuple((~inside).nonzero()[0].tolist())
        raise ValueError(f"{name} must lie in [0, 1], not {images[where].item():.6g} at {where}")
    return images.clamp(0, 1)


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        where = tuple((~values.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, not {values[where].item()} at {where}")


def _check_count(name: str, labels: Sequence[str], count: int) -> None:
    if len(labels) != count:
        raise ValueError(f"{name} must hold {count} labels, not {len(labels)}: {list(labels)}")


def _as_they_are(labels: Sequence[str]) -> list[str]:
    """The labels with escaped dollar signs, between which matplotlib would set a formula."""
    return [label.replace("$", r"\$") for label in labels]


def _numbers(values: Tensor) -> list[str]:
    """Labels for values: three digits for the largest, and the same number of decimals for all."""
    listed = values.detach().tolist()
    largest = max(map(abs, listed))
    decimals = 2 - math.floor(math.log10(largest)) if largest else 0
    return [f"{round(value, decimals) + 0.0:g}" for value in listed]  # + 0.0: no "-0"


def _fill(images: Tensor, count: int) -> Tensor:
    """Append white images until there are `count` images."""
    return torch.cat([images, images.new_ones(count - len(images), *images.shape[1:])])


def _canvas(images: Tensor, rows: int, columns: int) -> Tensor:
    """One RGB image `(rows * H, columns * W, 3)` of the images `(N, C, H, W)`, row by row."""
    cells = _fill(images, rows * columns).expand(-1, 3, -1, -1).unflatten(0, (rows, columns))
    return cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # rows, H, columns, W, 3


def _separate(axes: Axes, rows: int, columns: int) -> None:
    """Draw thin lines between the cells, on top of the canvas."""
    axes.set_xticks(range(1, columns), minor=True)
    axes.set_yticks(range(1, rows), minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="0.6", linewidth=0.5)
    axes.spines[:].set(color="0.6", linewidth=0.5)


def _fit(figure: Figure) -> None:
    """Resize the figure so that no label is cut; its only axes keep their size in pixels."""
    (axes,) = figure.axes
    labels = axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    if any(left.x1 > right.x0 for left, right in pairwise(boxes)):
        axes.tick_params(axis="x", labelrotation=90)
    # frozen, as an axes' box is a view that follows the size of the figure
    inner, outer = axes.get_window_extent().frozen(), figure.get_tightbbox()
    # whole pixels, so that the image's pixels stay aligned with those of the screen
    left, below = math.ceil(inner.x0 - outer.x0 * _DPI), math.ceil(inner.y0 - outer.y0 * _DPI)
    right, above = math.ceil(outer.x1 * _DPI - inner.x1), math.ceil(outer.y1 * _DPI - inner.y1)
    margin = 8
    width = round(inner.width) + left + right + 2 * margin
    height = round(inner.height) + below + above + 2 * margin
    figure.set_size_inches(width / _DPI, height / _DPI)
    x, y = (left + margin) / width, (below + margin) / height
    axes.set_position((x, y, round(inner.width) / width, round(inner.height) / height))


def _scatter(
    axes: Axes, points: Tensor, colours: str | list[float] | list[str], marker: str, size: float
) -> PathCollection:
    x, y = points.numpy().T
    # without smooth edges the file of ten thousand points is a third as large
    return axes.scatter(
        x, y, c=colours, marker=marker, s=size, alpha=0.8, linewidths=0, antialiased=False
    )


def _size(means: Tensor) -> float:
    """The size of a point: the more points, the smaller."""
    return min(30, max(5, 15_000 / len(means)))


def _scatter_classes(
    axes: Axes, means: Tensor, labels: Tensor, names: Sequence[str] | None
) -> list[Text]:
    """Scatter all classes together, so that none covers the others; name each at its median."""
    classes, index = labels.unique(return_inverse=True)
    low, high = int(classes[0]), int(classes[-1])
    if names is not None and not 0 <= low <= high < len(names):
        raise ValueError(
            f"labels must be from 0 to {len(names) - 1}, a class for each of the names, not from "
            f"{low} to {high}"
        )
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(classes))]
    markers = [_MARKERS[i // len(_COLOURS)] for i in range(len(classes))]
    for marker in sorted(set(markers)):
        chosen = torch.tensor([m == marker for m in markers])[index]
        drawn = [colours[i] for i in index[chosen].tolist()]
        _scatter(axes, means[chosen], drawn, marker, _size(means))
    handles, texts = [], []
    shown = [str(k) if names is None else names[int(k)] for k in classes.tolist()]
    for i, name in enumerate(_as_they_are(shown)):
        handles.append(
            Line2D([], [], color=colours[i], marker=markers[i], linestyle="", label=name)
        )
        x, y = means[index == i].median(dim=0).values.tolist()
        halo = [withStroke(linewidth=2.5, foreground="white")]
        texts.append(
            axes.text(x, y, name, ha="center", va="center", weight="bold", path_effects=halo)
        )
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    return texts


def _remove_overlapping(figure: Figure, texts: Sequence[Text]) -> None:
    """Remove each text that overlaps an earlier one."""
    figure.draw_without_rendering()  # only the layout gives the places of the texts
    kept: list[Bbox] = []
    for text in texts:
        box = text.get_window_extent()
        if box.count_overlaps(kept):
            text.remove()
        else:
            kept.append(box)


def _columns(history: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """The values of the history by key, in the order of `_HISTORY`; checks that none is missing."""
    if not history:
        raise ValueError("history must hold at least one epoch, not none")
    for i, epoch in enumerate(history):
        missing = [key for key in _HISTORY if key not in epoch]
        if missing:
            raise ValueError(f"history[{i}] must have the keys {_HISTORY}, but lacks {missing}")
        for key in _HISTORY:
            if not math.isfinite(epoch[key]):
                raise ValueError(f"history[{i}][{key!r}] must be finite, not {epoch[key]}")
    return [[epoch[key] for epoch in history] for key in _HISTORY]


def _background(axes: Axes) -> None:
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, epochs: list[float], values: list[float], colour: str, label: str) -> None:
    # with markers, else a single epoch would be invisible
    axes.plot(epochs, values, ".-", color=colour, label=label, markersize=4, linewidth=1.3)


def _finish_panel(axes: Axes, title: str, *series: list[float]) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _crop(axes, *series)


def _crop(axes: Axes, *series: list[float]) -> None:
    """Leave early values that would flatten the curve out of view, and say so in the panel.

    In view are the later half of the epochs, and all values within twenty times its range.
    """
    start = len(series[0]) // 2 if len(series[0]) > 2 else 0
    late = [value for values in series for value in values[start:]]
    reach = 20 * (max(late) - min(late))
    low, high = min(late) - reach, max(late) + reach
    everything = [value for values in series for value in values]
    kept = [value for value in everything if low <= value <= high]
    cut = len(everything) - len(kept)
    if cut == 0 or reach == 0:
        return
    span = max(kept) - min(kept)
    axes.set_ylim(min(kept) - 0.15 * span, max(kept) + 0.05 * span)  # room for the note
    farthest = max(everything, key=lambda value: max(low - value, value - high))
    note = f"{cut} early value{'s' * (cut > 1)} out of view, farthest {farthest:.4g}"
    axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=7, color="0.4")


def _shade(axes: Axes, epochs: list[float], beta: list[float]) -> None:
    """Draw beta as a light area behind the curve, on its own axis."""
    twin = axes.twinx()
    twin.fill_between(epochs, beta, color="0.93")
    twin.plot(epochs, beta, ".-", color="0.7", linewidth=1, markersize=2)
    twin.set_ylim(0, 1.1 * max(1.0, *beta))
    twin.set_ylabel("beta", fontsize=8, color="0.5")
    twin.tick_params(labelsize=8, colors="0.5")
    twin.spines["top"].set_visible(False)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
