"""The numbers of a trained pair: computed by section, with one set of keys, shown as one table.

The end of a run and the full evaluation both take their numbers from here. Bounds are in nats per
image; all means are over images, never over batches.
"""

import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae import evaluate, processes, tables
from pvae.builder import LIKELIHOODS
from pvae.data import Observed, Split
from pvae.evaluate import Estimate, estimate
from pvae.untrusted import read_json
from pvae.vae import VAE

BATCH = 200  # images of one evaluated batch; larger ones do not fit the processor's cache
_SUBSET = 1000  # test images for the importance-weighted bound at the end of a run
_ELBO = "A lower bound on log p(x), the log probability or density of x; higher is better."
_IWAE = "A tighter lower bound on log p(x), by {:,} draws for each x of a random subset."
_SAME = "The ELBO of that subset, to compare the two bounds."
_FEW = 0.1  # below this share of active units, a warning says what usually helps


class Row(NamedTuple):
    """One number of the table.

    Args:
        key: its key in the JSON file.
        label: its name in the table.
        value: its mean and standard error.
        images: the number of images that the mean is over.
        digits: the number of decimals in the table.
        out_of: of a count, the largest that it can be.
        meaning: one sentence that says what the number means.
    """

    key: str
    label: str
    value: Estimate
    images: int | None = None
    digits: int = 2
    out_of: int | None = None
    meaning: str = ""

    def cells(self) -> list[str]:
        """The row as text for the table: label, mean, standard error, number of images.

        >>> Row("elbo", "ELBO", Estimate(-94.054, math.nan), 1000).cells()
        ['ELBO', '-94.05', '', '1,000']
        """
        mean, se = (f"{v:,.{self.digits}f}" if not math.isnan(v) else "" for v in self.value)
        label = self.label if self.out_of is None else f"{self.label}, of {self.out_of:,}"
        return [label, mean, se, "" if self.images is None else f"{self.images:,}"]

    def json(self, count: str = "images") -> dict[str, float | int | str | None]:
        """The row for the JSON file, where None replaces NaN; `count` is the key of `images`.

        >>> Row("elbo", "ELBO", Estimate(-94.0, math.nan)).json()
        {'label': 'ELBO', 'mean': -94.0, 'se': None, 'images': None}
        """
        mean, se = (None if math.isnan(v) else v for v in self.value)
        return {"label": self.label.strip(), "mean": mean, "se": se, count: self.images}


@dataclass(frozen=True)
class Subject:
    """A trained pair, the data that it is measured on, and the seed of the noise.

    `quiet` switches progress bars off.
    """

    vae: VAE
    data: Observed
    seed: int = 0
    quiet: bool = False

    def shown(self, split: Split) -> Split:
        """The split that the pair gets: without labels and masks if the pair takes no `y`."""
        return split if self.vae.takes_y else Split(split.images, None)

    def over(
        self, split: Split, function: Callable[..., Any], batch_size: int, title: str = ""
    ) -> Any:
        """`function(x, y)` over a split, as `evaluate.over` computes it.

        `y` is None if the pair takes none. Several processes share the images, and each of them
        gets all results.
        """
        images, *rest = self.shown(split)
        part = processes.part(len(images))
        found = evaluate.over(
            Split(images[part], *(None if t is None else t[part] for t in rest)),
            function,
            batch_size=batch_size,
            seed=processes.seed(self.seed),
            title=self.title(title),
        )
        if isinstance(found, Tensor):
            return processes.gather(found, len(images))
        return type(found)(*(processes.gather(t, len(images)) for t in found))

    def title(self, text: str) -> str:
        """The title of a progress bar; "", which means no bar, if the subject is quiet."""
        return "" if self.quiet else text

    def subset(self, count: int) -> Split:
        """`count` test images, drawn once at random: the same ones in every run.

        >>> import pvae
        >>> from pvae.data import load, observe
        >>> subject = Subject(pvae.build((1, 28, 28), 2), observe(load("digits"), "dynamic"))
        >>> len(subject.subset(50).images)
        50
        """
        chosen = self.chosen(count)
        images, *rest = self.data.test
        return Split(images[chosen], *(None if t is None else t[chosen] for t in rest))

    def chosen(self, count: int) -> Tensor:
        """The indices of the test images of `subset`, in rising order, `(count,)`."""
        images = self.data.test.images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return order[:count].sort().values.to(images.device)


