r"""Other objectives than the ELBO: another likelihood, regularizer or reconstruction error.

Four pairs have the same networks, data and seed, and stock SVI trains each of them:

    fixed scale      E_q[log N(x; loc(z), 0.1^2)]         - KL(q(z|x) || p(z))
    scale from net   E_q[log N(x; loc(z), scale(z)^2)]    - KL(q(z|x) || p(z))
    MMD              E_q[log N(x; loc(z), 0.1^2)]         - lambda MMD^2(q(z), p(z))
    own error        E_q[-w e(x, m(z))]                   - KL(q(z|x) || p(z))

The second pair learns where it is unsure: pixels along the strokes get a wide scale, the background
a narrow one. Pixels are dequantised and the scale has a floor; else the density would be unbounded.

The third pair leaves each q(z|x) free, and pulls their mixture over the batch, the aggregate q(z),
to the prior, by samples. This regularizer is no sum over images, so it is outside the data plate.

The fourth pair has its own error e, here of pixels and of the image's slopes in both directions,

    e(x, m) = sum c(x - m) + sum c(dx/dh - dm/dh) + sum c(dx/dw - dm/dw),
    c(t) = sqrt(t^2 + 0.001^2).

Here exp(-w e) does not integrate to 1 over x. Its integral over all real x is the same for every m,
as e depends on x - m alone, but it is not known. Over pixels in [0, 1], or for an error that does
not depend on x - m alone, the integral even changes with z, and then there is no p(x|z). So the
number that is optimized is no bound on log p(x), and its weight w against the KL is a free choice.
All four pairs can be compared by squared error, KL, active units, and MMD^2 to the prior.

The pairs are composed by hand and are not kept.

Sources: InfoVAE: Balancing Learning and Inference in Variational Autoencoders (2017),
arXiv:1706.02262; Wasserstein Auto-Encoders (2017), arXiv:1711.01558; the scale from a network: What
Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision? (2017), arXiv:1703.04977.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pvae
from pvae import Conditional, Guide, Model, cli, data, evaluate, plots, tables
from pvae.heads import Head, Normal, NormalFixedScale
from pvae.nets import MLP
from pvae.objectives import inverse_multiquadric, mmd
from pvae.priors import StandardNormal
from pvae.programs import Program
from pvae.study import Study, start

SCALE = 0.1  # of pixels in [0, 1], where it is fixed
DRAWS = 2000  # the most draws for the reported MMD^2


class AggregateModel(Program):
    """p(z) p(x|z) and, once for the batch, `-weight MMD^2` between its latents and the prior."""

    def __init__(self, prior: StandardNormal, likelihood: nn.Module, weight: float) -> None:
        super().__init__()
        self.prior, self.likelihood, self.weight = prior, likelihood, weight

    def forward(self, x: Tensor) -> None:
        self.register()
        prior = self.prior()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", self.likelihood(z), obs=x)
        discrepancy = latent_mmd(z, prior.sample((len(x),)))
        pyro.factor("mmd", -self.weight * len(x) * discrepancy)  # `weight` nats an image


class ErrorModel(Program):
    """p(z) and, for each image, `-weight e(x, decoder(z))` in place of log p(x|z)."""

    def __init__(
        self,
        prior: StandardNormal,
        decoder: Conditional,
        error: Callable[[Tensor, Tensor], Tensor],
        weight: float,
    ) -> None:
        super().__init__()
        self.prior, self.decoder, self.error, self.weight = prior, decoder, error, weight

    def forward(self, x: Tensor) -> None:
        self.register()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.factor("x", -self.weight * self.error(x, self.decoder(z)))


def latent_mmd(z: Tensor, prior_draws: Tensor) -> Tensor:
    """MMD^2 of latents `(N, D)`; the kernel is as wide as two draws of N(0, I) are apart."""
    return mmd(z, prior_draws, inverse_multiquadric(math.sqrt(2 * z.shape[1])))


def slope_error(x: Tensor, m: Tensor) -> Tensor:
    """e(x, m) of the module's docstring, `(*, C, H, W) -> (*,)`."""
    t = x - m
    parts = (t, t.diff(dim=-2), t.diff(dim=-1))
    smooth = [(part.square() + 0.001**2).sqrt().sum((-3, -2, -1)) for part in parts]
    return torch.stack(smooth).sum(0)


