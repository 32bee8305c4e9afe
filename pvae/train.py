"""The training loop: SVI over epochs, with progress, validation, cross-check and resume."""

import contextlib
import csv
import io
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from tqdm import tqdm

from pvae import captured, checkpoint, compatible, evaluate, keeping, processes
from pvae.averaging import Average
from pvae.crosscheck import STANDARD_ERRORS, TOLERANCE, Check, cross_check, objective_of
from pvae.data import Observed, from_torch, observe, pixels
from pvae.files import write_atomically
from pvae.kinds import Fn
from pvae.objectives import part_of_batch, temper
from pvae.optim import NotFinite
from pvae.programs import evaluating
from pvae.results import BATCH, Subject, collapse
from pvae.schedule import Schedule
from pvae.stopping import Asked, Stopped, asked_to_stop
from pvae.vae import VAE

_LOOKS = 100  # steps between two reads of a loss that is summed on a GPU
_CHECKED = 250  # images in the fixed validation batch of the cross-check
_CODED = 1000  # validation images whose codes tell how many units are active
_KINDS = {"optimizer": dict, "history": list, "step": int}  # types of a checkpoint's entries
_LINES = 25  # epochs that get a line on the screen; metrics.csv has all epochs


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message says why, and which state of the run is kept."""


def spread(epochs: int, count: int) -> set[int]:
    """The numbers of about `count` epochs, evenly spread from the first epoch to the last.

    >>> sorted(spread(100, 4))
    [1, 34, 67, 100]
    """
    if count >= epochs:
        return set(range(1, epochs + 1))
    return {1 + round(i * (epochs - 1) / (count - 1)) for i in range(count)}


class Trainer:
    """Trains a pair with a stock SVI object, and keeps in a folder what a resumed run needs.

    After each epoch it computes the validation ELBO (always at beta = 1) and compares SVI's loss
    with the same loss by hand. It then writes `metrics.csv`, `checkpoint.pt` (the last state; the
    state before it stays as `checkpoint.previous.pt`) and, if the validation ELBO is the best so
    far, `best.pt`. It also writes a checkpoint every few minutes within an epoch, and when SIGINT
    or SIGTERM stops the run. On the same processor and versions, with the same number of threads,
    a resumed run ends with the same bits as an uninterrupted run. Without a folder the trainer
    writes nothing.
    A pair that takes labels or masks (`vae.takes_y`) gets those of the data.

    With several processes (`pvae.processes`), each process takes its part of every batch and of
    the splits. Only the first process writes, prints and calls `on_epoch`. Each process draws its
    noise from the seed, its rank and the step.

    Latents outside the data plate, such as Bayesian weights, are drawn once for all images. Their
    KL counts once in an epoch, so each part of a batch bears a share of this KL, and the objective
    is the bound on the whole training set, per image. Each part draws these latents anew; the sum
    over the parts is still unbiased. Validation fixes these latents at one draw for each batch, and
    leaves their KL out.

    Args:
        vae: the pair.
        svi: `pyro.infer.SVI` or `pvae.captured.SVI` over `vae.model` and `vae.guide`, with a
            `SingleOptimizer` over the parameters of `vae`.
        data: the observed data set, on the device of `vae`; or a data set or loader of torch,
            which the trainer reads by `data.from_torch` and observes as "grey".
        epochs, batch_size: the number of epochs, and of images in a step of all processes together.
        schedule: the schedule of the KL's weight and of the learning rate.
        precision: of a training step: "fp32", "tf32" (matrix products on a GPU) or "bf16" (the
            networks, by autocast). Numbers are always reported in float32.
        seed: the seed of the shuffles and of the redrawn pixels. The guide's noise comes from the
            global random state.
        folder: the folder in which the run is kept; it must exist.
        checkpoint_minutes: minutes between checkpoints within an epoch.
        quiet: print no progress bar, and no line for each epoch.
        accumulate: the number of parts, taken one after another, into which each process splits its
            part of a batch that does not fit into memory.
        ema: the decay of a moving average of the weights (`pvae.averaging`). The pair with the
            averaged weights is then validated, kept in `best.pt` and passed to `on_epoch`.
        patience: training stops after so many epochs without a better validation ELBO.
        on_epoch: called after each epoch with the trainer. The random numbers that it draws do not
            change those of training.
        go_on: what a person types to continue a stopped run, such as "--resume runs/a"; the
            message that stops the run shows it.

    Raises:
        ValueError: an argument is out of its range, `svi` is of another pair or lacks some of its
            parameters, the data are outside the likelihood's support or lack the `y` that the pair
            takes, or the last batch has one image and the pair has BatchNorm. With batches in
            parts also: `batch_size` is not a multiple of the number of parts, the loss is not a sum
            over images (if your own ELBO is such a sum, set `sums_over_images = True`), the pair
            has BatchNorm or an observed site outside the data plate, or a split has fewer images
            than there are processes.
        TrainingFailed: the first cross-check fails, or a number in it is not finite.

    >>> import pyro, pvae
    >>> from pyro.infer import Trace_ELBO
    >>> from pvae.data import load, observe
    >>> data = observe(load("digits"), "dynamic")
    >>> vae = pvae.build((1, 28, 28), latent_dim=2, net="mlp", hidden=16)
    >>> adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    >>> svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    >>> trainer = Trainer(vae, svi, data, epochs=2, batch_size=256, quiet=True)
    >>> trainer.fit()
    >>> [row["epoch"] for row in trainer.history]
    [1, 2]
    """

    def __init__(
        self,
        vae: VAE,
        svi: SVI,
        data: Observed | torch.utils.data.Dataset[Any] | torch.utils.data.DataLoader[Any],
        *,
        epochs: int,
        batch_size: int,
        schedule: Schedule = Schedule(),  # noqa: B008 (a value that nobody can change)
        precision: str = "fp32",
        seed: int = 0,
        accumulate: int = 1,
        ema: float | None = None,
        patience: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        checkpoint_minutes: float = 5.0,
        quiet: bool = False,
        on_epoch: Callable[["Trainer"], None] | None = None,
        go_on: str | None = None,
    ) -> None:
        positive = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate}
        for name, value in (positive | {"patience": patience}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes must be above 0, not {checkpoint_minutes}")
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"folder must be a folder that is there, not {os.fspath(folder)!r}")
        schedule.check(epochs)
        compatible.check_layers(schedule, vae)
        if precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision must be one of fp32, tf32, bf16, not {precision!r}")
        compatible.check_svi(svi, vae)
        if not isinstance(data, Observed):
            device = next(vae.parameters()).device
            data = observe(from_torch("data", data), "grey").to(device)
        compatible.check_data(data, vae, batch_size)
        self.parts = processes.count() * accumulate  # of a batch, over all processes
        if self.parts > 1:
            compatible.check_parts(svi, vae, data, batch_size, self.parts)
        self.vae, self.svi, self.data = vae, svi, data
        self.optimizer = svi.optim.optimizer
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.schedule, self.precision, self.patience = schedule, precision, patience
        self.average = None if ema is None else Average(vae, ema)
        self.folder = None if folder is None else Path(folder)
        self.on_epoch, self.go_on = on_epoch, go_on
        self.quiet = quiet or not processes.is_first()
        self.steps_per_epoch = math.ceil(len(data.train.images) / batch_size)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._sum: float | Tensor = 0.0  # of the epoch's losses; on a GPU it is a tensor
        self._images: int | Tensor = 0  # images whose losses are in the sum
        self._asked, self._stored = Asked(), ""  # the signal; the last checkpoint's position
        self.checkpoint_minutes, self._stored_at = checkpoint_minutes, time.perf_counter()
        self._told_collapse = False
        self._shown = spread(epochs, _LINES)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        first = data.validation.first(_CHECKED)
        self._checked = pixels(first.images), vae.given(first.y)
        with self._explained(*self._checked):
            parts = (data.train.images, data.validation.images, data.test.images)
            self.vae.check(*self._checked, [x for x in parts if x.is_floating_point()])
            self._shared = compatible.shared_latents(svi, vae, *self._checked, self.parts)
        self._against = self._cross_check(1.0).against  # a wrong loss fails here, before the run

    # ---- the loop ----

    def fit(self, until: int | None = None) -> None:
        """Trains from the current step to the end of the last epoch, or of the epoch `until`.

        The schedules always span all epochs, whatever `until` is.

        Raises:
            TrainingFailed: the loss or a gradient is not finite, Pyro and the hand-written loss
                disagree, or a file of the run cannot be written.
            pvae.stopping.Stopped: Ctrl-C or SIGTERM stopped the run (the error is also a
                `KeyboardInterrupt`). The step is finished and the state kept first; the message
                says how to continue. A second signal stops at once.
            ConnectionError: another process has ended or does not answer; the message says how to
                continue.
        """
        processes.copy_from_first([*self.vae.parameters(), *self.vae.buffers()])
        images = len(self.data.train.images)
        self._prepare()
        if not self.quiet:
            self._say(_header(self._against, self.data.unit))
        # the bar covers the whole run: it shows images a second and the time left.
        # disable=None: no bar where the output is not a terminal
        with (
            tqdm(
                total=images * self.epochs,
                initial=images * self.epoch + min(images, self._batch * self.batch_size),
                unit="img",
                unit_scale=True,
                leave=False,
                disable=True if self.quiet else None,
            ) as bar,
            asked_to_stop() as self._asked,
        ):
            self._stored_at = time.perf_counter()
            try:
                while self.epoch < (self.epochs if until is None else until):
                    if self._out_of_patience():
                        self._say(f"no better validation ELBO for {self.patience} epochs: stopped")
                        break
                    self._one_epoch(bar)
                    self._pause()
            except KeyboardInterrupt:
                at = f"stopped in epoch {min(self.epoch + 1, self.epochs)} of {self.epochs}."
                signum = self._asked.signum or signal.SIGINT
                raise Stopped(at + self._kept(), signum) from None
            except ConnectionError as error:
                raise ConnectionError(f"{error}.{self._kept()}") from error

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def objective(self) -> str:
        """The name of the objective in the column `train_objective` of the history."""
        return objective_of(self.svi, self.schedule.beta)

    @property
    def best(self) -> dict[str, float]:
        """The row of the history with the best validation ELBO."""
        return max(self.history, key=lambda row: row["validation_elbo"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the pair has the averaged weights, if `ema` is given."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield

    def _out_of_patience(self) -> bool:
        return self.patience is not None and (
            self.epoch > 0 and self.epoch - self.best["epoch"] >= self.patience
        )

    def _one_epoch(self, bar: Any) -> None:
        start = time.perf_counter()
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        objective = self._train(bar)
        with self.averaged(), evaluating(self.vae):
            row = {
                "epoch": self.epoch + 1,
                "step": self.step,
                "beta": min(self._betas(self.step - 1)),
                "train_objective": objective,
                **self._validate(),
                "active_units": self._active_units(),
                "skipped": self._skipped(),
            }
        check = self._cross_check(row["beta"])
        row["seconds"] = time.perf_counter() - start
        row |= _check_columns(check)
        self.history.append(row)
        self._keep()
        if not self.quiet and self.epoch in self._shown:
            self._say(_line(row, check))
        self._tell_collapse(row)
        if check.suspicious:
            self._say(
                f"warning: the sampled KL is off the analytic one by more than "
                f"{STANDARD_ERRORS:g} standard errors: {check}"
            )
        if self.on_epoch is not None and processes.is_first():
            with self.averaged(), evaluate.fixed_noise(self._checked[0].device, self.seed):
                self.on_epoch(self)

    def _train(self, bar: Any) -> float:
        """Makes one pass over the data; returns the mean (tempered) objective, nats per image."""
        self.vae.train()
        images = len(self.data.train.images)
        # a resumed epoch skips the batches that it has already taken
        for x, y in self.data.batches(
            self.batch_size, seed=self.seed, epoch=self.epoch, skip=self._batch
        ):
            self._set_learning_rate()
            y = self.vae.given(y)
            self._count(self._step(x, y), len(x))
            if (self.step + 1) % _LOOKS == 0:
                self._look(x, y)
            bar.update(min(self.batch_size, images - self._batch * self.batch_size))
            if self.average is not None:
                self.average.update(self.step)
            self.step += 1
            self._pause()
        self._look(*self._checked)
        if not (counted := processes.total(float(self._images))):
            raise TrainingFailed(self._not_finite("every batch of the epoch was left out"))
        mean = -processes.total(float(self._sum)) / counted
        self._sum, self._images = 0.0, 0
        return mean

    def _prepare(self) -> None:
        """Captures the step of each batch size before the first step, so that all steps of a run,
        and of a run that resumes it, execute the same code."""
        if not isinstance(self.svi, captured.SVI):
            return
        self.vae.train()
        x, y = next(self.data.batches(self.batch_size, seed=self.seed, epoch=0))
        y = self.vae.given(y)
        last = len(self.data.train.images) % self.batch_size
        mine = len(range(last)[processes.part(last)])
        rest = x[:mine], None if y is None else y[:mine]
        sizes = {
            len(part): (part, its_y) for part, its_y in [*self._parts(x, y), *self._parts(*rest)]
        }
        for part, its_y in sizes.values():
            with self._around_a_step(part), self._explained(part, its_y):
                self.svi.prepare(part, its_y)

    @property
    def _batch(self) -> int:
        """The number of finished batches of this epoch."""
        return self.step - self.epoch * self.steps_per_epoch

    def _step(self, x: Tensor, y: Tensor | None) -> float | Tensor | None:
        """Takes a step on this process's images; returns its loss, or None for a batch left out."""
        optim, left_out = self.svi.optim, self.svi.optim.left_out + 0
        try:
            with self._explained(x, y):
                loss = self._launch(x, y) if self.parts == 1 else self._launch_parts(x, y)
                # reading a number from a GPU waits for all its work, so only `_look` reads it
                if isinstance(loss, Tensor) and loss.is_cuda:
                    return loss
                return _finite(float(loss)) if optim.left_out == left_out else None
        except TrainingFailed:
            if optim.on_nan == "stop" or optim.left_out != left_out:
                raise
            optim.left_out += 1  # Pyro refused the values of a site, so no gradient exists
            return None

    def _launch_parts(self, x: Tensor, y: Tensor | None) -> float | Tensor:
        if processes.count() > 1:  # then a resumed run needs no random states of processes
            torch.manual_seed(processes.seed(self.seed, self.step))
        total: Any = 0.0
        with self.svi.optim.summing():
            for part, its_y in self._parts(x, y):
                total = total + self._launch(part, its_y)
        return total

    def _parts(self, x: Tensor, y: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Splits this process's images of a batch into the parts that it takes one by one."""
        size = self.batch_size // self.parts
        ys = itertools.repeat(None) if y is None else y.split(size)
        return [(part, its_y) for part, its_y in zip(x.split(size), ys, strict=False) if len(part)]

    def _launch(self, x: Tensor, y: Tensor | None) -> float | Tensor:
        launch = self.svi.launch if isinstance(self.svi, captured.SVI) else self.svi.step
        with self._around_a_step(x):
            return launch(x, y)

    @contextlib.contextmanager
    def _around_a_step(self, x: Tensor) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            betas = self._betas(self.step)
            for layer, beta in enumerate(betas, start=1):
                stack.enter_context(temper(beta, f"z{layer}" if len(betas) > 1 else None))
            stack.enter_context(self._by_image(x))
            stack.enter_context(self._precisely(x.device.type))
            yield

    def _by_image(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Weights the latents that all images share by the fraction of the training set in `x`."""
        if not self._shared:
            return contextlib.nullcontext()
        return part_of_batch(len(x) / len(self.data.train.images))

    def _at_one_draw(self, x: Tensor, y: Tensor | None) -> tuple[Fn, Fn]:
        """Model and guide, in which one draw fixes the latents that all images share."""
        pair = self.vae.model, self.vae.guide
        if not self._shared:
            return pair
        drawn = poutine.trace(self.vae.guide).get_trace(x, y)
        fixed = {name: drawn.nodes[name]["value"] for name in self._shared}
        model, guide = (poutine.block(poutine.condition(p, fixed), hide=[*fixed]) for p in pair)
        return model, guide

    def _count(self, loss: float | Tensor | None, images: int) -> None:
        """Adds the loss of a batch to the epoch's sum, unless the batch was left out."""
        if isinstance(loss, Tensor):
            finite = loss.isfinite()
            skip = self.svi.optim.on_nan == "skip"
            self._sum = self._sum + (torch.where(finite, loss, 0.0) if skip else loss)
            self._images = self._images + (finite * images if skip else images)
        elif loss is not None:
            self._sum, self._images = self._sum + loss, self._images + images

    def _look(self, x: Tensor, y: Tensor | None) -> None:
        """Reads the sum of the losses, and raises if it or a gradient was not finite."""
        with self._explained(x, y):
            _finite(float(self._sum))
            if self.svi.optim.on_nan == "stop" and int(self.svi.optim.left_out):
                raise NotFinite(
                    "a gradient is not finite, and the steps since are left out; the last "
                    f"{_LOOKS} steps are in question"
                )

    @contextlib.contextmanager
    def _explained(self, x: Tensor, y: Tensor | None) -> Iterator[None]:
        """Reports a number that is not finite as `TrainingFailed`, with its site or parameter."""
        try:
            yield
        except (ValueError, NotFinite) as error:
            try:
                site = evaluate.not_finite(self.vae.model, self.vae.guide, x, y)
            except (ValueError, RuntimeError):  # the pair does not run at all: another error
                site = None
            if site is not None:
                what = f"site {site!r} is not finite"
            elif isinstance(error, NotFinite):
                what = self._named(error)
            else:
                raise
            raise TrainingFailed(self._not_finite(what)) from error

    def _named(self, error: NotFinite) -> str:
        names: dict[Tensor, str] = {p: name for name, p in self.vae.named_parameters()}
        bad = [names[p] for p in error.parameters]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"{error}" + (f", of {', '.join(bad[:3])}{more}" if bad else "")

    @contextlib.contextmanager
    def _precisely(self, device: str) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else before)
        try:
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _validate(self) -> dict[str, float]:
        """The validation means of the ELBO at beta = 1 and of its terms, with fixed noise."""

        def bound(x: Tensor, y: Tensor | None) -> evaluate.Bound:
            with self._explained(x, y), self._by_image(x):
                return evaluate.elbo(*self._at_one_draw(x, y), x, y)

        subject = Subject(self.vae, self.data, self.seed, quiet=True)
        size = min(BATCH, len(self.data.train.images))  # `_by_image` takes no larger batch
        means = subject.over(self.data.validation, bound, size)
        return {f"validation_{name}": t.mean().item() for name, t in means._asdict().items()}

    def _active_units(self) -> int:
        """The number of active units of the (first) latent."""

        def means(x: Tensor, y: Tensor | None) -> Tensor:
            y = self.vae.given(y)
            return evaluate.posterior_means(self._at_one_draw(x, y)[1], x, y)

        first = self.data.validation.first(_CODED)
        codes = evaluate.over(first, means, batch_size=BATCH, seed=self.seed)
        self._units = codes.shape[1]
        return evaluate.active_units(codes)

    def _skipped(self) -> int:
        """The number of batches of this epoch that were left out."""
        before = sum(row.get("skipped", 0) for row in self.history)
        return int(self.svi.optim.left_out - before)

    def _tell_collapse(self, row: Mapping[str, float]) -> None:
        """Warns, once, if hardly any unit is active after the warm-up."""
        early = max(*self.schedule.warmups, self.schedule.lr_warmup, 0.1) * self.epochs
        if self.quiet or self._told_collapse or self.epoch <= early:
            return
        if text := collapse(row["active_units"], self._units):
            self._told_collapse = True
            self._say(f"{text} (epoch {self.epoch})")

    def _cross_check(self, beta: float) -> Check:
        return processes.from_first(lambda: self._checked_by_hand(beta))

    def _checked_by_hand(self, beta: float) -> Check:
        with self._explained(*self._checked):
            check = cross_check(self.svi, self.vae, *self._checked, beta=beta, seed=self.seed)
        if not check.agrees:
            when = f"after epoch {self.epoch + 1}" if self.step else "before the first epoch"
            raise TrainingFailed(
                f"the cross-check failed {when}: at the same noise, SVI's loss and that by "
                f"{check.against} differ by {check.relative:.2e}, relative ({TOLERANCE:g} is "
                "allowed). The model, the guide or the loss by hand is not what it claims to be"
            )
        return check

    # ---- schedules ----

    def _betas(self, step: int) -> list[float]:
        total = self.epochs * self.steps_per_epoch
        layers = range(len(self.schedule.warmups))
        return [self.schedule.kl_weight(step, total, layer) for layer in layers]

    def _set_learning_rate(self) -> None:
        total = self.epochs * self.steps_per_epoch
        factor = self.schedule.learning_rate_factor(self.step, total)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    # ---- files and checkpoints ----

    def _keep(self) -> None:
        """Writes the files of a finished epoch; only the first process writes."""
        if self.folder is None:
            return
        if processes.is_first():
            self._keep_best(self.folder)
        self._store()

    def _keep_best(self, folder: Path) -> None:
        with self._room():
            _write_csv(folder / "metrics.csv", self.history)
            if self.best is self.history[-1]:
                notes = {name: self.best[name] for name in ("epoch", "validation_elbo")}
                with self.averaged():
                    checkpoint.save(self.vae, folder / "best.pt", notes)

    def _store(self) -> None:
        """Writes a checkpoint, within an epoch or after it."""
        if self.folder is None:
            return
        state = self.state()  # all processes compute it together: it holds their sums
        with self._room():
            if processes.is_first():
                keeping.write(self.folder, state)
        processes.wait()  # until the file is complete, so that every process can read it
        self._stored, self._stored_at = self._position(), time.perf_counter()

    def _pause(self) -> None:
        """Writes a checkpoint if it is due, and stops if a signal came; all processes agree."""
        due = time.perf_counter() - self._stored_at >= 60 * self.checkpoint_minutes
        asked, due = processes.any_of(self._asked.signum is not None, due)
        if (asked or due) and self._stored != self._position():
            self._store()
        if asked:
            raise KeyboardInterrupt

    def _position(self) -> str:
        if not self._batch:
            return f"after epoch {self.epoch}"
        return f"after batch {self._batch} of {self.steps_per_epoch} in epoch {self.epoch + 1}"

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Turns a failed write, as on a full disk, into `TrainingFailed`."""
        try:
            yield
        except OSError as error:
            raise TrainingFailed(
                f"the run cannot be kept in {self.folder}: {error}.{self._kept()}"
            ) from error

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values only."""
        saved = self.optimizer.state_dict()["state"]
        optimizer = {path: saved[i] for i, path in enumerate(self._paths()) if i in saved}
        device = self._checked[0].device
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
        alone = processes.count() == 1
        return {
            **checkpoint.pair_state(self.vae),
            "optimizer": optimizer,  # by module path, as Pyro's store names differ between runs
            "history": self.history,
            "step": self.step,
            "sum": self._sum if alone else processes.total(float(self._sum)),
            "images": self._images if alone else processes.total(float(self._images)),
            "left_out": int(self.svi.optim.left_out),
            "average": {} if self.average is None else self.average.state(),
            "random_state": torch.get_rng_state(),
            "device_random_state": own,
        }

    def restore_best(self) -> None:
        """Loads the model of the best validation ELBO into `vae`, if the run has a folder.

        Raises:
            FileNotFoundError, ValueError: the folder has no `best.pt`, or the file is damaged.
        """
        if self.folder is not None:
            path = self.folder / "best.pt"
            checkpoint.restore(self.vae, checkpoint.read(path)["model"], path)

    def resume(self, path: str | Path) -> None:
        """Restores the state of a checkpoint.

        If the file is damaged, the checkpoint before it takes its place, and a line says so. A
        checkpoint of another architecture changes nothing.

        Raises:
            FileNotFoundError, ValueError: there is no checkpoint, or it is damaged or of another
                architecture.
        """
        state = processes.from_first(lambda: keeping.read(Path(path)))
        try:
            self._go_back(state, path)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is not a checkpoint to go on from: {error!r}") from error

    def _go_back(self, state: dict[str, Any], path: str | Path) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(state[name], kind):
                raise TypeError(f"{name} must be a {kind.__name__}")
        for row in state["history"]:
            float(row["validation_elbo"])
        saved, paths = state["optimizer"], self._paths()
        if self.average is not None and not state["average"]:
            raise KeyError("average")
        checkpoint.restore(self.vae, state["model"], path)
        if unknown := saved.keys() - paths:
            raise KeyError(*unknown)
        by_index = {i: saved[path] for i, path in enumerate(paths) if path in saved}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        self.history, self.step = state["history"], state["step"]
        device = self._checked[0].device
        self._sum, self._images = (
            (t.to(device) if isinstance(t, Tensor) else t) if processes.is_first() else 0
            for t in (state.get("sum", 0.0), state.get("images", 0))
        )
        self.svi.optim.left_out = state.get("left_out", 0)
        if self.average is not None:
            self.average.go_back(state["average"])
        self._stored = self._position()
        torch.set_rng_state(state["random_state"])
        if state["device_random_state"] is not None:
            own = torch.get_device_module(device)
            own.set_rng_state(state["device_random_state"])

    def _paths(self) -> list[str]:
        """The module path of each parameter, in the optimizer's order."""
        paths = {p: path for path, p in self.vae.named_parameters()}
        return [paths[p] for group in self.optimizer.param_groups for p in group["params"]]

    # ---- messages ----

    def _say(self, text: str) -> None:
        if not processes.is_first():
            return
        tqdm.write(text)
        sys.stdout.flush()  # so that a pipe gets the line of each epoch at once

    def _not_finite(self, what: str) -> str:
        batch = f"batch {self._batch + 1} of {self.steps_per_epoch}"
        where = batch if self._batch < self.steps_per_epoch else "behind its last batch"
        return (
            f"{what}, at step {self.step} (epoch {self.epoch + 1}, {where}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}).{self._kept()} Try a smaller learning "
            "rate or --clip-norm; with a learned scale, a larger floor or dequantised pixels"
        )

    def _kept(self) -> str:
        if not self._stored:
            return " Nothing was kept yet."
        best = ", best.pt the best model so far" if self.history else ""
        by = "" if self.go_on is None else f"; go on by {self.go_on}"
        return f" {self.folder}/checkpoint.pt holds the state {self._stored}{best}{by}."


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NotFinite(f"the loss is {loss}")
    return loss


def _check_columns(check: Check) -> dict[str, float]:
    columns = {} if check.relative is None else {"check_relative": check.relative}
    if check.kl_difference is not None:
        columns |= {"check_kl": check.kl_difference.mean, "check_kl_se": check.kl_difference.se}
    return columns


def _header(against: str, unit: str) -> str:
    return (
        f"nats per {unit}; train: the objective at this beta; validation: ELBO at beta = 1\n"
        f"{'epoch':>5} {'beta':>5} {'train':>9} {'validation':>10} {'reconstr.':>10} {'KL':>7} "
        f"{'active':>6} {'time':>7}  SVI against {against}"
    )


def _line(row: dict[str, float], check: Check) -> str:
    return (
        f"{row['epoch']:>5} {row['beta']:>5.2f} {row['train_objective']:>9.2f} "
        f"{row['validation_elbo']:>10.2f} {row['validation_reconstruction']:>10.2f} "
        f"{row['validation_kl']:>7.2f} {row['active_units']:>6} "
        f"{row['seconds']:>6.1f}s  {check}"
        + (f"  {row['skipped']} batches left out" if row["skipped"] else "")
    )


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
