r"""Numbers that are known, and what evaluation finds: anchors of `pvae.evaluate`.

The model is linear, z ~ N(0, I) in two dimensions and x|z ~ N(W z, s^2 I), so log p(x) and p(z|x)
are known. The guide is that very posterior with its standard deviations times c. Then

- the importance-weighted bound E log 1/k sum_i w_i is the ELBO at k = 1, does not fall with k, and
  reaches log p(x);
- the tail index of the weights is 1 - c^2 where c < 1, since P(w > t) = P(|z|^2 > 2 ln t / (1/c^2
  - 1)): so k-hat exposes a guide that is too narrow (above 0.7 its bound is not to be believed),
  and a guide that is too wide (c > 1) has bounded weights;
- annealing from the prior, forward on images drawn from the model and backward from the latents
  that made them, holds log p(x) between its two bounds;
- NUTS draws from p(z|x).

And on the data set itself, the model that has collapsed: a Bernoulli decoder that ignores z scores
at best sum_i m_i ln m_i + (1 - m_i) ln(1 - m_i) with the mean image m, in expectation over
binarisations: -206.0 nats on MNIST's 60,000 images.

Sources: Importance Weighted Autoencoders (2015), arXiv:1509.00519; Yes, but did it work? (2018),
arXiv:1802.02538; Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015),
arXiv:1511.02543; The No-U-Turn Sampler (2011), arXiv:1111.4246.
"""

import time
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pvae
from pvae import cli, evaluate, plots, report, run
from pvae.closed_form import LinearGaussian, collapsed
from pvae.heads import NormalFixedScale
from pvae.priors import StandardNormal

EXACT = LinearGaussian(
    torch.tensor([[1.6, 1.0], [-0.4, 1.2], [0.9, -0.2], [0.5, 0.6]]), torch.zeros(4), 0.8
)
BLUE, RED, PURPLE = "#3f90da", "#bd1f01", "#832db6"


class Posterior(nn.Module):
    """q(z|x): the exact posterior, its standard deviations times `c`."""

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


def bounds(model: pvae.Model, x: Tensor, c: float) -> list[dict[str, float]]:
    """log p(x) - IWAE-k, means over `x`, against k."""
    guide, exact, rows = pvae.Guide(Posterior(c)), EXACT.log_evidence(x), []
    for k in (1, 2, 5, 10, 30, 100, 300, 1000):
        found = evaluate.importance_weighted(model, guide, x, num_samples=k)
        rows.append({"k": k, **evaluate.estimate(exact - found)._asdict()})
    return rows


def tails(model: pvae.Model, x: Tensor) -> list[dict[str, float]]:
    """k-hat against the width c of the guide."""
    rows = []
    for c in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2):
        guide = pvae.Guide(Posterior(c))
        found = evaluate.importance_sampling(model, guide, x, num_samples=2000)
        rows.append(
            {
                "c": c,
                "pareto_k": found.pareto_k.nanmean().item(),
                "theory": 1 - c**2,
                "ess": found.ess.mean().item() / 2000,
            }
        )
    return rows


def sandwiches(model: pvae.Model, x: Tensor) -> list[dict[str, float]]:
    """Both bounds of annealing less log p(x), against the number of temperatures."""
    made, rows = evaluate.simulate(model, x), []
    exact = EXACT.log_evidence(made.x)
    for steps in (3, 5, 10, 20, 50, 100):
        settings: Any = {"num_temperatures": steps, "num_leapfrogs": 5, "num_chains": 1}
        lower = evaluate.annealed(model, made.x, **settings).log_evidence - exact
        upper = evaluate.annealed_back(model, made, **settings).log_evidence - exact
        low, high = evaluate.estimate(lower), evaluate.estimate(upper)
        rows.append(
            {
                "temperatures": steps,
                "lower": low.mean,
                "lower_se": low.se,
                "upper": high.mean,
                "upper_se": high.se,
            }
        )
    return rows