class Pair(NamedTuple):
    """A model to train with its guide, and the functions to evaluate it afterwards."""

    model: Any  # a Program
    guide: Guide
    kl_weight: float
    picture: Callable[[Tensor], Tensor]  # latents (B, D) to images
    bounded: Any  # the Model p(z) p(x|z) whose ELBO is reported, or None


def pairs(args: argparse.Namespace, mean_image: Tensor) -> dict[str, Pair]:
    """The four pairs of the module's docstring, all with the same seed."""
    shape, latent_dim = mean_image.shape, args.latent_dim
    prior = StandardNormal(latent_dim)

    def guide() -> Guide:
        pyro.set_rng_seed(args.seed)
        head = Normal((latent_dim,))
        return Guide(Conditional(MLP(shape, head.param_shape), head, event_dim=3))

    def decoder(head: Head) -> MLP:
        net = MLP((latent_dim,), head.param_shape)
        net.set_output_bias(head.raw_mean(mean_image))
        return net

    def bounded(head: Head) -> Model:
        return Model(prior, Conditional(decoder(head), head, event_dim=1))

    def gaussian(guide: Guide, model: Model) -> Pair:
        return Pair(model, guide, 1.0, lambda z: model.likelihood(z).mean, model)

    fixed = NormalFixedScale(shape, scale=SCALE)
    made = {
        "fixed scale": gaussian(guide(), bounded(fixed)),
        "scale from net": gaussian(guide(), bounded(Normal(shape, min_scale=0.01))),
    }
    q, p = guide(), bounded(fixed)
    aggregate = AggregateModel(prior, p.likelihood, args.mmd_weight)
    made["MMD"] = gaussian(q, p)._replace(model=aggregate, kl_weight=0.0)
    q, m = guide(), Conditional(decoder(fixed), nn.Identity(), event_dim=1)
    made["own error"] = Pair(ErrorModel(prior, m, slope_error, args.error_weight), q, 1.0, m, None)
    return made


