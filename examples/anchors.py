r"""Compares the estimates of `pvae.evaluate` with numbers that are known exactly.

The model is linear, z ~ N(0, I) in two dimensions and x|z ~ N(W z, s^2 I), so log p(x) and p(z|x)
are known. The guide is this posterior with its standard deviations multiplied by c. Then

- the importance-weighted bound E log 1/k sum_i w_i is the ELBO at k = 1, does not fall with k, and
  reaches log p(x);
- the tail index of the weights is 1 - c^2 for c < 1, since P(w > t) = P(|z|^2 > 2 ln t / (1/c^2
  - 1)). So k-hat exposes a guide that is too narrow (above 0.7 its bound is not reliable); a guide
  that is too wide (c > 1) has bounded weights;
- annealing from the prior gives two bounds with log p(x) between them: forward on images drawn from
  the model, and backward from the latents that made these images;
- NUTS draws from p(z|x).

On the data set itself the known number is that of a collapsed model. A Bernoulli decoder that
ignores z has at best sum_i m_i ln m_i + (1 - m_i) ln(1 - m_i) with the mean image m, in expectation
over binarisations: -206.0 nats on MNIST's 60,000 images.

Sources: Importance Weighted Autoencoders (2015), arXiv:1509.00519; Yes, but did it work? (2018),
arXiv:1802.02538; Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015),
arXiv:1511.02543; The No-U-Turn Sampler (2011), arXiv:1111.4246.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pvae
from pvae import cli, evaluate, tables
from pvae.closed_form import LinearGaussian, collapsed
from pvae.heads import NormalFixedScale
from pvae.priors import StandardNormal
from pvae.study import start

EXACT = LinearGaussian(
    torch.tensor([[1.6, 1.0], [-0.4, 1.2], [0.9, -0.2], [0.5, 0.6]]), torch.zeros(4), 0.8
)
BLUE, RED, PURPLE = "#3f90da", "#bd1f01", "#832db6"
Row = dict[str, Any]  # of a table


class Posterior(nn.Module):
    """q(z|x): the exact posterior with its standard deviations multiplied by `c`."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.scale_tril = c * torch.linalg.cholesky(torch.linalg.inv(EXACT.precision))

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(EXACT.posterior_loc(x), scale_tril=self.scale_tril)


def linear_model() -> pvae.Model:
    """The Pyro program of `EXACT`."""
    decoder = nn.Linear(2, 4, bias=False).requires_grad_(False)
    decoder.weight.copy_(EXACT.weight)
    likelihood = nn.Sequential(decoder, NormalFixedScale((4,), scale=EXACT.scale))
    return pvae.Model(StandardNormal(2), likelihood)


def bounds(model: pvae.Model, x: Tensor, c: float) -> list[Row]:
    """log p(x) - IWAE-k, means over `x`, against k."""
    guide, exact, rows = pvae.Guide(Posterior(c)), EXACT.log_evidence(x), []
    for k in (1, 2, 5, 10, 30, 100, 300, 1000):
        found = evaluate.importance_weighted(model, guide, x, num_samples=k)
        rows.append({"k": k, **evaluate.estimate(exact - found)._asdict()})
    return rows


def tails(model: pvae.Model, x: Tensor) -> list[Row]:
    """k-hat against the width c of the guide."""
    rows = []
    for c in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2):
        guide = pvae.Guide(Posterior(c))
        found = evaluate.ImportanceSampler(model, guide, num_samples=2000)(x)
        k_hat, ess = found.pareto_k.nanmean().item(), found.ess.mean().item() / 2000
        rows.append({"c": c, "pareto_k": k_hat, "theory": 1 - c**2, "ess": ess})
    return rows


def sandwiches(model: pvae.Model, x: Tensor) -> list[Row]:
    """Both bounds of annealing minus log p(x), against the number of temperatures."""
    made, rows = evaluate.simulate(model, x), []
    exact = EXACT.log_evidence(made.x)
    for steps in (3, 5, 10, 20, 50, 100):
        anneal = evaluate.Annealer(model, num_temperatures=steps, num_leapfrogs=5, num_chains=1)
        row: Row = {"temperatures": steps}
        for key, found in (("lower", anneal(made.x)), ("upper", anneal.back(made))):
            row[key], row[f"{key}_se"] = evaluate.estimate(found.log_evidence - exact)
        rows.append(row)
    return rows


def column(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows]


