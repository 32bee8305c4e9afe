"""The full evaluation of a finished run: every number of `pvae.evaluate` in one table.

    python -m pvae.evaluate runs/mnist_svi

It prints the table and says what each number is and is not. It writes `evaluation.json`,
`calibration.png` and `posterior.png` into the folder of the run. The model is the best one of the
run, and the images are its test set.
"""

import argparse
import inspect
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pvae import captured, checkpoint, cli, data, evaluate, memory, plots, results, run
from pvae.evaluate import Estimate, estimate
from pvae.objectives import latent_names
from pvae.results import Row, Subject, codes, tail_rows
from pvae.study import find_device


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of `python -m pvae.evaluate`."""
    parser = argparse.ArgumentParser(
        prog="python -m pvae.evaluate",
        description="What a finished run is worth: one table, and evaluation.json in its folder.",
        formatter_class=cli.Formatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="folder of the run, such as runs/mnist_svi")
    parser.add_argument("--data-root", metavar="DIR", help="where its data is, if it has moved")
    g = parser.add_argument_group("how much of each; 0 leaves it out")
    for flag, default, text in (
        ("--images", 200, "test images of the importance-weighted bound"),
        ("--annealed-images", 20, "test images of annealed importance sampling"),
        ("--gap-images", 100, "test images of the amortization gap"),
        ("--simulated-images", 1000, "images drawn from the model, to test whether q(z|x) fits"),
        ("--nuts-samples", 500, "draws of NUTS, for the picture of one image's posterior"),
    ):
        cli.option(g, flag, text, cli.COUNT, default, "N")
    g = parser.add_argument_group("how well")
    for flag, default, text in (
        ("--num-samples", 1000, "draws k of the importance-weighted bound"),
        ("--temperatures", 200, "steps of annealing"),
        ("--chains", 1, "chains of annealing for each image"),
        ("--gap-steps", 500, "optimization steps of the gaps' factors"),
        ("--proposal-steps", 600, "optimization steps of each image's own proposal"),
    ):
        cli.option(g, flag, text, cli.NATURAL, default, "N")
    for flag, text in (
        ("--from-prior", "anneal from the prior: without the guide, but it needs many more steps"),
        ("--captured", "compile the weights of IWAE-k; this saves time from a million draws on"),
    ):
        g.add_argument(flag, action="store_true", help=text)
    g = parser.add_argument_group("run")
    cli.option(g, "--image", "test image for NUTS", cli.COUNT, 0, "I")
    cli.option(g, "--seed", "seed of the noise", cli.COUNT, 0, "S")
    cli.choice(g, "--device", ["auto", "cpu", "cuda", "mps"], "auto", "device")
    g.add_argument("--quiet", action="store_true", help="no progress, only the results")
    args = parser.parse_args(argv)
    for name, least in (("simulated_images", evaluate.CALIBRATED), ("nuts_samples", 2)):
        if 0 < getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be 0 or at least {least}, not {getattr(args, name)}")
    return args


def opened(args: argparse.Namespace) -> tuple[Subject, str]:
    """The run's best model with its data, and the name of the data.

    Raises:
        ValueError: the folder is not that of one run, or the data found are not those of the run.
        FileNotFoundError: the run has no `best.pt`, or its data are not found.
    """
    config = run.read_config(args.run)
    run.check_alone(args.run)
    device = find_device(args.device)
    named = config["arguments"].get("dataset") or config["dataset"]["name"]
    root = args.data_root or config["arguments"].get("data_root")
    data_seed = config.get("data_seed", config["seed"])  # version 0.1 had one seed for all
    how, asked = config["dataset"]["observed"], config["arguments"]
    dataset = data.load(
        named,
        root,
        seed=data_seed,
        split=asked.get("split"),
        as_is=how == "as_is",
        stream=bool(asked.get("stream")),
    )
    dataset.require_same(config["dataset"]["name"], config["dataset"]["sha256"], args.run)
    vae = checkpoint.load(args.run).to(device).to(memory_format=torch.channels_last)
    observed = data.observe(
        dataset,
        how,
        data_seed,
        standardize=asked.get("standardize", False),
        numpy_seed=asked.get("numpy_seed"),
    ).to(device)
    return Subject(vae, observed, args.seed, args.quiet), dataset.name


# ---- the sections that only this table has; `main` prints their docstrings ----


def annealed_rows(subject: Subject, args: argparse.Namespace) -> list[Row]:
    """AIS: annealed importance sampling, a lower bound in expectation that checks IWAE-k by another
    method. Its chains start at draws from the guide and move to the posterior. Chains that start at
    the prior do not use the guide at all, and need many more steps. On images drawn from the model
    there is an upper bound too: the width between the two bounds is the most that AIS can lack
    there. On real images this is unknown. A move whose numbers overflow is rejected; the table
    shows the share of such moves.
    A proposal of its own: a normal with a full covariance, optimized for each image alone, replaces
    the guide. If its IWAE-k is higher than that of the guide, the guide is the reason. If AIS
    agrees with it, both are probably near log p(x). That is no proof: both are lower bounds, and
    both start from the guide, unless AIS starts from the prior.
    """
    model, guide, k = subject.vae.model, subject.vae.guide, args.num_samples
    split = subject.subset(args.annealed_images)
    anneal = evaluate.Annealer(
        model,
        None if args.from_prior else guide,
        num_temperatures=args.temperatures,
        num_chains=args.chains,
        title=subject.title("AIS"),
    )

    def found(x: Tensor, y: Tensor | None) -> Tensor:  # (B, 5)
        forward = anneal(x, y)
        iwae = evaluate.importance_weighted(model, guide, x, y, num_samples=k)
        both = anneal.sandwich(x, y)
        bounds = forward.log_evidence, iwae, both.lower, both.upper
        return torch.stack([*bounds, forward.diverged], dim=1)

    # the chains of 100 images move together
    ais, iwae, lower, upper, diverged = subject.over(split, found, 100).T
    start, n = "the prior" if args.from_prior else "the guide", len(split.images)
    rows = [
        Row("ais", f"AIS from {start}, {args.temperatures:,} steps", estimate(ais), n),
        Row("ais_lower", "  on simulated images: lower bound", estimate(lower), n),
        Row("ais_upper", "  ... and upper bound", estimate(upper), n),
        Row("ais_gap", "  ... and its width", estimate(upper - lower), n),
    ]
    if diverged.any():
        share = estimate(diverged.double())
        rows.append(Row("ais_diverged", "  share of moves that diverged", share, n, 4))
    rows.append(Row("ais_iwae", f"  IWAE-{k:,} of the same subset", estimate(iwae), n))
    if has_one_latent(subject):
        by_factors = subject.over(split, partial(_by_factors, subject, args), 100)
        own = by_factors.log_evidence
        rows.append(Row("factor_iwae", "  ... by a proposal of its own", estimate(own), n))
        rows += tail_rows(by_factors.pareto_k, "factor_pareto_k", "  ... and its ")
        rows.append(Row("ais_less_iwae", "  AIS less that", estimate(ais - own), n))
    return rows


def has_one_latent(subject: Subject) -> bool:
    """Whether the guide draws a single latent."""
    guide = subject.vae.guide
    x, y = next(data.chunks(subject.shown(subject.data.test), 1))
    with evaluate.evaluating(guide), evaluate.fixed_noise(x.device, 0):
        return len(latent_names(poutine.trace(guide).get_trace(x, y))) == 1


def _by_factors(
    subject: Subject, args: argparse.Namespace, x: Tensor, y: Tensor | None
) -> evaluate.Importance:
    """The importance-weighted bound by a normal with a full covariance for each image."""
    model = subject.vae.model
    factors = evaluate.full_covariance_factors(subject.vae.guide, x, y)
    with _bar("proposals", args.proposal_steps, subject) as bar:
        evaluate.optimize_factors(
            model,
            factors,
            x,
            y,
            steps=args.proposal_steps,
            learning_rate=0.02,
            particles=4,
            on_step=lambda step: bar.update(),
        )
    own = partial(factors, index=torch.arange(len(x), device=x.device))
    return evaluate.ImportanceSampler(model, own, num_samples=args.num_samples)(x, y)


def _bar(title: str, steps: int, subject: Subject) -> Any:
    return tqdm(total=steps, desc=title, leave=False, disable=subject.quiet or None)


def gap_rows(subject: Subject, args: argparse.Namespace) -> list[Row]:
    """gaps: the amortization gap is the cost of one encoder for all images, the approximation gap
    that of the family of q. Factors short of their optimum make the first gap too small and the
    second too large.
    """
    split = subject.shown(subject.subset(args.gap_images))
    x, seed = data.pixels(split.images), args.seed
    with _bar("factors", args.gap_steps, subject) as bar, evaluate.fixed_noise(x.device, seed):
        found = evaluate.gaps(
            subject.vae.model,
            subject.vae.guide,
            x,
            split.y,
            steps=args.gap_steps,
            seed=seed,
            on_step=lambda step: bar.update(),
        )
    return [
        Row("amortization_gap", "amortization gap", estimate(found.amortization), len(x)),
        Row("approximation_gap", "approximation gap", estimate(found.approximation), len(x)),
    ]


def calibration_rows(subject: Subject, args: argparse.Namespace) -> list[Row]:
    """calibration: tests whether q(z|x) is the posterior of images that the model makes. If it is,
    then for each unit the rank of the latent that made an image, among 100 draws of q(z|x), is
    uniform. The p-value is that of the worst unit, corrected for the number of units: below 0.05,
    q(z|x) is not the posterior. A large p-value is no proof: the test looks at each unit alone, and
    q(z|x) = p(z) passes it. It says nothing about real images. calibration.png shows the ranks.
    """
    test, n = subject.shown(subject.data.test), args.simulated_images
    which = torch.arange(n) % len(test.images)  # for the labels; the images are not used
    x, y = test.images[which], None if test.y is None else test.y[which]
    with evaluate.fixed_noise(x.device, subject.seed):
        found = evaluate.calibration(subject.vae.model, subject.vae.guide, data.pixels(x), y)
    least, units = found.p_values.min().item(), found.p_values.shape[0]
    accused = float((found.p_values < 0.05).sum())
    title = f"{accused:.0f} of {units} units are not calibrated"
    figure = plots.calibration(found.ranks, found.num_draws, found.p_values, title=title)
    plots.save(figure, Path(args.run) / "calibration.png")
    return [
        Row("calibration_p", "calibration: least p-value", Estimate(least, math.nan), n, 4),
        Row("calibration_units", "  units below 0.05", Estimate(accused, math.nan), n, 0, units),
    ]


def latent_rows(subject: Subject) -> list[Row]:
    """active units: those whose posterior mean has a variance above 0.01 over images. Their number
    does not say how much each of them tells about x.
    probe: the accuracies of two classifiers of the posterior means; they do not measure the
    density. The probe needs validation data of two classes or more.
    """
    test, held_out = subject.data.test, subject.data.validation
    n, means = len(test.images), codes(subject, test, "codes")
    rows = results.unit_rows(means)
    y, test_y = held_out.labels, test.labels
    if y is not None and test_y is not None and evaluate.can_probe(y):
        # fitted to validation images, on which the pair was not trained, as on the test images
        found = evaluate.probe(codes(subject, held_out, "probe"), y, means, test_y)
        rows += [
            Row("knn", "probe: 5 nearest neighbours", found.nearest_neighbours, n, 4),
            Row("logistic", "probe: logistic regression", found.logistic_regression, n, 4),
        ]
    return rows


def information_rows(subject: Subject) -> list[Row]:
    """I(x; z): the information of z about which of the N images x is. It cannot exceed log N: near
    log N it is only a lower bound, and KL(q(z) || p(z)) only an upper bound.
    """
    vae, test = subject.vae, subject.shown(subject.data.test)
    n, title = len(test.images), subject.title("information")
    with evaluate.fixed_noise(test.images.device, subject.seed):
        known = evaluate.information(vae.model, vae.guide, test, title=title)
    return [
        Row("mutual_information", f"I(x; z), at most {math.log(n):.2f}", known.mutual, n),
        Row("aggregate_kl", "KL(q(z) || p(z))", known.aggregate, n),
    ]


def picture(subject: Subject, args: argparse.Namespace) -> plots.Figure:
    """Draws the posterior of one test image by NUTS beside that of the guide, in the two units with
    the largest correlation under the posterior."""
    vae, which, draws, seed = subject.vae, args.image, args.nuts_samples, args.seed
    test = subject.shown(subject.data.test)
    x = data.pixels(test.images[which : which + 1])
    y = None if test.y is None else test.y[which : which + 1]
    quiet = args.quiet or not sys.stderr.isatty()
    exact = evaluate.nuts(vae.model, x, y, num_samples=draws, seed=seed, quiet=quiet)["z"]
    with evaluate.evaluating(vae), evaluate.fixed_noise(x.device, seed):
        guide = vae.encode(x, y).sample((draws,))[:, 0]
    size = exact.shape[1]
    correlation = exact.T.cpu().corrcoef().reshape(size, size).nan_to_num(0).abs()
    units = divmod(int(correlation.fill_diagonal_(0).argmax()), size)
    return plots.posterior(exact, guide, units, title=f"Posterior of test image {which}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates a run: prints the table, and writes `evaluation.json` into its folder."""
    args = arguments(argv)
    start = time.perf_counter()
    memory.keep_freed_memory()
    subject, name = opened(args)
    folder = Path(args.run)
    if args.image >= (images := len(subject.data.test.images)):
        raise ValueError(
            f"--image must be below {images}, the number of test images, not {args.image}"
        )
    one = has_one_latent(subject)
    if not one:
        print("several latent layers: numbers that need a single latent z are left out")
        args.gap_images = args.simulated_images = args.nuts_samples = 0
    compiler = captured.inductor if args.captured else None
    sections: list[tuple[int, Callable[..., list[Row]], Any]] = [  # how much, section, arguments
        (True, results.elbo_rows, ()),
        (args.images, results.importance_rows, (args.images, args.num_samples, compiler)),
        (args.annealed_images, annealed_rows, (args,)),
        (args.gap_images, gap_rows, (args,)),
        (args.simulated_images, calibration_rows, (args,)),
        (True, latent_rows, ()),
        (one, information_rows, ()),
    ]
    asked = [(section, given) for how_many, section, given in sections if how_many]
    rows = [row for section, given in asked for row in section(subject, *given)]
    print(results.table(rows, subject, name))
    print("what they are, and are not:")
    for section, _ in asked:  # its docstring says what its numbers are
        print(textwrap.indent(inspect.getdoc(section) or "", "  "))
    numbers = {"arguments": vars(args), "numbers": results.as_json(rows, subject.data.units)}
    run.write_json(folder / "evaluation.json", numbers)
    if args.nuts_samples > 1:
        plots.save(picture(subject, args), folder / "posterior.png")
    print(f"{time.perf_counter() - start:.0f} s; kept in {folder}/")
