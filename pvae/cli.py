"""The command line that the examples share: arguments, and how a run ends."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI

from pvae import captured, data, memory, run
from pvae.builder import ACTIVATIONS, GUIDES, LIKELIHOODS, NETS, OBJECTIVES, PRIORS
from pvae.train import TrainingFailed
from pvae.vae import VAE

# what may be given anew when a run is resumed; all else is part of what the run is
_RESUMABLE = {"num_epochs", "device", "data_root", "resume", "quiet", "out", "engine"}
_BINARIZE = {"none": "grey", "threshold": "threshold", "static": "static", "dynamic": "dynamic"}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that are None: their help says what happens instead."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        # what a help says of None gives way to the default that an example sets
        text, says_default, _ = (action.help or "").partition(" (default: ")
        return (
            f"{text} (default: %(default)s)" if says_default else super()._get_help_string(action)
        )


def _number(kind: type, low: float, *, strict: bool = False, high: float = math.inf) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if strict else low <= value) or not value < high:
            bound = f"{'above' if strict else 'at least'} {low:g}"
            bound += f" and below {high:g}" if high < math.inf else ""
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}")
        return value

    return parse


def _choices(group: Any, flag: str, table: Mapping[str, Any], default: str, what: str) -> None:
    names = [f"{n} ({e.label})" if hasattr(e, "label") else n for n, e in table.items()]
    help_text = f"{what}: {'; '.join(names)}"
    group.add_argument(flag, choices=list(table), default=default, metavar="NAME", help=help_text)


# what runs a step; a signature that is as rare as the short last batch does not pay for a graph
ENGINES: Mapping[str, Callable[..., SVI]] = {
    "eager": SVI,
    "captured": partial(captured.SVI, after=20),
    "cuda-graph": partial(captured.SVI, after=20, record=captured.cuda_graph),
}
_PAYS_BACK = 3000  # steps; to capture takes 10 to 30 s, and saves a sixth of a step or more

_DEFAULT_DATA = "MNIST, found or downloaded; offline, scikit-learn's digits"
NATURAL = _number(int, 1)  # the type of an argument that counts something
COUNT = _number(int, 0)  # ... where none is a number too
_POSITIVE, _FRACTION = _number(float, 0, strict=True), _number(float, 0, high=1)


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments of a training example, grouped; it sets other defaults by `set_defaults`.

    >>> parser("An example.").parse_args(["-b", "64"]).batch_size
    64
    """
    p = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    group = _data_arguments(p)
    group.add_argument(
        "--binarize",
        choices=list(_BINARIZE),
        help="how grey pixels become binary ones (default: dynamic, redrawn for every training "
        "batch, for a Bernoulli likelihood; else none)",
    )
    group.add_argument(
        "--dequantize", action="store_true", help="add uniform noise of one grey level to pixels"
    )
    _pair_arguments(p)
    _schedule_arguments(_training_arguments(p))
    group = _run_arguments(p)
    group.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    group.add_argument(
        "--engine",
        choices=["auto", *ENGINES],
        default="auto",
        help="how a step runs: eager is stock SVI, captured compiles it once, cuda-graph replays "
        f"it on a GPU without the host, auto captures a run of at least {_PAYS_BACK:,} steps",
    )
    group.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="of the networks in training: tf32 for matrix products on a GPU, bf16 by autocast",
    )
    return p


def study_parser(
    description: str,
    *,
    images: bool = True,
    training: bool = True,
    default_data: str = _DEFAULT_DATA,
) -> argparse.ArgumentParser:
    """The arguments of a short study, which composes its pairs itself and is not resumed; without
    `images` it takes no data set, without `training` no epochs.

    `default_data` is what the help says of a `--dataset` that is not given.

    >>> study_parser("A study.").parse_args(["--seed", "3"]).seed
    3
    """
    p = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    if images:
        _data_arguments(p, default_data)
    if training:
        _training_arguments(p)
    _run_arguments(p)
    p.set_defaults(resume=None)
    return p


def _data_arguments(p: argparse.ArgumentParser, default: str = _DEFAULT_DATA) -> Any:
    g = p.add_argument_group("data")
    g.add_argument(
        "--dataset",
        metavar="NAME|PATH",
        help=f"{', '.join(data.NAMES)}, a .npz/.npy file or an image folder (default: {default})",
    )
    g.add_argument(
        "--data-root",
        metavar="DIR",
        help="where MNIST/raw and its like are looked for, before $PVAE_DATA, ./data and the "
        "cache folder",
    )
    return g