# ---- sections; the full evaluation prints their docstrings ----


def elbo_rows(subject: Subject) -> list[Row]:
    """ELBO: a lower bound on log p(x), at beta = 1, over the whole test set. It is minus the sum of
    distortion and rate; neither of the two alone says how good a model is.
    """
    pair, test = (subject.vae.model, subject.vae.guide), subject.data.test
    bound = subject.over(test, lambda x, y: evaluate.elbo(*pair, x, y), BATCH, "ELBO")
    n = len(test.images)
    rows = [
        Row("elbo", "ELBO", estimate(bound.elbo), n, meaning=_ELBO),
        Row(
            "distortion",
            "  distortion, -E_q log p(x|z)",
            estimate(-bound.reconstruction),
            n,
            meaning="What it costs to describe x by a draw of its code; lower is better.",
        ),
        Row(
            "rate",
            "  rate, KL(q(z|x) || p(z))",
            estimate(bound.kl),
            n,
            meaning="What the code tells of x: how far the posterior is from the prior.",
        ),
    ]
    levels = grey_levels(subject.vae, subject.data)
    if levels is not None:
        pixels = test.images[0].numel()
        bits = evaluate.bits_per_dimension(bound.elbo, pixels, levels=levels)
        what = "The ELBO of one element of x, in bits and with its sign turned; lower is better."
        key, label = "bits_per_dimension", "  bits per dimension"
        rows.append(Row(key, label, estimate(bits), n, 4, meaning=what))
    return rows


def grey_levels(vae: VAE, data: Observed) -> int | None:
    """The number of levels that `evaluate.bits_per_dimension` needs.

    It is 1 if the likelihood gives probabilities, 256 if it gives the density of dequantised 8-bit
    pixels, and None if bits per dimension are not defined.

    >>> import pvae
    >>> from pvae.data import load, observe
    >>> grey_levels(pvae.build(likelihood="categorical"), observe(load("digits"), "grey"))
    1
    """
    if vae.recipe is None or not vae.normalized:
        return None
    if LIKELIHOODS[vae.recipe.likelihood].data != "continuous":
        return 1
    return 256 if data.how == "dequantized" else None


def importance_rows(
    subject: Subject, images: int, num_samples: int, compiler: Any = None
) -> list[Row]:
    """IWAE-k: the importance-weighted bound with k draws, tighter than the ELBO, on a random subset
    of the test set. It approaches log p(x) only as k grows.
    k-hat: the shape of the tail of the importance weights. Above 0.7, do not trust the image's
    IWAE-k and effective sample size. Below 0.7 the error of the bound is small, but a bias remains.
    """
    split, k = subject.subset(images), num_samples
    pair = subject.vae.model, subject.vae.guide
    sampler = evaluate.ImportanceSampler(*pair, num_samples=k, compiler=compiler)
    found = subject.over(split, sampler, 20, f"IWAE-{k:,}")
    elbo = subject.over(split, lambda x, y: evaluate.elbo(*pair, x, y).elbo, BATCH)
    n = len(split.images)
    return [
        Row(f"iwae_{k}", f"IWAE-{k:,}", estimate(found.log_evidence), n, meaning=_IWAE.format(k)),
        Row("iwae_elbo", "  ELBO of the same subset", estimate(elbo), n, meaning=_SAME),
        Row("ess", "  effective sample size", estimate(found.ess), n, 1, k),
        *tail_rows(found.pareto_k, "pareto_k", "  "),
    ]


def tail_rows(pareto_k: Tensor, key: str, indent: str) -> list[Row]:
    """The mean k-hat, and the share of images whose k-hat is too large; no rows if no image had
    enough weights to compute it."""
    tails = pareto_k[~pareto_k.isnan()]
    if not len(tails):
        return []
    above = (tails > evaluate.UNRELIABLE).to(tails)
    return [
        Row(key, f"{indent}Pareto k-hat", estimate(tails), len(tails)),
        Row(f"{key}_above", f"{indent}share of k-hat above 0.7", estimate(above), len(tails)),
    ]


def codes(subject: Subject, split: Split, title: str = "") -> Tensor:
    """The posterior means of the first latent for a split, `(N, D)`."""
    guide = subject.vae.guide
    return subject.over(split, lambda x, y: evaluate.posterior_means(guide, x, y), BATCH, title)


