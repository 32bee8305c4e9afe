"""What the ELBO is: a lower bound on log p(x), below it by KL(q(z|x) || p(z|x)).

For every q, with the expectation over z ~ q(z|x),

    log p(x) = E[log p(x, z) - log q(z|x)] + E[log q(z|x) - log p(z|x)]
             =            ELBO             +    KL(q(z|x) || p(z|x)),

The KL is at least 0, and it is 0 if q is the posterior. Then log p(x, z) - log q(z|x) = log p(x) is
the same number for every z, and the estimate from one draw has no variance.

To see both terms we need a model whose evidence and posterior are known. The VAE with a linear
decoder is such a model: z ~ N(0, I), x|z ~ N(W z + mu, s^2 I). Here it is probabilistic PCA of the
data set's images at 7x7 pixels. Its latent axes are rotated at random, so that the posterior is
correlated. The rotation R does not change the evidence (z and R z have the same prior), but a
mean-field guide can no longer reach it. Stock SVI, given only the model, trains two linear guides:

    mean-field        q = N(A x + b, diag(v))    the gap closes to a KL known in closed form
    full covariance   q = N(A x + b, L L^T)      the gap closes to 0

Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114; Probabilistic principal component
analysis (1999), J. R. Statist. Soc. B 61; Don't blame the ELBO! (2019), arXiv:1911.02469.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

import pvae
from pvae import cli, data, evaluate, heads, tables
from pvae.closed_form import LinearGaussian
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.study import Study, start


class SharedCovariance(heads.Head):
    """`N(loc, L L^T)`: the loc is from the network; `L` `(D, D)` is learned and the same for all x,
    as in p(z|x). `L` is 0 where `mask` is 0; the mask `torch.eye(D)` makes a mean-field family."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__((len(mask),), 1)
        self.register_buffer("mask", mask, persistent=False)
        self.raw = nn.Parameter(torch.zeros_like(mask))  # the diagonal in logs

    def forward(self, h: Tensor) -> dist.Distribution:
        scale_tril = (self.raw * self.mask).tril(-1) + self.raw.diagonal().exp().diag()
        return dist.MultivariateNormal(h, scale_tril=scale_tril)


def linear_model(exact: LinearGaussian, image_shape: Sequence[int]) -> pvae.Model:
    """The Pyro program of `exact`; its parameters are not trained."""
    latent_dim = exact.weight.shape[1]
    decoder = MLP((latent_dim,), image_shape, hidden=()).to(exact.weight.dtype)
    with torch.no_grad():
        decoder.out.weight.copy_(exact.weight)
        decoder.out.bias.copy_(exact.mean)
    head = heads.NormalFixedScale(image_shape, scale=exact.scale)
    likelihood = pvae.Conditional(decoder.requires_grad_(False), head, event_dim=1)
    return pvae.Model(StandardNormal(latent_dim), likelihood).eval()


def linear_guide(head: heads.Head, image_shape: Sequence[int]) -> pvae.Guide:
    """The Pyro program q(z|x), whose raw parameters are linear in x, like those of p(z|x)."""
    encoder = MLP(image_shape, head.param_shape, hidden=())
    return pvae.Guide(pvae.Conditional(encoder, head, event_dim=3))


def small(x: Tensor) -> Tensor:
    """Images `(B, C, H, W)` averaged down to `(B, C, 7, 7)`."""
    return adaptive_avg_pool2d(x, 7)


def small_images(split: data.Split) -> Tensor:
    """All images of a split at 7x7, in float64, without a float copy of the large images."""
    return torch.cat([small(x).double() for x, _ in data.chunks(split, 5000)])


def turned(exact: LinearGaussian) -> LinearGaussian:
    """The same p(x) with the latent axes rotated at random: W R for an orthogonal R."""
    rotation, _ = torch.linalg.qr(torch.randn_like(exact.precision))
    return LinearGaussian(exact.weight @ rotation, exact.mean, exact.scale)


@torch.no_grad()
def measure(
    exact: LinearGaussian, model: pvae.Model, guide: pvae.Guide, x: Tensor
) -> dict[str, float]:
    """The ELBO and the KL, in closed form and float64, and the standard deviation of Pyro's ELBO
    from one draw; nats per image, means over the images `x`."""
    q = guide.posterior(x)
    given = x.cpu().double(), q.loc.cpu().double(), q.scale_tril.cpu().double()
    elbo, gap = exact.elbo(*given), exact.gap(*given)
    # with k = 1 the importance-weighted bound is log p(x, z) - log q(z|x) at one draw
    draws = [evaluate.importance_weighted(model, guide, x, num_samples=1) for _ in range(16)]
    return {
        "elbo": elbo.mean().item(),
        "kl": gap.mean().item(),
        "log_evidence": exact.log_evidence(given[0]).mean().item(),
        "error": (elbo + gap - exact.log_evidence(given[0])).abs().max().item(),
        "draw_sd": torch.stack(draws).std(0).mean().item(),
    }