def figure(results: dict[str, Any], draws: Tensor, x: Tensor) -> Figure:
    """Four panels, one for each law."""
    drawn = Figure((9.5, 7.4), dpi=110, layout="constrained")
    (one, two), (three, four) = drawn.subplots(2, 2)
    for c, colour in (("0.5", RED), ("1.5", BLUE)):
        rows = results["bounds"][c]
        one.errorbar(
            [r["k"] for r in rows],
            [r["mean"] for r in rows],
            [2 * r["se"] for r in rows],
            marker=".",
            color=colour,
            label=f"guide of c = {c}",
        )
    one.axhline(0, color="0.6", linestyle="--")
    one.set(xscale="log", xlabel="k", ylabel="log p(x) - IWAE-k, nats")
    one.set_title("The bound rises to log p(x)", fontsize=10)
    one.legend(fontsize=8)

    rows = results["tails"]
    narrow = [r for r in rows if r["c"] < 1]
    two.plot(
        [r["c"] for r in narrow], [r["theory"] for r in narrow], color="0.5", label="1 - c² (exact)"
    )
    two.plot(
        [r["c"] for r in rows], [r["pareto_k"] for r in rows], "o", color=PURPLE, label="k-hat"
    )
    two.axhline(evaluate.UNRELIABLE, color=RED, linestyle="--", label="0.7")
    two.set(xlabel="c, width of the guide", ylabel="tail index of the weights", ylim=(-1, 1.1))
    two.set_title("k-hat exposes a guide that is too narrow", fontsize=10)
    two.legend(fontsize=8)

    rows = results["annealing"]
    for key, label, colour in (("upper", "backward", RED), ("lower", "forward", BLUE)):
        three.errorbar(
            [r["temperatures"] for r in rows],
            [r[key] for r in rows],
            [2 * r[f"{key}_se"] for r in rows],
            marker=".",
            color=colour,
            label=label,
        )
    three.axhline(0, color="0.6", linestyle="--")
    three.set(xscale="log", xlabel="temperatures", ylabel="bound - log p(x), nats")
    three.set_title("Annealing holds log p(x) between two bounds", fontsize=10)
    three.legend(fontsize=8)

    four.scatter(*draws.T.numpy(), s=3, alpha=0.5, linewidths=0, color=BLUE, label="NUTS")
    angle = torch.linspace(0, 2 * torch.pi, 100)
    circle = torch.stack([angle.cos(), angle.sin()])
    for scale in (1, 2):
        line = EXACT.posterior_loc(x).T + scale * Posterior(1.0).scale_tril @ circle
        four.plot(*line.numpy(), color="black", linewidth=1, label="exact" if scale == 1 else None)
    four.set(xlabel="z0", ylabel="z1", aspect="equal")
    four.set_title("NUTS and p(z|x): 1 and 2 standard deviations", fontsize=10)
    four.legend(fontsize=8)
    for axes in (one, two, three, four):
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def collapsed_figure(mean: Tensor, name: str) -> Figure:
    """The mean image, and what each of its pixels costs."""
    cost = -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum(0)  # over channels
    drawn = Figure((7.5, 3.6), dpi=110, layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.imshow(mean.movedim(0, -1).squeeze(-1), cmap="gray", vmin=0, vmax=1)
    left.set_title("All that a collapsed model says: m", fontsize=10)
    shown = right.imshow(cost, cmap="viridis", vmin=0)
    drawn.colorbar(shown, ax=right, label="nats")
    right.set_title(f"What each pixel costs, {cost.sum():.1f} nats in all", fontsize=10)
    drawn.suptitle(f"{name}: the best model that ignores z", fontsize=11)
    for axes in (left, right):
        axes.set_axis_off()
    return drawn


def main() -> None:
    parser = cli.study_parser("Known numbers, and what evaluation finds.", training=False)
    parser.add_argument("--images", type=cli.NATURAL, default=500, metavar="N", help="drawn")
    parser.add_argument("--draws", type=cli.NATURAL, default=1000, metavar="S", help="of NUTS")
    args = parser.parse_args()
    start = time.perf_counter()
    study = cli.start_study(args, "anchors", "grey")

    model = linear_model()
    x = evaluate.simulate(model, torch.zeros(args.images, 4)).x
    results: dict[str, Any] = {
        "bounds": {str(c): bounds(model, x, c) for c in (0.5, 1.5)},
        "tails": tails(model, x[:100]),
        "annealing": sandwiches(model, x),
    }
    draws = evaluate.nuts(model, x[:1], num_samples=args.draws, seed=args.seed)["z"]
    images = torch.cat([study.observed.train.images, study.observed.validation.images])
    mean = images.double().mean(0).cpu() / 255
    results["collapsed"] = collapsed(mean).item()

    for c, rows in results["bounds"].items():
        print(
            report.columns(
                f"log p(x) - IWAE-k, guide of c = {c}, nats per image",
                ["k", "mean", "se"],
                [[f"{r['k']:,}", f"{r['mean']:.4f}", f"{r['se']:.4f}"] for r in rows],
            )
        )
    print(
        report.columns(
            "the weights of 2,000 draws, means over 100 images",
            ["c", "k-hat", "exact", "effective share"],
            [
                [
                    f"{r['c']}",
                    f"{r['pareto_k']:.2f}",
                    f"{max(r['theory'], 0):.2f}",
                    f"{r['ess']:.3f}",
                ]
                for r in results["tails"]
            ],
        )
    )
    print(
        report.columns(
            "annealing less log p(x), nats per image",
            ["temperatures", "forward", "se", "backward", "se"],
            [
                [f"{r['temperatures']}"]
                + [f"{r[key]:+.4f}" for key in ("lower", "lower_se", "upper", "upper_se")]
                for r in results["annealing"]
            ],
        )
    )
    print(
        f"{study.dataset.name}, {len(images):,} images: the best model that ignores z scores "
        f"{results['collapsed']:.1f} nats per image, in expectation over binarisations"
    )
    plots.save(figure(results, draws, x[:1]), study.folder / "anchors.png")
    plots.save(collapsed_figure(mean, study.dataset.name), study.folder / "collapsed.png")
    run.write_json(study.folder / "results.json", results)
    print(f"{time.perf_counter() - start:.0f} s; pictures and numbers: {study.folder}/")


if __name__ == "__main__":
    cli.run_main(main)