def unit_rows(means: Tensor) -> list[Row]:
    """The number of active units, from posterior means `(N, D)`."""
    active = Estimate(float(evaluate.active_units(means)), math.nan)
    what = "Units whose posterior mean varies with x: its variance is above 0.01."
    return [Row("active_units", "active units", active, len(means), 0, means.shape[1], what)]


def end_of_run(subject: Subject) -> list[Row]:
    """The numbers on the test set at the end of a run.

    >>> import pvae
    >>> from pvae.data import load, observe
    >>> vae = pvae.build((1, 28, 28), latent_dim=2, net="mlp", hidden=8)
    >>> rows = end_of_run(Subject(vae, observe(load("digits"), "dynamic"), quiet=True))
    >>> [row.key for row in rows]
    ['elbo', 'distortion', 'rate', 'bits_per_dimension', 'iwae_100', 'iwae_elbo', 'active_units']
    """
    bound, of_same_images, *_ = importance_rows(subject, _SUBSET, 100)
    units = unit_rows(codes(subject, subject.data.test))
    return [*elbo_rows(subject), bound, of_same_images, *units]


# ---- rows as text and as JSON ----


def table(rows: Sequence[Row], subject: Subject, name: str) -> str:
    """The rows as text, under a heading; `name` is that of the data set."""
    title, cells = heading(subject, name), [row.cells() for row in rows]
    head = ["", "mean", "se", subject.data.units]
    return "\n".join([tables.columns(title, head, cells), *remarks(rows)])


def heading(subject: Subject, name: str) -> str:
    """The heading: what the rows are, and of which data; `name` is that of the data set."""
    what = f"{name} test set, {subject.data.label}; nats per {subject.data.unit} and their se"
    if not subject.vae.normalized:
        what += "\n  p(x|z) is not a likelihood: compare these numbers with no other likelihood's"
    return what


def remarks(rows: Sequence[Row]) -> list[str]:
    """The warnings about rows, such as that the pair hardly uses its latents."""
    found = [row for row in rows if row.key == "active_units" and row.images != 1]
    texts = [collapse(row.value.mean, row.out_of or 0) for row in found]
    return [text for text in texts if text]


def collapse(active: float, units: int) -> str:
    """A warning if no unit, or fewer than a tenth of the units, is active; else "".

    >>> collapse(4, 32)
    ''
    """
    if active >= max(1, _FEW * units):
        return ""
    return (
        f"warning: {active:.0f} of {units} units are active: the pair hardly uses z. A lower "
        "learning rate, a longer KL warm-up or free bits usually help"
    )


def as_json(rows: Sequence[Row], count: str = "images") -> dict[str, Any]:
    """The rows by key, as results.json and evaluation.json keep them under "numbers"; `count` is
    the word for what the means are over, "images" or "data"."""
    return {row.key: row.json(count) for row in rows}


# the keys of version 0.1: today's key, and the sign that turns its number into today's
_OLD = {
    "test_elbo": ("elbo", 1),
    "test_reconstruction": ("distortion", -1),
    "test_kl": ("rate", 1),
    "iwae_500": ("iwae_500", 1),
    "active_units": ("active_units", 1),
    "bits_per_dimension": ("bits_per_dimension", 1),
}


def read(path: str | os.PathLike[str]) -> dict[str, Estimate]:
    """The numbers of a results.json or evaluation.json by key; it reads files of version 0.1 too.

    Raises:
        ValueError: the file is not one of these files.
    """
    try:
        content = read_json(path)
        if "numbers" not in content:
            return _of_version_0_1(content)
        return {
            key: Estimate(*(_number(row[name]) for name in ("mean", "se")))
            for key, row in content["numbers"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} holds no results of a run: {error!r}") from error


def _number(value: Any) -> float:
    """A number from JSON as a float; NaN for None."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise TypeError(f"a number must be one, not {reprlib.repr(value)}")
    return float(value)


def _of_version_0_1(content: Mapping[str, Any]) -> dict[str, Estimate]:
    return {
        key: Estimate(sign * _number(content[old]), _number(content.get(f"{old}_se")))
        for old, (key, sign) in _OLD.items()
        if old in content or old == "test_elbo"
    }