def fit(name: str, pair: Pair, observed: data.Observed, args: argparse.Namespace) -> None:
    """Trains by stock SVI; a `kl_weight` of 0 leaves log p(z) and log q(z|x) out."""
    steps = args.num_epochs * math.ceil(len(observed.train.images) / args.batch_size)
    adam = torch.optim.Adam(
        [*pair.model.parameters(), *pair.guide.parameters()], args.learning_rate
    )
    schedule = CosineAnnealingLR(adam, steps)
    svi = SVI(pair.model, pair.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    with tqdm(total=steps, desc=name, leave=False, disable=args.quiet or None) as bar:
        for epoch in range(args.num_epochs):
            for x, _ in observed.batches(args.batch_size, seed=args.seed, epoch=epoch):
                with pvae.temper(pair.kl_weight):
                    svi.step(x)
                schedule.step()
                bar.update()


class AtDraw(NamedTuple):
    """Results for each image: one draw of z ~ q(z|x) `(B, D)`, the mean of q, KL(q || p), and the
    squared error of the picture at this mean."""

    z: Tensor
    mean: Tensor
    kl: Tensor
    squared_error: Tensor


def measured(pair: Pair, test: data.Split, seed: int) -> dict[str, float | None]:
    """Means over the test images; the ELBO is None for a pair without one."""
    prior = pair.model.prior()

    def at_draw(x: Tensor, y: Tensor | None) -> AtDraw:
        q = pair.guide.posterior(x)
        squared_error = (pair.picture(q.mean) - x).square().sum((1, 2, 3))
        kl = torch.distributions.kl_divergence(q, prior)
        return AtDraw(q.sample(), q.mean, kl, squared_error)

    over = partial(evaluate.over, test, batch_size=500, seed=seed)
    with evaluate.evaluating(pair.model, pair.guide):
        at = over(at_draw)
    z = at.z[:DRAWS]
    with evaluate.fixed_noise(z.device, seed + 1):  # other noise than that of z
        discrepancy = latent_mmd(z, prior.sample((len(z),))).item()
    elbo = None
    if pair.bounded is not None:
        elbo = over(lambda x, y: evaluate.elbo(pair.bounded, pair.guide, x).elbo).mean().item()
    return {
        "elbo": elbo,
        "squared_error": at.squared_error.mean().item(),
        "kl": at.kl.mean().item(),
        "mmd_squared": discrepancy,
        "active_units": evaluate.active_units(at.mean),
    }


@torch.no_grad()
def drawn(made: dict[str, Pair], numbers: dict[str, Any], x: Tensor, seed: int) -> Figure:
    """The images `(N, C, H, W)`, then the reconstructions and the samples of each pair."""
    rows = {"x": x}
    for name, pair in made.items():
        z = pair.guide.posterior(x).mean
        rows[f"{name}\nsquared error {numbers[name]['squared_error']:.1f}"] = pair.picture(z)
        if name == "scale from net":
            scale = pair.bounded.likelihood(z).stddev
            rows["its scale,\nwhite: 0.5 and above"] = scale / 0.5
    with evaluate.fixed_noise(x.device, seed):
        z = torch.randn(len(x), z.shape[1], device=x.device)
    for name, pair in made.items():
        rows[f"{name},\nz from the prior"] = pair.picture(z)
    return plots.grid(
        torch.cat(list(rows.values())).clamp(0, 1),
        len(x),
        title="Test images, reconstructions, and pictures at the same draws from the prior",
        row_labels=list(rows),
    )


def table(numbers: dict[str, Any], study: Study) -> str:
    rows = []
    for name, of in numbers.items():
        elbo = "none" if of["elbo"] is None else f"{of['elbo']:.1f}"
        cells = [elbo, f"{of['squared_error']:.2f}", f"{of['kl']:.1f}", f"{of['mmd_squared']:.5f}"]
        rows.append([name, *cells, f"{of['active_units']} of {study.args.latent_dim}"])
    draws = min(DRAWS, len(study.data.test.images))
    title = (
        f"{study.dataset.name} test set, {study.data.label}, per image; MMD^2 of {draws:,} draws\n"
        "  (own error: exp(-w e) is not a likelihood, so there is no ELBO to compare)"
    )
    header = ["", "ELBO, nats", "squared error", "KL, nats", "MMD^2 to prior", "active units"]
    return tables.columns(title, header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    for name in ("mmd_weight", "error_weight"):
        if getattr(args, name) < 0:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be at least 0, not {getattr(args, name):g}")
    study = start(args, "beyond_elbo", "dequantized")
    made = pairs(args, study.dataset.mean_image)
    numbers: dict[str, Any] = {}
    for name, pair in made.items():
        nn.ModuleList([pair.model, pair.guide]).to(study.device)
        fit(name, pair, study.data, args)
        numbers[name] = measured(pair, study.data.test, args.seed)
    x = data.pixels(study.data.test.first(10).images)
    study.save(numbers, beyond_elbo=drawn(made, numbers, x, args.seed))
    print(table(numbers, study))
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("Another likelihood, regularizer and reconstruction error.")
    parser.set_defaults(learning_rate=1e-3)
    group = parser.add_argument_group("model and guide")
    cli.option(group, "--latent-dim", "of z", cli.NATURAL, 16, "D")
    cli.option(group, "--mmd-weight", "lambda of the MMD, nats", float, 5000.0, "L")
    cli.option(group, "--error-weight", "w of the own error", float, 5.0, "W")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main)