def figure(results: Mapping[str, Any], draws: Tensor, x: Tensor) -> Figure:
    """Four panels, one for each law; the titles give the results."""
    drawn = Figure((9.5, 7.4), dpi=110, layout="constrained")
    (one, two), (three, four) = drawn.subplots(2, 2)
    left = []  # log p(x) minus the last bound
    for c, colour in (("0.5", RED), ("1.5", BLUE)):
        rows = results["bounds"][c]
        k, mean, se = (column(rows, key) for key in ("k", "mean", "se"))
        label = f"guide of c = {c}"
        one.errorbar(k, mean, [2 * s for s in se], marker=".", color=colour, label=label)
        left.append(f"{round(mean[-1], 3) + 0:.3f} nats (c = {c})")  # + 0: never -0.000
    one.axhline(0, color="0.6", linestyle="--")
    one.set(xscale="log", xlabel="k", ylabel="log p(x) - IWAE-k, nats")
    one.set_title(f"IWAE-1,000 lacks {', '.join(left)}", fontsize=10)

    rows = results["tails"]
    narrow = [r for r in rows if r["c"] < 1]
    two.plot(column(narrow, "c"), column(narrow, "theory"), color="0.5", label="1 - c² (exact)")
    two.plot(column(rows, "c"), column(rows, "pareto_k"), "o", color=PURPLE, label="k-hat")
    two.axhline(evaluate.UNRELIABLE, color=RED, linestyle="--", label="0.7")
    two.set(xlabel="c, width of the guide", ylabel="tail index of the weights", ylim=(-1, 1.1))
    exposed = [f"{r['c']}" for r in rows if r["pareto_k"] > evaluate.UNRELIABLE]
    two.set_title(f"k-hat is above 0.7 for c = {', '.join(exposed) or 'none'}", fontsize=10)

    rows = results["annealing"]
    for key, label, colour in (("upper", "backward", RED), ("lower", "forward", BLUE)):
        error = [2 * se for se in column(rows, f"{key}_se")]
        at, bound = column(rows, "temperatures"), column(rows, key)
        three.errorbar(at, bound, error, marker=".", color=colour, label=label)
    three.axhline(0, color="0.6", linestyle="--")
    three.set(xscale="log", xlabel="temperatures", ylabel="bound - log p(x), nats")
    low, high = rows[-1]["lower"], rows[-1]["upper"]
    title = f"100 temperatures: bounds {low:+.3f} and {high:+.3f} off log p(x)"
    three.set_title(title, fontsize=10)

    four.scatter(*draws.T.numpy(), s=3, alpha=0.5, linewidths=0, color=BLUE, label="NUTS")
    angle = torch.linspace(0, 2 * torch.pi, 100)
    circle = torch.stack([angle.cos(), angle.sin()])
    for scale in (1, 2):
        line = EXACT.posterior_loc(x).T + scale * Posterior(1.0).scale_tril @ circle
        four.plot(*line.numpy(), color="black", linewidth=1, label="exact" if scale == 1 else None)
    four.set(xlabel="z0", ylabel="z1", aspect="equal")
    four.set_title("NUTS and p(z|x): 1 and 2 standard deviations", fontsize=10)
    for axes in (one, two, three, four):
        axes.legend(fontsize=8)
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def collapsed_figure(mean: Tensor, name: str) -> Figure:
    """The mean image, and the cost of each of its pixels."""
    cost = -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum(0)  # over channels
    drawn = Figure((7.5, 3.6), dpi=110, layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.imshow(mean.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    left.set_title("All that a collapsed model says: m", fontsize=10)
    shown = right.imshow(cost.numpy(), cmap="viridis", vmin=0)
    drawn.colorbar(shown, ax=right, label="nats")
    right.set_title(f"What each pixel costs, {cost.sum():.1f} nats in all", fontsize=10)
    drawn.suptitle(f"{name}: the best model that ignores z", fontsize=11)
    for axes in (left, right):
        axes.set_axis_off()
    return drawn


def shown(results: Mapping[str, Any]) -> str:
    """The three tables."""
    parts = [
        tables.columns(
            f"log p(x) - IWAE-k, guide of c = {c}, nats per image",
            ["k", "mean", "se"],
            [[f"{r['k']:,}", f"{r['mean']:.4f}", f"{r['se']:.4f}"] for r in rows],
        )
        for c, rows in results["bounds"].items()
    ]
    title = "the weights of 2,000 draws, means over at most 100 images"
    cells = [
        [f"{r['c']}", f"{r['pareto_k']:.2f}", f"{max(r['theory'], 0):.2f}", f"{r['ess']:.3f}"]
        for r in results["tails"]
    ]
    parts.append(tables.columns(title, ["c", "k-hat", "exact", "effective share"], cells))
    title = "annealing less log p(x), nats per image"
    keys = ("lower", "lower_se", "upper", "upper_se")
    cells = [
        [f"{r['temperatures']}", *(f"{r[key]:+.4f}" for key in keys)] for r in results["annealing"]
    ]
    parts.append(tables.columns(title, ["temperatures", "forward", "se", "backward", "se"], cells))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("Known numbers, and what evaluation finds.", training=False)
    cli.option(parser, "--images", "drawn from the linear model", cli.NATURAL, 500, "N")
    cli.option(parser, "--draws", "of NUTS", cli.NATURAL, 1000, "S")
    args = parser.parse_args(argv)
    study = start(args, "anchors", "grey")

    model = linear_model()
    x = evaluate.simulate(model, torch.zeros(args.images, 4)).x
    results: dict[str, Any] = {
        "bounds": {str(c): bounds(model, x, c) for c in (0.5, 1.5)},
        "tails": tails(model, x[:100]),
        "annealing": sandwiches(model, x),
    }
    draws = evaluate.nuts(model, x[:1], num_samples=args.draws, seed=args.seed)["z"]
    images = torch.cat([study.data.train.images, study.data.validation.images])
    # summed as integers, without a float copy of the data set
    mean = images.sum(0).double().cpu() / (255 * len(images))
    results["collapsed"] = collapsed(mean).item()

    print(shown(results))
    name = study.dataset.name
    print(
        f"{name}, {len(images):,} images: the best model that ignores z scores "
        f"{results['collapsed']:.1f} nats per image, in expectation over binarisations"
    )
    study.save(
        results, anchors=figure(results, draws, x[:1]), collapsed=collapsed_figure(mean, name)
    )
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


if __name__ == "__main__":
    cli.run_main(main)
