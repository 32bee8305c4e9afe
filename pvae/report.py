"""The pictures of a run, as files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from pvae import evaluate, plots
from pvae.data import Observed, Scaling, pixels
from pvae.train import Trainer, spread
from pvae.vae import VAE


@dataclass(frozen=True)
class Drawing:
    """Draws data as images in [0, 1]: pictures as pictures, other data as lines or bars.

    A panel of other data reaches from `low` to `high`, in the units of the data.
    """

    pictures: bool
    low: float
    high: float
    bars: bool
    scaling: Scaling | None

    @classmethod
    def of(cls, data: Observed) -> "Drawing":
        """Chooses by the first 1,000 validation data: counts become bars, events `(1 or 3, H, W)`
        pictures."""
        x = pixels(data.validation.first(1000).images)
        pictures = data.unit == "image"
        x = x if data.scaling is None else data.scaling.undo(x)
        bars = bool((x == x.round()).all() and (x >= 0).all())
        rounding = 1e-6  # of pixels that were standardised and scaled back
        if pictures and x.min() >= -rounding and x.max() <= 1 + rounding:
            return cls(True, 0.0, 1.0, bars, data.scaling)
        some = x.flatten()[:: max(1, x.numel() // 10**6)].sort().values
        low, high = some[len(some) // 500].item(), some[-1 - len(some) // 500].item()
        low = min(low, 0.0) if bars else low
        return cls(pictures, low, high if high > low else low + 1, bars, data.scaling)

    @property
    def note(self) -> str:
        """The words of a title about the range; "" for pictures."""
        return "" if self.pictures else f"; heights from {self.low:.3g} to {self.high:.3g}"

    @property
    def what(self) -> str:
        return "images" if self.pictures else "data"

    def __call__(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """Images `(N, C, H, W)` of data `(N, *event)`; with `over`, both are in one panel."""
        if self.pictures:
            x = x if self.scaling is None else self.scaling.undo(x)
            return ((x - self.low) / (self.high - self.low)).clamp(0, 1)
        shown = [self._signals(t) for t in (x, over) if t is not None]
        return plots.drawn(*shown, low=self.low, high=self.high, bars=self.bars)

    def _signals(self, x: Tensor) -> Tensor:
        """The data as signals `(N, C, L)`: up to 4 channels stay apart, all else is one signal."""
        x = x if self.scaling is None else self.scaling.undo(x)
        return x if x.dim() == 3 and x.shape[1] <= 4 else x.flatten(1).unsqueeze(1)

    def reconstructions(self, x: Tensor, again: Tensor, title: str) -> plots.Figure:
        """Draws each image above its reconstruction, or other data and theirs in one panel."""
        if self.pictures:
            return plots.reconstructions(self(x), self(again), title=title)
        title += f"\n{'bars' if self.bars else 'grey'}: x; line: reconstruction{self.note}"
        return plots.samples(self(x, again), title=title)


def progress(data: Observed, folder: Path, epochs: int) -> Callable[[Trainer], None]:
    """An `on_epoch` for a trainer, which draws reconstructions of the first validation images.

    It does so after about ten epochs, evenly spread, and writes `progress/epoch_NNN.png`.
    """
    pictured, drawing = spread(epochs, 10), Drawing.of(data)

    def draw(trainer: Trainer) -> None:
        if trainer.epoch not in pictured:
            return
        (folder / "progress").mkdir(exist_ok=True)
        vae, first = trainer.vae, data.validation.first(16)
        x = pixels(first.images)
        with evaluate.evaluating(vae):
            again = vae.reconstruct(x, vae.given(first.y))
        figure = drawing.reconstructions(x, again, f"epoch {trainer.epoch}")
        plots.save(figure, folder / "progress" / f"epoch_{trainer.epoch:03d}.png")

    return draw


def tensorboard(data: Observed, folder: Path, epochs: int) -> Callable[[Trainer], None]:
    """An `on_epoch` for a trainer, which logs the numbers of each epoch for TensorBoard.

    After about 25 epochs, evenly spread, it also logs samples, and reconstructions of the first
    validation images. A resumed run continues the log in its folder; entries of epochs that are
    trained again are replaced.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboard, which pvae's extra [tensorboard] "
            "brings: pip install tensorboard"
        ) from None
    pictured = spread(epochs, 25)
    writers: list[SummaryWriter] = []  # empty before the first epoch, then one

    def log(trainer: Trainer) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=trainer.epoch))
        (writer,) = writers
        for name, value in trainer.history[-1].items():
            writer.add_scalar(name, value, trainer.epoch)
        if trainer.epoch in pictured:
            for name, grid in _grids(trainer.vae, data).items():
                writer.add_image(name, grid, trainer.epoch)
        writer.flush()
        if trainer.epoch == epochs:
            writer.close()

    return log


def _grids(vae: VAE, data: Observed) -> dict[str, Tensor]:
    """Two grids `(C, H, W)`: 16 validation data above their reconstructions, and 16 samples."""
    first, drawing = data.validation.first(16), Drawing.of(data)
    x, y = pixels(first.images), vae.given(first.y)
    with evaluate.evaluating(vae):
        again, drawn = vae.reconstruct(x, y), vae.sample(len(x), y)
    return {
        "reconstructions": make_grid(torch.cat([drawing(x), drawing(again)]), len(x)),
        "samples": make_grid(drawing(drawn), len(x)),
    }


