"""What a finished run is worth: every number of `pvae.evaluate` in one table.

    python -m pvae.evaluate runs/mnist_svi

It prints the table, with what each number is and is not, and leaves `evaluation.json` and
`posterior.png` in the folder of the run. The model is the run's best, the images are its test set.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import captured, checkpoint, cli, data, evaluate, memory, plots, report, run
from pvae.data import Observed, Split
from pvae.evaluate import Estimate, estimate
from pvae.vae import VAE

LEGEND = """\
  ELBO: a lower bound on log p(x), at beta = 1. It is distortion and rate together; neither alone
    says how good a model is. IWAE-k: a tighter one, equal to log p(x) only as k grows.
  k-hat: the tail of the importance weights. Above 0.7 an image's IWAE-k and its effective sample
    size are not to be believed; below, the bound's error is small, its bias not nothing.
  AIS: a lower bound in expectation, a check on IWAE-k by other means: its chains leave the guide's
    draws for the posterior. From the prior it does not use the guide at all, and needs many more
    steps. The sandwich is on images drawn from the model, where an upper bound exists too: its
    width is what AIS lacks at most *there*; on real images it is not known.
    IWAE-k by a proposal of its own: a normal with a full covariance, optimized for each image
    alone, draws in the guide's place; what IWAE-k by the guide lacks of it is the guide's fault.
    Where AIS agrees with it, that is evidence that both are near log p(x), not a proof: both are
    lower bounds, and unless AIS is from the prior, both start from the guide.
  gaps: what one encoder for all images costs, and what the family of q does. The first is from
    below, as the factors may not be optimal; the second lacks what IWAE-k lacks of log p(x).
  active units: variance of the posterior mean over images above 0.01; not how much each one says.
  I(x; z): which of these images x is; never above log N, so a lower bound there, and the aggregate
    KL then an upper one.
  probe: accuracies of two classifiers of the posterior means; no measure of the density."""


class Row(NamedTuple):
    """One number: its key in the JSON file, what the table calls it, over how many images."""

    key: str
    label: str
    value: Estimate
    images: int | None = None
    digits: int = 2

    def cells(self) -> list[str]:
        """The row as the table shows it.

        >>> Row("elbo", "ELBO", Estimate(-94.054, math.nan), 1000).cells()
        ['ELBO', '-94.05', '', '1,000']
        """
        mean, se = (f"{v:,.{self.digits}f}" if not math.isnan(v) else "" for v in self.value)
        return [self.label, mean, se, "" if self.images is None else f"{self.images:,}"]

    def json(self) -> dict[str, float | int | str | None]:
        """The row as the file keeps it: JSON has no NaN.

        >>> Row("elbo", "ELBO", Estimate(-94.0, math.nan)).json()
        {'label': 'ELBO', 'mean': -94.0, 'se': None, 'images': None}
        """
        mean, se = (None if math.isnan(v) else v for v in self.value)
        return {"label": self.label.strip(), "mean": mean, "se": se, "images": self.images}


class Task(NamedTuple):
    """A loaded run, and how its evaluation was asked for."""

    vae: VAE
    data: Observed
    labels: bool  # whether the pair is conditional on them
    layers: int  # of latents
    args: argparse.Namespace

    def first(self, images: int) -> Split:
        """The first test images."""
        x, y = self.data.test
        return Split(x[:images], None if y is None else y[:images])

    def over(self, split: Split, function: Any, batch_size: int, title: str) -> Any:
        """`function(x, y)` over a split, `y` the labels of a conditional pair and None else."""
        return evaluate.over(
            split,
            lambda x, y: function(x, y if self.labels else None),
            batch_size=batch_size,
            seed=self.args.seed,
            title=self.title(title),
        )

    def title(self, text: str) -> str:
        return "" if self.args.quiet else text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pvae.evaluate",
        description="What a finished run is worth: one table, and evaluation.json in its folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="folder of the run, such as runs/mnist_svi")
    parser.add_argument("--data-root", metavar="DIR", help="where its data is, if it has moved")
    g = parser.add_argument_group("how much of each; 0 leaves it out")
    for flag, default, text in (
        ("--images", 200, "test images of the importance-weighted bound"),
        ("--annealed-images", 20, "test images of annealed importance sampling"),
        ("--gap-images", 100, "test images of the amortization gap"),
        ("--nuts-samples", 500, "draws of NUTS, for the picture of one image's posterior"),
    ):
        g.add_argument(flag, type=cli.COUNT, default=default, metavar="N", help=text)
    g = parser.add_argument_group("how well")
    for flag, default, text in (
        ("--num-samples", 1000, "draws k of the importance-weighted bound"),
        ("--temperatures", 200, "steps of annealing"),
        ("--chains", 1, "of annealing, for each image"),
    ):
        g.add_argument(flag, type=cli.NATURAL, default=default, metavar="N", help=text)
    g.add_argument(
        "--from-prior",
        action="store_true",
        help="anneal from the prior: the guide plays no part, but many more steps are needed",
    )
    g.add_argument(
        "--captured",
        action="store_true",
        help="compile the weights of IWAE-k by the guide, which pays for a million draws and more",
    )
    g = parser.add_argument_group("run")
    g.add_argument("--image", type=cli.COUNT, default=0, metavar="I", help="test image for NUTS")
    g.add_argument("--seed", type=cli.COUNT, default=0, help="seed of everything random")
    g.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device"
    )
    g.add_argument("--quiet", action="store_true", help="no progress, only the results")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Task, str]:
    """The run's best model and its data, and the data's name.

    Raises:
        ValueError: the folder is not that of a run, or the data found is not the run's.
    """
    config = run.read_config(args.run)
    device = cli.device(args.device)
    named = config["arguments"].get("dataset") or config["dataset"]["name"]
    root = args.data_root or config["arguments"].get("data_root")
    dataset = data.load(named, root, seed=config["seed"])
    if dataset.sha256 != config["dataset"]["sha256"]:
        raise ValueError(
            f"the run in {args.run} was trained on {config['dataset']['name']} (SHA-256 "
            f"{config['dataset']['sha256'][:12]}...), but the data found now is {dataset.name} "
            f"({dataset.sha256[:12]}...): name its folder by --data-root"
        )
    vae = checkpoint.load(args.run).to(device).to(memory_format=torch.channels_last)
    observed = data.observe(dataset, config["dataset"]["observed"], config["seed"]).to(device)
    labels = vae.recipe is not None and vae.recipe["num_classes"] is not None
    layers = 1 if vae.recipe is None or vae.recipe["top_dim"] is None else 2
    return Task(vae, observed, labels, layers, args), dataset.name


# ---- the sections of the table ----


def elbo_rows(task: Task) -> list[Row]:
    test = task.data.test
    pair = task.vae.model, task.vae.guide
    bound = task.over(test, lambda x, y: evaluate.elbo(*pair, x, y), 500, "ELBO")
    n, pixels = len(test.images), test.images[0].numel()
    rows = [
        Row("elbo", "ELBO", estimate(bound.elbo), n),
        Row("distortion", "  distortion, -E_q log p(x|z)", estimate(-bound.reconstruction), n),
        Row("rate", "  rate, KL(q(z|x) || p(z))", estimate(bound.kl), n),
    ]
    levels = report.levels(task.vae, task.data)
    if levels is not None:
        bits = evaluate.bits_per_dimension(bound.elbo, pixels, levels=levels)
        rows.append(Row("bits_per_dimension", "  bits per dimension", estimate(bits), n, 4))
    return rows


def importance_rows(task: Task) -> list[Row]:
    split, k = task.first(task.args.images), task.args.num_samples
    sampler = evaluate.ImportanceSampler(
        task.vae.model,
        task.vae.guide,
        num_samples=k,
        compiler=captured.inductor if task.args.captured else None,
    )
    found = task.over(split, sampler, 20, f"IWAE-{k:,}")
    n = len(split.images)
    return [
        Row("iwae", f"IWAE-{k:,}", estimate(found.log_evidence), n),
        Row("ess", f"  effective sample size, of {k:,}", estimate(found.ess), n, 1),
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


class Annealing(NamedTuple):
    """AIS of images and their importance-weighted bound; both bounds of simulated ones, `(B,)`."""

    forward: Tensor
    iwae: Tensor
    lower: Tensor
    upper: Tensor


def annealed_rows(task: Task) -> list[Row]:
    args, model, k = task.args, task.vae.model, task.args.num_samples
    split = task.first(args.annealed_images)
    settings: Any = {
        "initial": None if args.from_prior else task.vae.guide,
        "num_temperatures": args.temperatures,
        "num_chains": args.chains,
        "title": task.title("AIS"),
    }

    def found(x: Tensor, y: Tensor | None) -> Annealing:
        forward = evaluate.annealed(model, x, y, **settings)
        iwae = evaluate.importance_weighted(model, task.vae.guide, x, y, num_samples=k)
        sandwich = evaluate.bidirectional(model, x, y, **settings)
        return Annealing(forward.log_evidence, iwae, *sandwich)

    result = task.over(split, found, 100, "")  # the chains of 100 images move at once
    start, n = "the prior" if args.from_prior else "the guide", len(split.images)
    rows = [
        Row("ais", f"AIS from {start}, {args.temperatures:,} steps", estimate(result.forward), n),
        Row("ais_lower", "  on simulated images: lower bound", estimate(result.lower), n),
        Row("ais_upper", "  ... and upper bound", estimate(result.upper), n),
        Row("ais_gap", "  ... and its width", estimate(result.upper - result.lower), n),
        Row("ais_iwae", f"  IWAE-{k:,} of the same images", estimate(result.iwae), n),
    ]
    if task.layers == 1:
        by_factors = task.over(split, partial(_by_factors, task), 100, "")
        own = by_factors.log_evidence
        rows.append(Row("factor_iwae", "  ... by a proposal of its own", estimate(own), n))
        rows += tail_rows(by_factors.pareto_k, "factor_pareto_k", "  ... and its ")
        rows.append(Row("ais_less_iwae", "  AIS less that", estimate(result.forward - own), n))
    return rows


def _by_factors(task: Task, x: Tensor, y: Tensor | None, steps: int = 600) -> evaluate.Importance:
    """The importance-weighted bound by a normal with a full covariance for each image."""
    model = task.vae.model
    factors = evaluate.full_covariance_factors(task.vae.guide, x, y)
    with tqdm(total=steps, desc="proposals", leave=False, disable=task.args.quiet or None) as bar:
        evaluate.optimize_factors(
            model,
            factors,
            x,
            y,
            steps=steps,
            learning_rate=0.02,
            particles=4,
            on_step=lambda step: bar.update(),
        )
    own = partial(factors, index=torch.arange(len(x), device=x.device))
    return evaluate.importance_sampling(model, own, x, y, num_samples=task.args.num_samples)


def gap_rows(task: Task, steps: int = 500) -> list[Row]:
    split = task.first(task.args.gap_images)
    x, y = data.pixels(split.images), split.labels if task.labels else None
    with (
        tqdm(total=steps, desc="factors", leave=False, disable=task.args.quiet or None) as bar,
        evaluate.fixed_noise(x.device, task.args.seed),
    ):
        found = evaluate.gaps(
            task.vae.model,
            task.vae.guide,
            x,
            y,
            steps=steps,
            seed=task.args.seed,
            on_step=lambda step: bar.update(),
        )
    return [
        Row("amortization_gap", "amortization gap", estimate(found.amortization), len(x)),
        Row("approximation_gap", "approximation gap", estimate(found.approximation), len(x)),
    ]


def latent_rows(task: Task) -> list[Row]:
    def codes(split: Split, title: str) -> Tensor:
        guide = task.vae.guide
        return task.over(split, lambda x, y: evaluate.posterior_means(guide, x, y), 500, title)

    test, held_out = task.data.test, task.data.validation
    n, means = len(test.images), codes(test, "codes")
    active = int((evaluate.unit_variances(means) > evaluate.ACTIVE).sum())
    rows = [
        Row("active_units", f"active units, of {means.shape[1]}", Estimate(active, math.nan), n, 0)
    ]
    if task.layers == 1:
        with evaluate.fixed_noise(means.device, task.args.seed):
            known = evaluate.information(
                task.vae.model,
                task.vae.guide,
                test,
                labels=task.labels,
                title=task.title("information"),
            )
        rows += [
            Row("mutual_information", f"I(x; z), at most {math.log(n):.2f}", known.mutual, n),
            Row("aggregate_kl", "KL(q(z) || p(z))", known.aggregate, n),
        ]
    if held_out.labels is not None and test.labels is not None:
        # fitted to validation images: the pair was not trained on them, as on the test's
        found = evaluate.probe(codes(held_out, "probe"), held_out.labels, means, test.labels)
        rows += [
            Row("knn", "probe: 5 nearest neighbours", found.nearest_neighbours, n, 4),
            Row("logistic", "probe: logistic regression", found.logistic_regression, n, 4),
        ]
    return rows


def picture(task: Task) -> plots.Figure:
    """The posterior of one test image by NUTS beside the guide's; the two units shown are those
    that the posterior correlates most."""
    which, draws, seed = task.args.image, task.args.nuts_samples, task.args.seed
    images, labels = task.data.test
    if which >= len(images):
        raise ValueError(f"--image must be below {len(images)}, the test images; it is {which}")
    x = data.pixels(images[which : which + 1])
    y = labels[which : which + 1] if task.labels and labels is not None else None
    quiet = task.args.quiet or not sys.stderr.isatty()
    exact = evaluate.nuts(task.vae.model, x, y, num_samples=draws, seed=seed, quiet=quiet)["z"]
    with evaluate.evaluating(task.vae), evaluate.fixed_noise(x.device, seed):
        guide = task.vae.encode(x, y).sample((draws,))[:, 0]
    size = exact.shape[1]
    correlation = exact.T.cpu().corrcoef().reshape(size, size).nan_to_num(0).abs()
    units = divmod(int(correlation.fill_diagonal_(0).argmax()), size)
    return plots.posterior(exact, guide, units, title=f"Posterior of test image {which}")


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    memory.keep_freed_memory()
    task, name = load(args)
    folder = Path(args.run)
    if task.layers > 1:
        print("two latent layers: what is of a single latent z is left out")
        args.gap_images = args.nuts_samples = 0
    rows = [*elbo_rows(task)]
    if args.images:
        rows += importance_rows(task)
    if args.annealed_images:
        rows += annealed_rows(task)
    if args.gap_images:
        rows += gap_rows(task)
    rows += latent_rows(task)
    what = f"{name} test set, {report.OBSERVED[task.data.how]}; nats per image and their se"
    print(report.columns(what, ["", "mean", "se", "images"], [row.cells() for row in rows]))
    print(f"what they are, and are not:\n{LEGEND}")
    numbers = {row.key: row.json() for row in rows}
    run.write_json(folder / "evaluation.json", {"arguments": vars(args), "numbers": numbers})
    if args.nuts_samples > 1:
        plots.save(picture(task), folder / "posterior.png")
    print(f"{time.perf_counter() - start:.0f} s; kept in {folder}/")


if __name__ == "__main__":
    cli.run_main(main)
