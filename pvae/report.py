"""The pictures of a run, as files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import evaluate, plots
from pvae.data import Observed, pixels
from pvae.train import Trainer, spread
from pvae.vae import VAE


def progress(data: Observed, folder: Path, epochs: int) -> Callable[[Trainer], None]:
    """What draws, after about ten epochs spread over all, the reconstructions of the first
    validation images: a trainer's `on_epoch`, which leaves `progress/epoch_NNN.png`."""
    pictured = spread(epochs, 10)

    def draw(trainer: Trainer) -> None:
        if trainer.epoch not in pictured:
            return
        (folder / "progress").mkdir(exist_ok=True)
        vae, first = trainer.vae, data.validation.first(16)
        x = pixels(first.images)
        with evaluate.evaluating(vae):
            again = _shown(vae.reconstruct(x, vae.given(first.y)))
        figure = plots.reconstructions(x, again, title=f"epoch {trainer.epoch}")
        plots.save(figure, folder / "progress" / f"epoch_{trainer.epoch:03d}.png")

    return draw


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
    """Saves the figures of a trained pair and returns their paths: reconstructions, samples,
    the manifold of a 2-D latent or else traversals, interpolations, latents and curves.

    `history` is the trainer's and `objective` the name of its training column; `elbo` is the test
    set's, in nats per image; `class_names` say what the labels stand for. Of a pair that takes
    labels the samples are by label, and interpolations stay within one.
    """
    first = data.test.first(1000)
    x, y = pixels(first.images), vae.given(first.y)
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        means = evaluate.posterior_means(vae.guide, x, y)
        again = _shown(vae.reconstruct(x[:32], None if y is None else y[:32]))
        title = f"Test images, ELBO {elbo:.2f} nats per image"
        figures = {
            "reconstructions": plots.reconstructions(x[:32], again, title=title),
            "samples": _samples(vae, y),
            "latents": _latents(means, first.labels, class_names),
            "curves": plots.curves(history, title="Training", objective=objective),
        }
        if len(x) > 1:
            figures["interpolations"] = _interpolations(vae, x, first.labels, y)
        if means.shape[1] == 2:
            figures["manifold"] = _manifold(vae, y)
        else:
            figures["traversals"] = _traversals(vae, means, y)
    for name, figure in tqdm(figures.items(), "pictures", leave=False, disable=None):
        plots.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _shown(images: Tensor) -> Tensor:
    """A Gaussian's mean may lie outside what can be shown."""
    return images.clamp(0, 1)


def _samples(vae: VAE, y: Tensor | None) -> plots.Figure:
    if y is None:
        return plots.samples(_shown(vae.sample(64)), title="Mean images at draws from the prior")
    classes = y.unique()
    return plots.grid(
        _shown(vae.sample(y=classes.repeat(8))),
        len(classes),
        title="Mean images at draws from the prior, a column a label",
        column_labels=[str(label) for label in classes.tolist()],
    )


def _interpolations(
    vae: VAE, x: Tensor, labels: Tensor | None, y: Tensor | None, pairs: int = 8
) -> plots.Figure:
    """Between `pairs` images and as many others: of other labels where there are labels, but of
    the same one where the pair is conditional on it."""
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
    of = " of one label" if within else ""
    return plots.interpolations(
        _shown(images), title=f"Between the posterior means of two test images{of}"
    )


def _latents(means: Tensor, labels: Tensor | None, names: Sequence[str] | None) -> plots.Figure:
    """Posterior means: the plane itself, or its two principal components (or the one there is)."""
    if means.shape[1] == 2:
        return plots.latents(means, labels, names=names, title="Posterior means of test images")
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
        title="Posterior means of test images, two principal components",
        axis_labels=(f"component 1 ({shares[0]:.0f} %)", f"component 2 ({shares[1]:.0f} %)"),
    )


def _manifold(vae: VAE, y: Tensor | None, size: int = 20) -> plots.Figure:
    """The plane of a conditional pair is that of the first label of `y`."""
    label = None if y is None else y[0]
    axis = torch.linspace(-2.5, 2.5, size)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # [i, j] = axis[j], axis[i]
    images = vae.decode(z.reshape(-1, 2).to(_device(vae)), label).mean
    images = _shown(images).reshape(size, size, *images.shape[1:])
    given = "" if label is None else f", label {label}"
    return plots.manifold(images, axis, title=f"Decoded latent plane{given}")


def _traversals(
    vae: VAE, means: Tensor, y: Tensor | None, units: int = 10, steps: int = 11
) -> plots.Figure:
    """The most active units, each moved through the prior's range from one image's posterior."""
    variances = evaluate.unit_variances(means)
    most = variances.argsort(descending=True)[:units]
    values = torch.linspace(-3, 3, steps)
    z = means[0].repeat(len(most), steps, 1)  # (U, T, D)
    for row, unit in enumerate(most):
        z[row, :, unit] = values.to(z)
    images = vae.decode(z.flatten(0, 1), None if y is None else y[0]).mean
    return plots.traversals(
        _shown(images).reshape(len(most), steps, *images.shape[1:]),
        values,
        [f"z{unit}  var {variances[unit]:.2f}" for unit in most.tolist()],
        title="The most active units, moved one at a time from one test image",
    )


def _device(vae: VAE) -> torch.device:
    return next(vae.parameters()).device
