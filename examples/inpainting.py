r"""Missing pixels: a VAE trained on parts of images, which then completes them.

Pixels are independent given z, so missing pixels integrate to 1 and drop out of the likelihood,

    log p(x_seen) >= E_q(z|x_seen)[ sum_{i seen} log p(x_i|z) ] - KL(q(z|x_seen) || p(z)).

`Masked` is this likelihood in Pyro (a mask on the pixels, inside `to_event`). The encoder takes
zeros in place of the missing pixels, and the mask as a further plane. In the programs the mask
takes the place of a label, model(x, mask) and guide(x, mask); in the data it is `Split.mask`. The
missing pixels follow from

    p(x_missing | x_seen)  ~  E_q(z|x_seen)[ p(x_missing|z) ],

and draws of z give different completions where the seen pixels leave a choice.

The program trains one pair for each way in which pixels are missing. Each training image misses the
same pixels in every epoch, and nothing uses these pixels. They must be missing at random: a mask
that depends on the hidden values would have to be modelled too.

Each pair has its own run folder. The pair is composed by hand and has no recipe: build it again by
`masked_vae`, and give the state in best.pt to `pvae.checkpoint.restore`.

Sources: MIWAE: Deep Generative Modelling and Imputation of Incomplete Data (2018),
arXiv:1812.02633; Handling Incomplete Heterogeneous Data using VAEs (2018), arXiv:1807.03653.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pvae
from pvae import Conditional, Guide, Masked, Model, cli, concat_mask, data, evaluate, plots, tables
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.study import Study, fit, start

Missing = Callable[[Tensor], Tensor]  # images (N, C, H, W) to a mask (N, 1, H, W), True where seen


def at_random(images: Tensor, *, fraction: float) -> Tensor:
    """Each pixel is missing with this probability."""
    shape = (len(images), 1, *images.shape[2:])
    return torch.rand(shape, device=images.device) >= fraction


def a_half(images: Tensor) -> Tensor:
    """The upper, lower, left or right half of each image is missing."""
    n, _, height, width = images.shape
    mask = torch.ones(n, 1, height, width, dtype=torch.bool, device=images.device)
    side = torch.randint(4, (n,), device=images.device)
    mask[side == 0, :, : height // 2] = False
    mask[side == 1, :, height // 2 :] = False
    mask[side == 2, ..., : width // 2] = False
    mask[side == 3, ..., width // 2 :] = False
    return mask


WAYS: Mapping[str, Missing] = {
    "nothing": partial(at_random, fraction=0.0),
    "25 %": partial(at_random, fraction=0.25),
    "50 %": partial(at_random, fraction=0.5),
    "75 %": partial(at_random, fraction=0.75),
    "a half": a_half,
}


def with_masks(observed: data.Observed, missing: Missing) -> data.Observed:
    """The data set with a mask for each image."""
    train, validation, test = (
        split._replace(mask=missing(split.images))
        for split in (observed.train, observed.validation, observed.test)
    )
    return replace(observed, train=train, validation=validation, test=test)


def masked_vae(mean_image: Tensor, latent_dim: int, hidden: int = 400) -> pvae.VAE:
    """p(z) p(x_seen | z) and q(z | x_seen), one hidden layer each way."""
    channels, height, width = mean_image.shape
    x_head, z_head = Bernoulli(mean_image.shape), Normal((latent_dim,))
    encoder = MLP((channels + 1, height, width), z_head.param_shape, (hidden,))
    decoder = MLP((latent_dim,), x_head.param_shape, (hidden,))
    decoder.set_output_bias(x_head.raw_mean(mean_image))
    likelihood = Masked(Conditional(decoder, x_head, event_dim=1))
    posterior = Conditional(encoder, z_head, event_dim=3, join=concat_mask)
    return pvae.VAE(Model(StandardNormal(latent_dim), likelihood), Guide(posterior))


class Parts(NamedTuple):
    """Results for each image, `(B,)`: the ELBO on its seen pixels and on all pixels,
    E_q log p(missing | z), and the numbers of seen and missing pixels."""

    elbo: Tensor
    complete_elbo: Tensor
    missing_log_prob: Tensor
    seen: Tensor
    missing: Tensor


def measured(vae: pvae.VAE, test: data.Split, seed: int) -> dict[str, float | None]:
    """Means over the test images and their masks."""

    def parts(x: Tensor, mask: Tensor | None) -> Parts:
        assert mask is not None
        z = vae.encode(x, mask).sample((16,))
        every = torch.ones_like(mask)
        return Parts(
            evaluate.elbo(vae.model, vae.guide, x, mask).elbo,
            evaluate.elbo(vae.model, vae.guide, x, every).elbo,
            vae.decode(z, ~mask).log_prob(x).mean(0),
            mask.expand_as(x).sum((1, 2, 3)).double(),
            (~mask).expand_as(x).sum((1, 2, 3)).double(),
        )

    with evaluate.evaluating(vae):
        of = evaluate.over(test, parts, batch_size=500, seed=seed)
    missing = of.missing.sum()
    return {
        "seen_elbo": of.elbo.mean().item(),
        "seen_elbo_per_pixel": (of.elbo.sum() / of.seen.sum()).item(),
        "missing_per_pixel": (of.missing_log_prob.sum() / missing).item() if missing else None,
        "complete_elbo": of.complete_elbo.mean().item(),
    }


def train(study: Study, name: str) -> tuple[pvae.VAE, data.Observed]:
    """Trains the pair for one way of missing pixels; returns it, and the data with masks."""
    args = study.args
    pyro.set_rng_seed(args.seed)
    part = study.part(name.replace(" ", "_"))
    part = replace(part, data=with_masks(study.data, WAYS[name]))
    vae = masked_vae(study.dataset.mean_image, args.latent_dim).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    fit(part, vae, svi).restore_best()
    return vae, part.data


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    study = start(args, "inpainting", "dynamic")
    numbers: dict[str, Any] = {}
    blocks: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name in WAYS:
        if not args.quiet:
            print(f"missing: {name}")
        vae, observed = train(study, name)
        numbers[name] = measured(vae, observed.test, args.seed)
        if name in ("75 %", "a half"):
            blocks[name] = completed(vae, observed.test, args.seed)
    x = data.pixels(study.data.test.images)
    mean_image = study.dataset.mean_image.to(x).clamp(0.001, 0.999)
    alone = torch.distributions.Bernoulli(mean_image).log_prob(x).mean().item()
    numbers |= {"mean_image_per_pixel": alone, "seconds": study.seconds}
    study.save(numbers, inpainting=drawn(blocks))
    print(table(numbers, study))
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


def table(numbers: Mapping[str, Any], study: Study) -> str:
    columns = {
        "seen_elbo": ("ELBO, seen pixels", ".2f"),
        "seen_elbo_per_pixel": ("a seen pixel", ".4f"),
        "missing_per_pixel": ("E_q log p(x|z) a missing pixel", ".4f"),
        "complete_elbo": ("ELBO, complete images", ".2f"),
    }
    rows = []
    for name in WAYS:
        cells = [(numbers[name][key], how) for key, (_, how) in columns.items()]
        rows.append([name, *("none" if v is None else f"{v:{how}}" for v, how in cells)])
    return tables.columns(
        f"{study.dataset.name} test set, {len(study.data.test.images):,} images, "
        f"{study.data.label}; nats; pixels missing as in training\n  (a pixel of the mean image: "
        f"{numbers['mean_image_per_pixel']:.4f})",
        ["missing", *(label for label, _ in columns.values())],
        rows,
    )


def completed(
    vae: pvae.VAE, test: data.Split, seed: int, count: int = 14, draws: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """The seen pixels `(N, C, H, W)`, grey where missing; the mean images at draws of z,
    `(draws, N, C, H, W)`; and the whole images."""
    first = test.first(count)
    x, mask = data.pixels(first.images), first.mask
    assert mask is not None
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        z = vae.encode(x, mask).sample((draws,))
        means = vae.decode(z, mask).mean
    return x.where(mask, torch.full_like(x, 0.5)), means, x


def drawn(blocks: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Figure:
    rows, labels = [], []
    for name, (given, draws, truth) in blocks.items():
        rows += [given, *draws, truth]
        labels += [f"seen, {name} missing", *(f"draw {i + 1}" for i in range(len(draws))), "truth"]
    return plots.grid(
        torch.cat(rows),
        len(rows[0]),
        title="What is seen of test images, and the mean images at draws of q(z | x_seen)",
        row_labels=labels,
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("Missing pixels, in training and in use.", resumable=True)
    group = parser.add_argument_group("model and guide")
    cli.option(group, "--latent-dim", "of z", cli.NATURAL, 16, "D")
    return cli.resumed(parser, argv)


if __name__ == "__main__":
    cli.run_main(main)