def train(
    exact: LinearGaussian, head: heads.Head, study: Study, title: str
) -> list[dict[str, float]]:
    """Trains a guide by stock SVI; returns the numbers of 500 test images over the steps."""
    args, x_test = study.args, small(data.pixels(study.data.test.first(500).images))
    model = linear_model(exact, x_test.shape[1:]).float().to(study.device)
    guide = linear_guide(head, x_test.shape[1:]).to(study.device)
    adam = torch.optim.Adam(guide.parameters(), lr=args.learning_rate)
    svi = SVI(model, guide, pvae.SingleOptimizer(adam), Trace_ELBO(max_plate_nesting=1))

    steps = args.num_epochs * -(-len(study.data.train.images) // args.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)  # to 0: without noise
    watched = {round(steps ** (i / 60)) for i in range(61)}  # evenly in the logarithm
    rows = [{"step": 0, **measure(exact, model, guide, x_test)}]
    batches = (
        x
        for epoch in range(args.num_epochs)
        for x, _ in study.data.batches(args.batch_size, seed=args.seed, epoch=epoch)
    )
    bar = tqdm(batches, title, total=steps, leave=False, disable=args.quiet or None)
    for step, x in enumerate(bar, start=1):
        svi.step(small(x))
        cosine.step()
        if step in watched:
            rows.append({"step": step, **measure(exact, model, guide, x_test)})
    return rows


def table(title: str, rows: Sequence[dict[str, float]]) -> str:
    """Every sixth row, with both sides of the identity: ELBO + KL, and log p(x)."""
    cells = []
    for row in [*rows[:-1:6], rows[-1]]:
        both = row["elbo"] + row["kl"]
        numbers = (row["elbo"], row["kl"], both, row["log_evidence"], row["draw_sd"])
        cells.append([f"{row['step']:,}", *(f"{v:.3f}" for v in numbers)])
    header = ["step", "ELBO", "KL(q || p(z|x))", "ELBO + KL", "log p(x)", "sd of one draw"]
    return tables.columns(title, header, cells)


def figure(curves: dict[str, list[dict[str, float]]], least: dict[str, float]) -> Figure:
    """A column for each family: the bound under the evidence, and the gap between the two."""
    fig = Figure((10, 6), dpi=150, layout="constrained")
    fig.suptitle("log p(x) = ELBO + KL(q(z|x) || p(z|x)): only the guide is trained", fontsize=11)
    above, below = fig.subplots(2, len(curves), sharex=True, sharey="row", height_ratios=[3, 2])
    for top, bottom, (name, rows) in zip(above, below, curves.items(), strict=True):
        steps = [row["step"] for row in rows]
        elbo = [row["elbo"] for row in rows]
        evidence = rows[0]["log_evidence"]
        top.axhline(evidence, color="black", linewidth=1.2, label=f"log p(x) = {evidence:.2f}")
        top.fill_between(steps, elbo, evidence, color="#ffa90e", alpha=0.35, label="KL, the gap")
        top.plot(steps, elbo, color="#3f90da", label=f"ELBO, at the end {elbo[-1]:.2f}")
        top.set_title(f"{name} guide", loc="left", fontsize=10)
        top.legend(fontsize=8, loc="lower right")
        bottom.plot(steps, [row["kl"] for row in rows], color="#e76300", label="KL, closed form")
        bottom.plot(
            steps, [row["draw_sd"] for row in rows], color="0.6", label="sd of one draw of the ELBO"
        )
        if least[name] > 0:
            bottom.axhline(
                least[name],
                color="black",
                linestyle=":",
                label=f"least KL of any mean-field q: {least[name]:.2f}",
            )
        bottom.set_yscale("log")
        bottom.set_xscale("symlog", linthresh=1)
        bottom.set_xlabel("SVI step")
        bottom.legend(fontsize=8, loc="lower left")
    above[0].set_ylabel("nats per image")
    below[0].set_ylabel("nats per image")
    for axes in (*above, *below):
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("What the ELBO is, on a model whose evidence is known.")
    cli.option(parser, "--latent-dim", "latent dimension", cli.NATURAL, 8, "D")
    parser.set_defaults(learning_rate=0.03)
    args = parser.parse_args(argv)
    study = start(args, "elbo", "grey")

    exact = turned(LinearGaussian.fit(small_images(study.dataset.train), args.latent_dim))
    masks = {
        "mean-field": torch.eye(args.latent_dim),
        "full covariance": torch.ones(args.latent_dim, args.latent_dim),
    }
    curves = {n: train(exact, SharedCovariance(m), study, n) for n, m in masks.items()}
    least = {"mean-field": exact.mean_field_gap(), "full covariance": 0.0}

    for name, rows in curves.items():
        print(table(f"{name} guide; nats per grey 7x7 image, means over test images", rows))
        print(f"  the least KL of this family: {least[name]:.3f}")
    error = max(row["error"] for rows in curves.values() for row in rows)
    print(f"ELBO + KL - log p(x), the largest of any image and step: {error:.1e} nats")
    numbers = {"curves": curves, "least_kl": least, "largest_error": error}
    study.save({**numbers, "seconds": study.seconds}, elbo=figure(curves, least))
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


if __name__ == "__main__":
    cli.run_main(main)
