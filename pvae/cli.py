"""The command line that the programs share: their arguments, and their exit status."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pvae import data, run
from pvae.builder import ACTIVATIONS, GUIDES, LIKELIHOODS, NETS, PRIORS
from pvae.objectives import OBJECTIVES
from pvae.schedule import Schedule
from pvae.stopping import Stopped
from pvae.study import ENGINES, PAYS_BACK
from pvae.train import TrainingFailed

# the arguments that may change when a run is resumed; all others are part of the run
_RESUMABLE = {
    *("num_epochs", "device", "data_root", "resume", "quiet", "out", "engine"),
    *("checkpoint_minutes", "accumulate", "stream", "workers", "tensorboard"),
}
_BINARIZE = ["none", "threshold", "static", "dynamic"]


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are not None; the help of the others says what happens instead."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        # if an example sets a default, it replaces the help's words about None
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
            bound += f" and below {high:,}" if high < math.inf else ""
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} {bound}, not {text!r}")
        return value

    return parse


def option(
    group: Any, flags: str, what: str, kind: Any = None, default: Any = None, metavar: str = ""
) -> None:
    """Adds one argument to a group; spaces separate its flags."""
    group.add_argument(*flags.split(), type=kind, default=default, metavar=metavar, help=what)


def choice(group: Any, flag: str, names: Iterable[str], default: str | None, what: str) -> None:
    """Adds an argument that takes one of `names`; the help shows the labels of a mapping."""
    if isinstance(names, Mapping):
        what += f": {'; '.join(f'{name} ({entry.label})' for name, entry in names.items())}"
    metavar = "NAME" if isinstance(names, Mapping) else None
    group.add_argument(flag, choices=list(names), default=default, metavar=metavar, help=what)


_DEFAULT_DATA = "MNIST, found or downloaded; offline, scikit-learn's digits"
NATURAL = _number(int, 1)  #: the type of an argument that counts something
COUNT = _number(int, 0)  #: the same, if the count may be 0
_POSITIVE, _FRACTION = _number(float, 0, strict=True), _number(float, 0, high=1)
_SHARE = _number(float, 0, strict=True, high=1)


# the values of the arguments that studies read but that `study_parser` does not offer
_UNASKED: dict[str, Any] = {
    **dict.fromkeys(("resume", "engine", "ema", "patience", "binarize", "split")),
    **dict.fromkeys(("resumable", "dequantize", "standardize", "tensorboard"), False),
    "precision": "fp32",
    "accumulate": 1,
}


def parser(description: str) -> argparse.ArgumentParser:
    """The parser of a training example; the example sets other defaults by `set_defaults`.

    >>> parser("An example.").parse_args(["-b", "64"]).batch_size
    64
    """
    p = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    g = _data_arguments(p)
    how = "how grey pixels become binary ones (default: dynamic, redrawn for every training batch, "
    choice(g, "--binarize", _BINARIZE, None, how + "for a Bernoulli likelihood; else none)")
    for flag, what in (
        ("--dequantize", "add uniform noise of one grey level to pixels"),
        ("--as-is", "read the numbers of a file as they are, never as pictures"),
        ("--standardize", "as --as-is, each element scaled to mean 0 and sd 1 over training data"),
    ):
        g.add_argument(flag, action="store_true", help=what)
    _pair_arguments(p.add_argument_group("model and guide"))
    _schedule_arguments(_training_arguments(p))
    g = _run_arguments(p)
    _resume_argument(p, g)
    how = (
        "how a step runs: eager is stock SVI, captured compiles it once, cuda-graph replays it on "
        f"a GPU, auto is captured for a run of at least {PAYS_BACK:,} steps, else eager"
    )
    choice(g, "--engine", ["auto", *ENGINES], "auto", how)
    precision_argument(g)
    what = "split a batch into K parts, one after another, for one step of the optimizer"
    option(g, "--accumulate", what, NATURAL, 1, "K")
    what = "write a log for TensorBoard into the run's folder too: numbers and some pictures"
    g.add_argument("--tensorboard", action="store_true", help=what)
    return p


def study_parser(
    description: str,
    *,
    images: bool = True,
    training: bool = True,
    resumable: bool = False,
    default_data: str = _DEFAULT_DATA,
) -> argparse.ArgumentParser:
    """The parser of a short study, which composes its pairs itself.

    Without `images` the study takes no arguments of a data set, without `training` none of
    training. Parse a `resumable` study by `resumed`. `default_data` is what the help shows as the
    default of `--dataset`.

    >>> study_parser("A study.").parse_args(["--seed", "3"]).seed
    3
    """
    p = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    if images:
        _data_arguments(p, default_data)
    if training:
        _training_arguments(p)
    g = _run_arguments(p)
    p.set_defaults(**_UNASKED)
    if resumable:
        _resume_argument(p, g)
    return p


def precision_argument(p: Any) -> None:
    """Adds `--precision` to a parser or to a group of its arguments."""
    how = "of the networks in training: tf32 for matrix products on a GPU, bf16 by autocast"
    choice(p, "--precision", ["fp32", "tf32", "bf16"], "fp32", how)


def _data_arguments(p: argparse.ArgumentParser, default: str = _DEFAULT_DATA) -> Any:
    g = p.add_argument_group("data")
    what = f"{', '.join(data.NAMES)}, a .npz/.npy file or an image folder (default: {default})"
    option(g, "--dataset", what, metavar="NAME|PATH")
    what = "folder with MNIST/raw and the like; searched before $PVAE_DATA, ./data and the cache"
    option(g, "--data-root", what, metavar="DIR")
    what = "seed of splits and fixed binarisations: runs to be compared share it"
    option(g, "--data-seed", what, COUNT, 0, "S")
    what = "draw fixed binary pixels by NumPy's generator; 777: those of the published tables"
    option(g, "--numpy-seed", what, _number(int, 0, high=2**32), metavar="S")
    what = "read images from a .npy file of bytes or a folder when they are needed, not all at the "
    what += "start (the default if they would take more than a quarter of the memory)"
    g.add_argument("--stream", action="store_true", help=what)
    what = "processes that read streamed images ahead (default: 2 for a folder, none for a file)"
    option(g, "--workers", what, COUNT, metavar="N")
    what = "fractions of a file or folder without splits of its own (default: 0.8 0.1 0.1)"
    parts = ("TRAIN", "VALIDATION", "TEST")
    g.add_argument("--split", type=_SHARE, nargs=3, default=None, metavar=parts, help=what)
    return g


def _pair_arguments(g: Any) -> None:
    what = "dimension of z; several make layers ... -> z2 -> z1 -> x, that of z1 first"
    flags = ("--latent-dims", "--latent-dim")
    g.add_argument(*flags, type=NATURAL, nargs="+", default=[32], metavar="D", help=what)
    choice(g, "--net", NETS, "conv", "networks of encoder and decoder")
    option(g, "--hidden", "hidden width (default: the net's own)", NATURAL, metavar="N")
    choice(g, "--activation", list(ACTIVATIONS), None, "activation (default: the net's own)")
    choice(g, "--likelihood", LIKELIHOODS, "bernoulli", "p(x|z)")
    # a guide with a factor for each training datum has none for validation images, so it is not
    # offered here: examples/amortization.py trains such guides
    amortized = {name: guide for name, guide in GUIDES.items() if guide.amortized}
    choice(g, "--guide", amortized, "normal", "q(z|x)")
    choice(g, "--prior", PRIORS, "standard_normal", "p(z)")
    what = "components of the priors mixture and vamp (default: 50)"
    option(g, "--components", what, NATURAL, metavar="K")
    what = "share of the encoder's input that training leaves out at random (default: none)"
    option(g, "--dropout", what, _FRACTION, metavar="P")
    what = "give labels y to the pair: p(x|z, y), q(z|x, y)"
    g.add_argument("--conditional", action="store_true", help=what)


def _training_arguments(p: argparse.ArgumentParser) -> Any:
    g = p.add_argument_group("training")
    what = "epochs (default: 10, and at least 1,000 steps)"
    option(g, "-n --num-epochs", what, NATURAL, metavar="N")
    option(g, "-b --batch-size", "batch size", NATURAL, 128, "B")
    option(g, "-lr --learning-rate", "Adam's rate", _POSITIVE, 4e-3, "LR")
    what = "minutes between checkpoints within an epoch"
    option(g, "--checkpoint-minutes", what, _POSITIVE, 5.0, "M")
    return g


def _resume_argument(p: argparse.ArgumentParser, g: Any) -> None:
    option(g, "--resume", "continue the run in this folder", metavar="DIR")
    p.set_defaults(resumable=True)


def _schedule_arguments(g: Any) -> None:
    what = "fraction of training in which the learning rate rises"
    option(g, "--lr-warmup", what, _FRACTION, 0.05, "F")
    choice(g, "--schedule", ["cosine", "constant"], "cosine", "learning rate after its warm-up")
    choice(g, "--objective", OBJECTIVES, "trace_elbo", "what SVI optimizes")
    option(g, "--num-particles", "draws of z for each image", NATURAL, 1, "K")
    what = "weight of the KL; numbers are always reported at 1"
    option(g, "--beta", what, _number(float, 0), 1.0, "BETA")
    what = "fraction of training in which beta rises from 0"
    what += "; of several latent layers also one for each, z1 first"
    g.add_argument("--kl-warmup", nargs="+", type=_FRACTION, default=[0.05], metavar="F", help=what)
    what = "how often beta rises from 0, each time in its share of training"
    option(g, "--kl-cycles", what, NATURAL, 1, "N")
    what = "scale down a gradient above this norm, over all parameters (default: never)"
    option(g, "--clip-norm", what, _POSITIVE, metavar="C")
    what = "at a loss or a gradient that is not finite: stop the run, or skip the batch"
    choice(g, "--on-nan", ["stop", "skip"], "stop", what)
    what = "AdamW's weight decay; a step multiplies it by the learning rate"
    option(g, "--weight-decay", what, _number(float, 0), 0.0, "W")
    what = "validate and keep a moving average of the weights (EMA) with this decay, such as 0.999"
    option(g, "--ema", what, _FRACTION, metavar="D")
    what = "stop after N epochs without a better validation ELBO (default: never)"
    option(g, "--patience", what, NATURAL, metavar="N")


def _run_arguments(p: argparse.ArgumentParser) -> Any:
    g = p.add_argument_group("run")
    option(g, "--seed", "seed of networks, batches and noise", COUNT, 0, "S")
    choice(g, "--device", ["auto", "cpu", "cuda", "mps"], "auto", "device")
    what = "folder of the run, new or empty (default: runs/ and a name)"
    option(g, "--out", what, metavar="DIR")
    g.add_argument("--quiet", action="store_true", help="no progress, only the results")
    return g


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses as `resumed` does, checks, and sets `args.observe`, one of `data.OBSERVATIONS`.

    A wrong argument ends the program with a message, as in `argparse`.
    """
    args = resumed(parser, argv)
    args.observe = _observation(parser, args)
    least = OBJECTIVES[args.objective].min_particles
    if args.num_particles < least:
        parser.error(
            f"--objective {args.objective} needs --num-particles of at least {least}: with 1 it is "
            "the ELBO"
        )
    return args