def _pair_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("model and guide")
    g.add_argument("--latent-dim", type=NATURAL, default=32, metavar="D", help="latent dimension")
    _choices(g, "--net", NETS, "conv", "networks")
    g.add_argument("--hidden", type=NATURAL, default=256, metavar="N", help="hidden width")
    g.add_argument("--activation", choices=list(ACTIVATIONS), default="silu", help="activation")
    _choices(g, "--likelihood", LIKELIHOODS, "bernoulli", "p(x|z)")
    # a factor for each datum has none for validation images: examples/amortization.py trains them
    amortized = {name: guide for name, guide in GUIDES.items() if guide.amortized}
    _choices(g, "--guide", amortized, "normal", "q(z|x)")
    _choices(g, "--prior", PRIORS, "standard_normal", "p(z)")
    g.add_argument(
        "--components",
        type=NATURAL,
        default=50,
        metavar="K",
        help="components of the priors mixture and vamp",
    )
    g.add_argument(
        "--top-dim",
        type=NATURAL,
        metavar="D",
        help="dimension of a second latent layer z2 above: z2 -> z1 -> x (default: one layer)",
    )
    g.add_argument(
        "--conditional", action="store_true", help="give labels y to the pair: p(x|z, y), q(z|x, y)"
    )


def _training_arguments(p: argparse.ArgumentParser) -> Any:
    g = p.add_argument_group("training")
    g.add_argument(
        "-n",
        "--num-epochs",
        type=NATURAL,
        metavar="N",
        help="epochs (default: 10, and at least 2,000 steps)",
    )
    g.add_argument("-b", "--batch-size", type=NATURAL, default=128, metavar="B", help="batch size")
    g.add_argument(
        "-lr", "--learning-rate", type=_POSITIVE, default=4e-3, metavar="LR", help="Adam's rate"
    )
    return g


def _schedule_arguments(g: Any) -> None:
    g.add_argument(
        "--lr-warmup",
        type=_FRACTION,
        default=0.05,
        metavar="F",
        help="fraction of training in which the learning rate rises",
    )
    g.add_argument(
        "--schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="learning rate after it",
    )
    _choices(g, "--objective", OBJECTIVES, "trace_elbo", "what SVI optimizes")
    g.add_argument(
        "--num-particles", type=NATURAL, default=1, metavar="K", help="draws of z for each image"
    )
    g.add_argument(
        "--beta",
        type=_number(float, 0),
        default=1.0,
        help="weight of the KL; numbers are always reported at 1",
    )
    g.add_argument(
        "--kl-warmup",
        type=_FRACTION,
        default=0.05,
        metavar="F",
        help="fraction of training in which beta rises from 0",
    )
    g.add_argument(
        "--kl-cycles",
        type=NATURAL,
        default=1,
        metavar="N",
        help="how often it does so, each time in its share of training",
    )


def _run_arguments(p: argparse.ArgumentParser) -> Any:
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=COUNT, default=0, help="seed of everything random")
    g.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device"
    )
    g.add_argument(
        "--out", metavar="DIR", help="folder of the run, new or empty (default: runs/ and a name)"
    )
    g.add_argument("--quiet", action="store_true", help="no progress, only the results")
    return g


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks; with `--resume` the run's own arguments are the defaults.

    `args.out` is then the run's folder, and `args.observe` one of `pvae.data.OBSERVATIONS`.
    """
    args = parser.parse_args(argv)
    if args.resume is not None:
        try:
            saved = run.read_config(args.resume)["arguments"]
        except ValueError as error:
            parser.error(str(error))
        # what is not on the command line keeps the value that the namespace already has
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        _refuse_changes(parser, args, saved)
        args.out = args.resume
    args.observe = _observation(parser, args)
    least = OBJECTIVES[args.objective].min_particles
    if args.num_particles < least:
        parser.error(
            f"--objective {args.objective} needs --num-particles of at least {least}: with 1 it is "
            "the ELBO"
        )
    return args


def _refuse_changes(
    parser: argparse.ArgumentParser, args: argparse.Namespace, saved: Mapping[str, Any]
) -> None:
    changed = [k for k, v in vars(args).items() if k in saved and saved[k] != v]
    for name in changed:
        if name not in _RESUMABLE:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)}: the run in {args.resume} has "
                f"{saved[name]}, which cannot be changed on --resume; start a new run instead"
            )


def _observation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    family = LIKELIHOODS[args.likelihood]
    binary = family.binary
    if args.dequantize:
        if family.data != "grey" or args.binarize not in (None, "none"):
            parser.error(
                "--dequantize is for likelihoods of any grey value: not with --binarize, binary "
                "likelihoods or those of 256 levels"
            )
        return "dequantized"
    if binary and args.binarize == "none":
        parser.error(
            f"--likelihood {args.likelihood} is for binary pixels, so --binarize none would leave "
            "its support: use --likelihood continuous_bernoulli, or grey_bernoulli (the "
            "cross-entropy, not a likelihood)"
        )
    return _BINARIZE[args.binarize or ("dynamic" if binary else "none")]


def device(name: str) -> torch.device:
    """The device of a name; `auto` is the first there is of cuda, mps, cpu.

    Raises:
        ValueError: the device is not there.

    >>> device("cpu")
    device(type='cpu')
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(n for n, is_there in there.items() if is_there)
    if not there[name]:
        raise ValueError(
            f"--device {name} is not available here; there is "
            f"{', '.join(n for n, is_there in there.items() if is_there)}"
        )
    return torch.device(name)


def num_epochs(args: argparse.Namespace, images: int) -> int:
    """`-n`, or 10 epochs, or as many as make 2,000 steps where the data set is small."""
    steps_per_epoch = math.ceil(images / args.batch_size)
    return args.num_epochs or max(10, math.ceil(2000 / steps_per_epoch))