def pictures(
    vae: VAE,
    data: Observed,
    history: Sequence[Mapping[str, float]],
    folder: Path,
    *,
    elbo: float,
    objective: str = "ELBO",
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Saves the figures of a trained pair and returns their paths.

    The figures are reconstructions, samples, interpolations, latents, curves, and the manifold of a
    2-D latent or else traversals. If the pair takes labels, samples are sorted by label, and an
    interpolation stays within one label. If it takes side vectors, both use those of test data.

    Args:
        history: that of the trainer.
        elbo: of the test set, in nats per image.
        objective: the name of the history's column `train_objective`.
        class_names: the names of the labels.
    """
    first, drawing = data.test.first(1000), Drawing.of(data)
    x, y = pixels(first.images), vae.given(first.y)
    labels = first.labels if first.labels is not None and first.labels.dim() == 1 else None
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        means = evaluate.posterior_means(vae.guide, x, y)
        again = vae.reconstruct(x[:32], None if y is None else y[:32])
        title = f"Test {drawing.what}, ELBO {elbo:.2f} nats per {data.unit}"
        figures = {
            "reconstructions": drawing.reconstructions(x[:32], again, title),
            "samples": _samples(vae, y, class_names, drawing),
            "latents": _latents(means, labels, class_names, drawing.what),
            "curves": plots.curves(history, title="Training", objective=objective, unit=data.unit),
        }
        if len(x) > 1:
            figures["interpolations"] = _interpolations(vae, x, labels, y, drawing)
        if means.shape[1] == 2:
            figures["manifold"] = _manifold(vae, y, drawing)
        else:
            figures["traversals"] = _traversals(vae, means, y, drawing)
    for name, figure in tqdm(figures.items(), "pictures", leave=False, disable=None):
        plots.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _samples(
    vae: VAE, y: Tensor | None, names: Sequence[str] | None, drawing: Drawing
) -> plots.Figure:
    what = f"Mean {drawing.what} at draws from the prior"
    if y is None or y.dim() > 1:
        images = vae.sample(64) if y is None else vae.sample(y=y[:64])
        return plots.samples(drawing(images), title=what + drawing.note)
    classes = y.unique()
    return plots.grid(
        drawing(vae.sample(y=classes.repeat(8))),
        len(classes),
        title=f"{what}, a column a label{drawing.note}",
        column_labels=[str(k) if names is None else names[k] for k in classes.tolist()],
    )


def _interpolations(
    vae: VAE,
    x: Tensor,
    labels: Tensor | None,
    y: Tensor | None,
    drawing: Drawing,
    pairs: int = 8,
) -> plots.Figure:
    """Interpolates between `pairs` images and as many others, which have another label if there
    are labels, but the same label if the pair is conditional on it."""
    pairs, within = min(pairs, len(x) - 1), y is not None
    ends = []
    for i in range(pairs):
        later = [
            j
            for j in range(i + 1, len(x))
            if labels is None or (labels[j] == labels[i]).item() == within
        ]
        ends.append(later[(i * 7) % len(later)] if later else i + 1)
    images = vae.interpolate(x[:pairs], x[ends], y=None if y is None else y[:pairs])
    of = " of one label" if within and labels is not None else ""
    images = drawing(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    title = f"Between the posterior means of two test {drawing.what}{of}"
    return plots.interpolations(images, title=title)


def _latents(
    means: Tensor, labels: Tensor | None, names: Sequence[str] | None, what: str
) -> plots.Figure:
    """Draws posterior means `(N, D)`: a 2-D latent, or the first two principal components (or the
    only one)."""
    title = f"Posterior means of test {what}"
    if means.shape[1] == 2:
        return plots.latents(means, labels, names=names, title=title)
    if means.shape[1] == 1 or len(means) == 1:
        means = torch.cat([means[:, :1], torch.zeros_like(means[:, :1])], dim=1)
    centred = (means - means.mean(0)).cpu()
    _, s, v = torch.linalg.svd(centred, full_matrices=len(means) == 1)
    share = 100 * s**2 / (s**2).sum().clamp(min=1e-30)
    shares = [*share.tolist(), 0.0]
    return plots.latents(
        centred @ v[:2].T,
        labels,
        names=names,
        title=f"{title}, two principal components",
        axis_labels=(f"component 1 ({shares[0]:.0f} %)", f"component 2 ({shares[1]:.0f} %)"),
    )


def _manifold(vae: VAE, y: Tensor | None, drawing: Drawing) -> plots.Figure:
    """Draws the decoded plane of a 2-D latent; a conditional pair decodes it with the first `y`."""
    label, size = None if y is None else y[0], 20 if drawing.pictures else 10
    axis = torch.linspace(-2.5, 2.5, size)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # [i, j] = axis[j], axis[i]
    images = vae.decode(z.reshape(-1, 2).to(_device(vae)), label).mean
    images = drawing(images).unflatten(0, (size, size))
    given = "" if label is None or label.dim() else f", label {label}"
    return plots.manifold(images, axis, title=f"Decoded latent plane{given}")


def _traversals(
    vae: VAE,
    means: Tensor,
    y: Tensor | None,
    drawing: Drawing,
    units: int = 10,
    steps: int = 11,
) -> plots.Figure:
    """Moves each of the most active units from -3 to 3, from one image's posterior mean."""
    variances = evaluate.unit_variances(means)
    most = variances.argsort(descending=True)[:units]
    values = torch.linspace(-3, 3, steps)
    z = means[0].repeat(len(most), steps, 1)  # (U, T, D)
    for row, unit in enumerate(most):
        z[row, :, unit] = values.to(z)
    images = vae.decode(z.flatten(0, 1), None if y is None else y[0]).mean
    return plots.traversals(
        drawing(images).unflatten(0, (len(most), steps)),
        values,
        [f"z{unit}  var {variances[unit]:.2f}" for unit in most.tolist()],
        title="The most active units, moved one at a time from one "
        + ("test image" if drawing.pictures else "test datum"),
    )


def _device(vae: VAE) -> torch.device:
    return next(vae.parameters()).device