def resumed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses; with `--resume` the defaults are the run's own arguments, and `args.out` its folder.

    >>> resumed(study_parser("A study.", resumable=True), ["--seed", "3"]).seed
    3
    """
    known = vars(parser.parse_args([]))
    args = parser.parse_args(argv)
    if args.resume is not None:
        try:
            saved = run.read_config(args.resume)["arguments"]
        except ValueError as error:
            parser.error(str(error))
        if unknown := [name for name in saved if name not in known]:
            parser.error(
                f"--resume {args.resume}: that run was made by another program or version of pvae "
                f"(it has {', '.join(unknown[:3])}{', ...' * (len(unknown) > 3)}); here it can be "
                "evaluated, not resumed"
            )
        if args.out is not None:
            parser.error(
                f"--out {args.out} and --resume exclude each other: a run keeps its folder"
            )
        for name, value in saved.items():
            if not _is_like(value, known[name]):
                parser.error(
                    f"--resume {args.resume}: its config.json is damaged: {name} must be as "
                    f"{known[name]!r}, not {value!r}"
                )
        # an argument that is not on the command line keeps the value that the namespace has
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        _refuse_changes(parser, args, saved)
        args.out = args.resume
    return args


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value from a file has the type of the default; True if one of them is None."""
    kinds = {float: (int, float), tuple: (list,)}
    return None in (value, default) or isinstance(value, kinds.get(type(default), type(default)))


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
    """The name of the observation, of `data.OBSERVATIONS`, by the likelihood and the arguments."""
    kind = LIKELIHOODS[args.likelihood].data
    if args.dequantize and args.binarize not in (None, "none"):
        parser.error(f"--dequantize and --binarize {args.binarize} exclude each other: give one")
    named = {"none": "grey", None: data.usual_observation(kind)}
    how = "dequantized" if args.dequantize else named.get(args.binarize, args.binarize)
    if args.as_is or args.standardize:
        if args.dequantize or args.binarize not in (None, "none"):
            parser.error("--as-is and --standardize exclude --binarize and --dequantize")
        how = "as_is"
        if kind not in data.OBSERVATIONS[how].suits:
            parser.error(
                "--as-is and --standardize are for likelihoods of counts and real numbers, not for "
                f"--likelihood {args.likelihood}"
            )
    if args.standardize and kind != "continuous":
        parser.error(f"--standardize gives real numbers; --likelihood {args.likelihood} has {kind}")
    if kind not in data.OBSERVATIONS[how].suits:
        parser.error(
            f"--likelihood {args.likelihood} must have {kind}{' pixels' * (kind != 'counts')}, not "
            f"{data.OBSERVATIONS[how].label} ones"
            + (
                ": for grey ones use --likelihood continuous_bernoulli, or grey_bernoulli (the "
                "cross-entropy, not a likelihood)"
                if kind == "binary"
                else ""
            )
        )
    return how


def schedule(args: argparse.Namespace) -> Schedule:
    """The schedule that the training arguments of a `parser` describe.

    >>> schedule(parser("").parse_args(["--beta", "4"])).beta
    4.0
    """
    return Schedule(
        beta=args.beta,
        kl_warmup=tuple(args.kl_warmup),
        kl_cycles=args.kl_cycles,
        lr_warmup=args.lr_warmup,
        cosine=args.schedule == "cosine",
    )


def run_main(main: Callable[[], None]) -> None:
    """Runs a program's `main`; an error that the user can mend ends it with one plain message.

    The exit status is 1 after an error, 130 after Ctrl-C and 143 after SIGTERM, so that scripts
    notice. With `PVAE_TRACEBACK=1` in the environment, errors keep their traceback.
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
        sys.exit(stop.status if isinstance(stop, Stopped) else 128 + signal.SIGINT)


def _interrupt(signum: int, frame: Any) -> None:
    raise Stopped("", signum)