def run_main(main: Callable[[], None]) -> None:
    """Runs an example's `main`; what a person did wrong, or can mend, is said in plain words.

    Exit status: 1 on an error, 130 when interrupted, so that scripts notice. With
    `PVAE_TRACEBACK=1` in the environment, errors are raised as they are.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except (ValueError, OSError, TrainingFailed) as error:
        if os.environ.get("PVAE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(PVAE_TRACEBACK=1 shows where in the code)")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def engine(args: argparse.Namespace, images: int, device: torch.device) -> str:
    """`--engine`, or for `auto` captured where the run is long enough to pay for it; says which.

    Raises:
        ValueError: a CUDA graph is asked for on another device.

    >>> args, cpu = parser("").parse_args(["--quiet", "-n", "10"]), torch.device("cpu")
    >>> engine(args, 50_000, cpu), engine(args, 1_000, cpu)
    ('captured', 'eager')
    """
    if args.engine == "cuda-graph" and device.type != "cuda":
        raise ValueError(f"--engine cuda-graph needs the device cuda; it is {device.type}")
    steps = args.num_epochs * math.ceil(images / args.batch_size)
    chosen = args.engine
    if chosen == "auto":
        chosen = "captured" if steps >= _PAYS_BACK else "eager"
    if not args.quiet:
        why = f", for a run of {steps:,} steps" if args.engine == "auto" else ""
        wait = "; the first epoch waits for the compiler" if chosen == "captured" else ""
        print(f"engine: {chosen}{why}{wait}")
    return chosen


def spread(epochs: int, count: int) -> set[int]:
    """About `count` epochs spread over all, the first and the last among them.

    >>> sorted(spread(100, 4))
    [1, 34, 67, 100]
    """
    if count >= epochs:
        return set(range(1, epochs + 1))
    return {1 + round(i * (epochs - 1) / (count - 1)) for i in range(count)}


def keep_config(folder: Path, args: argparse.Namespace, dataset: data.Dataset) -> None:
    """Writes `config.json`, or on `--resume` checks that the data is still the same.

    Raises:
        ValueError: the run was started on other data.
    """
    if args.resume is not None:
        before = run.read_config(folder)["dataset"]
        if before["sha256"] != dataset.sha256:
            raise ValueError(
                f"the run in {folder} was started on {before['name']} (SHA-256 "
                f"{before['sha256'][:12]}...), but the data found now is {dataset.name} "
                f"({dataset.sha256[:12]}...): name the same data by --dataset and --data-root"
            )
    config = {
        "arguments": {name: value for name, value in vars(args).items() if name != "observe"},
        "dataset": {"name": dataset.name, "sha256": dataset.sha256, "observed": args.observe},
        "seed": args.seed,
        "versions": run.versions(),
    }
    run.write_json(folder / "config.json", config)


def announce(
    args: argparse.Namespace,
    dataset: data.Dataset,
    vae: VAE,
    device: torch.device,
    folder: Path,
    kept_memory: bool,
) -> None:
    """Says in a few lines what will run, on what data, and where it is kept."""
    if dataset.note:
        print(dataset.note)
    if args.quiet:
        return
    sizes = "/".join(
        f"{len(s.images):,}" for s in (dataset.train, dataset.validation, dataset.test)
    )
    print(f"data: {dataset.name}, {sizes} images of {dataset.image_shape}, {args.observe}")
    parameters = sum(p.numel() for p in vae.parameters())
    layers = f"{args.latent_dim}" + ("" if args.top_dim is None else f"- and {args.top_dim}")
    print(
        f"pair: {args.net} net, {layers}-D latent, {args.likelihood} likelihood, "
        f"{args.guide} guide, {args.prior} prior; {parameters:,} parameters"
    )
    allocator = "; the C allocator keeps freed memory" if kept_memory else ""
    print(f"run: {args.objective} by SVI on {device}{allocator}; kept in {folder}/")


class Study(NamedTuple):
    """What a short study starts from."""

    folder: Path
    device: torch.device
    dataset: data.Dataset
    observed: data.Observed


def start_study(args: argparse.Namespace, name: str, observe: str) -> Study:
    """Seeds, makes the run's folder with its `config.json`, loads the data and says so.

    `observe` is one of `pvae.data.OBSERVATIONS`; `args` come from a `study_parser`.
    """
    pyro.set_rng_seed(args.seed)
    chosen = device(args.device)
    dataset = data.load(args.dataset, args.data_root, seed=args.seed)
    folder = run.new_folder(args.out, name)
    if hasattr(args, "num_epochs"):  # a study that trains
        args.num_epochs = num_epochs(args, len(dataset.train.images))
    args.observe = observe
    keep_config(folder, args, dataset)
    memory.keep_freed_memory()
    if dataset.note:
        print(dataset.note)
    if not args.quiet:
        print(f"data: {dataset.name}, {len(dataset.train.images):,} training images, {observe}")
    return Study(folder, chosen, dataset, data.observe(dataset, observe, args.seed).to(chosen))
