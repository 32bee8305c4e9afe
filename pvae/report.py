"""The end of a run: its numbers as a table, its pictures as files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import evaluate, plots
from pvae.builder import LIKELIHOODS
from pvae.data import Observed, Split, pixels
from pvae.vae import VAE

OBSERVED = {  # what a model is shown, in words
    "grey": "grey",
    "threshold": "thresholded",
    "static": "statically binarised",
    "dynamic": "dynamically binarised (one fixed draw)",
    "dequantized": "dequantised",
}


def results(
    vae: VAE, data: Observed, *, labels: bool = False, seed: int = 0, quiet: bool = False
) -> dict[str, float]:
    """The test set's numbers, nats per image: the ELBO and its terms, the importance-weighted
    bound (k = 500) of the first 1,000 images with its standard error, and active units; the ELBO in
    bits per dimension where the data is discrete.

    >>> import pvae
    >>> from pvae.data import load, observe
    >>> vae = pvae.build((1, 28, 28), latent_dim=2, net="mlp", hidden=8)
    >>> numbers = results(vae, observe(load("digits"), "dynamic"), quiet=True)
    >>> numbers["test_elbo"] < numbers["iwae_500"]
    True
    """

    def label(y: Tensor | None) -> Tensor | None:
        return y if labels else None

    def over(function: Callable, split: Split, batch_size: int, title: str) -> Any:
        return evaluate.over(
            split, function, batch_size=batch_size, seed=seed, title="" if quiet else title
        )

    pair = (vae.model, vae.guide)
    bound = over(lambda x, y: evaluate.elbo(*pair, x, label(y)), data.test, 500, "test ELBO")
    images, y = data.test
    first = Split(images[:1000], None if y is None else y[:1000])
    iwae = evaluate.estimate(
        over(
            lambda x, y: evaluate.importance_weighted(*pair, x, label(y), num_samples=500),
            first,
            20,
            "importance-weighted bound",
        )
    )
    means = over(lambda x, y: evaluate.posterior_means(vae.guide, x, label(y)), data.test, 500, "")
    numbers = {
        "test_elbo": bound.elbo.mean().item(),
        "test_reconstruction": bound.reconstruction.mean().item(),
        "test_kl": bound.kl.mean().item(),
        "iwae_500": iwae.mean,
        "iwae_500_se": iwae.se,
        "active_units": int((evaluate.unit_variances(means) > 0.01).sum()),
    }
    grey = levels(vae, data)
    if grey is not None:
        bits = evaluate.bits_per_dimension(bound.elbo, images[0].numel(), levels=grey)
        numbers["bits_per_dimension"] = bits.mean().item()
    return numbers


def levels(vae: VAE, data: Observed) -> int | None:
    """What `evaluate.bits_per_dimension` needs: 1 where the likelihood gives probabilities, 256
    where it gives the density of dequantised 8-bit pixels; None where there are no bits.

    >>> import pvae
    >>> from pvae.data import load, observe
    >>> levels(pvae.build(likelihood="categorical"), observe(load("digits"), "grey"))
    1
    """
    if vae.recipe is None:
        return None
    if LIKELIHOODS[vae.recipe["likelihood"]].data != "grey":
        return 1
    return 256 if data.how == "dequantized" else None


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A titled table of two columns, as text.

    >>> print(table("test", [("ELBO", "-94.1"), ("KL", "25")]))
    test
      ELBO   -94.1
      KL        25
    """
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join([title, *(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)])


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table with a header, as text: the first column to the left, numbers to the right.

    >>> print(columns("gradients", ["L", "variance"], [["1", "9.1"], ["10", "0.9"]]))
    gradients
      L   variance
      1        9.1
      10       0.9
    """
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    lines = [title]
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *others]))
    return "\n".join(lines)


def results_table(numbers: Mapping[str, float], data: Observed, name: str, latent_dim: int) -> str:
    """The numbers of `results`, with what they are and on which data."""
    images = len(data.test.images)
    rows = [
        ("ELBO", f"{numbers['test_elbo']:.2f}"),
        ("  reconstruction, E_q log p(x|z)", f"{numbers['test_reconstruction']:.2f}"),
        ("  KL(q(z|x) || p(z))", f"{numbers['test_kl']:.2f}"),
        (
            f"IWAE-500 bound, first {min(1000, images):,} images",
            f"{numbers['iwae_500']:.2f} ± {numbers['iwae_500_se']:.2f}",
        ),
        ("active units", f"{numbers['active_units']} of {latent_dim}"),
    ]
    if "bits_per_dimension" in numbers:
        rows.insert(1, ("  bits per dimension", f"{numbers['bits_per_dimension']:.3f}"))
    what = f"{name} test set, {images:,} images, {OBSERVED[data.how]}, nats per image"
    return table(what, rows)


# ---- pictures ----


def progress_picture(
    vae: VAE, data: Observed, epoch: int, folder: Path, *, labels: bool = False
) -> None:
    """Saves the reconstructions of the first validation images as `progress/epoch_NNN.png`."""
    (folder / "progress").mkdir(exist_ok=True)
    x, y = _first(data.validation, 16)
    with evaluate.evaluating(vae):
        again = _shown(vae.reconstruct(x, y if labels else None))
        figure = plots.reconstructions(x, again, title=f"epoch {epoch}")
    plots.save(figure, folder / "progress" / f"epoch_{epoch:03d}.png")


def pictures(
    vae: VAE,
    data: Observed,
    history: Sequence[Mapping[str, float]],
    folder: Path,
    numbers: Mapping[str, float],
    *,
    labels: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Saves the figures of a trained pair and returns their paths: reconstructions, samples,
    the manifold of a 2-D latent or else traversals, interpolations, latents and curves.

    `history` is the trainer's, `numbers` come from `results`. `labels` is for a conditional pair:
    samples by label, and interpolations within one.
    """
    x, y = _first(data.test, 1000)
    given = y if labels else None
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        means = evaluate.posterior_means(vae.guide, x, given)
        again = _shown(vae.reconstruct(x[:32], None if given is None else given[:32]))
        figures = {
            "reconstructions": plots.reconstructions(
                x[:32], again, title=f"Test images, ELBO {numbers['test_elbo']:.2f} nats per image"
            ),
            "samples": _samples(vae, given),
            "interpolations": _interpolations(vae, x, y, labels),
            "latents": _latents(means, y),
            "curves": plots.curves(history, title="Training"),
        }
        if means.shape[1] == 2:
            figures["manifold"] = _manifold(vae, given)
        else:
            figures["traversals"] = _traversals(vae, means, given)
    for name, figure in tqdm(figures.items(), "pictures", leave=False, disable=None):
        plots.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _shown(images: Tensor) -> Tensor:
    """A Gaussian's mean may lie outside what can be shown."""
    return images.clamp(0, 1)


