"""The numbers of a trained pair: computed by section, with one set of keys, shown as one table.

The end of a run and the full evaluation both take them from here. All are nats per image, means
over images, never over batches.
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
_SUBSET = 1000  # test images of the importance-weighted bound at the end of a run
_ELBO = "A lower bound on log p(x), the log probability or density of x; higher is better."
_IWAE = "A tighter lower bound on log p(x), by {:,} draws for each x of a random subset."
_SAME = "The ELBO of that subset, to compare the two bounds."
_FEW = 0.1  # share of active units below which the table says what usually helps


class Row(NamedTuple):
    """One number: its key in the JSON file, what the table calls it, over how many images, out of
    how many it counts, and in one sentence what it means."""

    key: str
    label: str
    value: Estimate
    images: int | None = None
    digits: int = 2
    out_of: int | None = None
    meaning: str = ""

    def cells(self) -> list[str]:
        """The row as the table shows it.

        >>> Row("elbo", "ELBO", Estimate(-94.054, math.nan), 1000).cells()
        ['ELBO', '-94.05', '', '1,000']
        """
        mean, se = (f"{v:,.{self.digits}f}" if not math.isnan(v) else "" for v in self.value)
        label = self.label if self.out_of is None else f"{self.label}, of {self.out_of:,}"
        return [label, mean, se, "" if self.images is None else f"{self.images:,}"]

    def json(self, count: str = "images") -> dict[str, float | int | str | None]:
        """The row as the file keeps it, with how many it is over under `count`: JSON has no NaN.

        >>> Row("elbo", "ELBO", Estimate(-94.0, math.nan)).json()
        {'label': 'ELBO', 'mean': -94.0, 'se': None, 'images': None}
        """
        mean, se = (None if math.isnan(v) else v for v in self.value)
        return {"label": self.label.strip(), "mean": mean, "se": se, count: self.images}


@dataclass(frozen=True)
class Subject:
    """A trained pair, the data that it is measured on, and the seed of the noise."""

    vae: VAE
    data: Observed
    seed: int = 0
    quiet: bool = False

    def shown(self, split: Split) -> Split:
        """The split as the pair sees it: without labels where it takes no `y`."""
        return split if self.vae.takes_y else Split(split.images, None)

    def over(
        self, split: Split, function: Callable[..., Any], batch_size: int, title: str = ""
    ) -> Any:
        """`function(x, y)` over a split, as `evaluate.over`; `y` is None for a pair without it.

        Several processes share the images, and each has all results.
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
        """What a progress bar is called; nothing where none is wanted."""
        return "" if self.quiet else text

    def subset(self, count: int) -> Split:
        """`count` test images, drawn once at random: the same ones in every run.

        >>> import pvae
        >>> from pvae.data import load, observe
        >>> subject = Subject(pvae.build((1, 28, 28), 2), observe(load("digits"), "dynamic"))
        >>> len(subject.subset(50).images)
        50
        """
        test = self.data.test
        order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))
        chosen = order[:count].sort().values.to(test.images.device)
        images, *rest = test
        return Split(images[chosen], *(None if t is None else t[chosen] for t in rest))


# ---- sections; the full evaluation prints their docstrings ----


def elbo_rows(subject: Subject) -> list[Row]:
    """ELBO: a lower bound on log p(x), at beta = 1, over the whole test set. It is distortion and
    rate together; neither alone says how good a model is.
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
    """What `evaluate.bits_per_dimension` needs: 1 where the likelihood gives probabilities, 256
    where it gives the density of dequantised 8-bit pixels; None where there are no bits.

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
    """IWAE-k: the importance-weighted bound, tighter than the ELBO, of a random subset of the test
    set. It equals log p(x) only as k grows.
    k-hat: the tail of the importance weights. Above 0.7 an image's IWAE-k and its effective sample
    size are not to be believed. Below 0.7 the error of the bound is small, but it keeps a bias.
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
    """k-hat, and how often it is too large; none where no image had weights enough for it."""
    tails = pareto_k[~pareto_k.isnan()]
    if not len(tails):
        return []
    above = (tails > evaluate.UNRELIABLE).to(tails)
    return [
        Row(key, f"{indent}Pareto k-hat", estimate(tails), len(tails)),
        Row(f"{key}_above", f"{indent}share of k-hat above 0.7", estimate(above), len(tails)),
    ]


def codes(subject: Subject, split: Split, title: str = "") -> Tensor:
    """The posterior means of a split, `(N, D)`: of the first latent."""
    guide = subject.vae.guide
    return subject.over(split, lambda x, y: evaluate.posterior_means(guide, x, y), BATCH, title)


def unit_rows(means: Tensor) -> list[Row]:
    """How many units are active, of posterior means `(N, D)`."""
    active = Estimate(float(evaluate.active_units(means)), math.nan)
    what = "Units whose posterior mean varies with x: its variance is above 0.01."
    return [Row("active_units", "active units", active, len(means), 0, means.shape[1], what)]


def end_of_run(subject: Subject) -> list[Row]:
    """The test set's numbers at the end of a run.

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


# ---- shown and kept ----


def table(rows: Sequence[Row], subject: Subject, name: str) -> str:
    """The rows as text, with what they are and on which data; `name` is that of the data set."""
    title, cells = heading(subject, name), [row.cells() for row in rows]
    head = ["", "mean", "se", subject.data.units]
    return "\n".join([tables.columns(title, head, cells), *remarks(rows)])


def heading(subject: Subject, name: str) -> str:
    """What the rows are, and on which data; `name` is that of the data set."""
    what = f"{name} test set, {subject.data.label}; nats per {subject.data.unit} and their se"
    if not subject.vae.normalized:
        what += "\n  p(x|z) is not a likelihood: compare these numbers with no other likelihood's"
    return what


def remarks(rows: Sequence[Row]) -> list[str]:
    """What to say where the latents are hardly used."""
    found = [row for row in rows if row.key == "active_units" and row.images != 1]
    texts = [collapse(row.value.mean, row.out_of or 0) for row in found]
    return [text for text in texts if text]


def collapse(active: float, units: int) -> str:
    """A warning where fewer than a tenth of the units are active, or none; else nothing.

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
    """The rows by key, as results.json and evaluation.json keep them under "numbers"; `count` says
    what they are over, "images" or "data"."""
    return {row.key: row.json(count) for row in rows}


# the keys of version 0.1, and the sign by which its numbers differ
_OLD = {
    "test_elbo": ("elbo", 1),
    "test_reconstruction": ("distortion", -1),
    "test_kl": ("rate", 1),
    "iwae_500": ("iwae_500", 1),
    "active_units": ("active_units", 1),
    "bits_per_dimension": ("bits_per_dimension", 1),
}


def read(path: str | os.PathLike[str]) -> dict[str, Estimate]:
    """The numbers of a results.json or evaluation.json by key, those of version 0.1 too.

    Raises:
        ValueError: the file is not one of them.
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
    """A number as JSON keeps it: None where it is none."""
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