def _first(split: Split, n: int) -> tuple[Tensor, Tensor | None]:
    return pixels(split.images[:n]), None if split.labels is None else split.labels[:n]


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
    vae: VAE, x: Tensor, y: Tensor | None, labels: bool, pairs: int = 8
) -> plots.Figure:
    """Between `pairs` images and as many others: of other labels where there are labels, but of
    the same one where the pair is conditional on it."""
    pairs = min(pairs, len(x) - 1)
    ends = []
    for i in range(pairs):
        later = [j for j in range(i + 1, len(x)) if y is None or (y[j] == y[i]).item() == labels]
        ends.append(later[(i * 7) % len(later)] if later else i + 1)
    images = vae.interpolate(x[:pairs], x[ends], y=y[:pairs] if labels and y is not None else None)
    of = " of one label" if labels else ""
    return plots.interpolations(
        _shown(images), title=f"Between the posterior means of two test images{of}"
    )


def _latents(means: Tensor, y: Tensor | None) -> plots.Figure:
    """Posterior means: the plane itself, or its two principal components (or the one there is)."""
    if means.shape[1] == 2:
        return plots.latents(means, y, title="Posterior means of test images")
    if means.shape[1] == 1:
        means = torch.cat([means, torch.zeros_like(means)], dim=1)
    centred = means - means.mean(0)
    _, s, v = torch.linalg.svd(centred.cpu(), full_matrices=False)
    share = 100 * s**2 / (s**2).sum()
    return plots.latents(
        centred.cpu() @ v[:2].T,
        y,
        title="Posterior means of test images, two principal components",
        axis_labels=(f"component 1 ({share[0]:.0f} %)", f"component 2 ({share[1]:.0f} %)"),
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
