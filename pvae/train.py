"""The training loop: SVI over epochs, with progress, validation, cross-check and resume."""

import contextlib
import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from pvae import captured, checkpoint, evaluate
from pvae.crosscheck import STANDARD_ERRORS, TOLERANCE, Check, cross_check, objective_of
from pvae.data import Observed, pixels
from pvae.files import write_atomically
from pvae.objectives import temper
from pvae.optim import SingleOptimizer
from pvae.schedule import Schedule
from pvae.vae import VAE

_LOOKS = 100  # steps after which a loss that is summed on a GPU is looked at
_CHECKED = 250  # images of the fixed validation batch that the cross-check sees
_LINES = 25  # of epochs on the screen, spread over the run; all are in metrics.csv


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and what is left to go on from."""


def spread(epochs: int, count: int) -> set[int]:
    """About `count` epochs spread over all, the first and the last among them.

    >>> sorted(spread(100, 4))
    [1, 34, 67, 100]
    """
    if count >= epochs:
        return set(range(1, epochs + 1))
    return {1 + round(i * (epochs - 1) / (count - 1)) for i in range(count)}


class Trainer:
    """Trains a pair by a stock SVI object, and keeps in a folder what a resumed run needs.

    After each epoch it computes the validation ELBO (always at beta = 1), cross-checks SVI
    against the same loss by hand, and writes `metrics.csv`, `checkpoint.pt` (the last state) and,
    where the validation ELBO is the best so far, `best.pt`. Without a folder nothing is written.
    Labels (or masks) of the data go to a pair that takes them, `vae.takes_y`.

    Args:
        vae: the pair.
        svi: `pyro.infer.SVI` or `pvae.captured.SVI` over `vae.model` and `vae.guide`, with a
            `SingleOptimizer` over the parameters of `vae`.
        data: the observed data set, on the device of `vae`.
        epochs, batch_size: how long, and how many images a step.
        schedule: of the KL's weight and the learning rate.
        precision: of a training step: "fp32", "tf32" (matrix products on a GPU) or "bf16" (the
            networks, by autocast). Numbers are always reported in float32.
        seed: of the shuffles and redrawn pixels; the guide's noise is the global random state's.
        folder: where the run is kept.
        quiet: no progress bar, no line an epoch.
        on_epoch: called after each epoch with the trainer.
        go_on: what a person types to go on with a stopped run, such as "--resume runs/a"; part of
            the message that stops it.

    Raises:
        ValueError: an argument out of its range, an `svi` of another pair or without some of its
            parameters, data outside the likelihood's support or without the `y` that the pair
            takes, or a last batch of one image where the pair has BatchNorm.

    >>> import pyro, pvae
    >>> from pyro.infer import Trace_ELBO
    >>> from pvae.data import load, observe
    >>> data = observe(load("digits"), "dynamic")
    >>> vae = pvae.build((1, 28, 28), latent_dim=2, net="mlp", hidden=16)
    >>> adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
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
        data: Observed,
        *,
        epochs: int,
        batch_size: int,
        schedule: Schedule = Schedule(),  # noqa: B008 (a value that nobody can change)
        precision: str = "fp32",
        seed: int = 0,
        folder: Path | None = None,
        quiet: bool = False,
        on_epoch: Callable[["Trainer"], None] | None = None,
        go_on: str | None = None,
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        schedule.check(epochs)
        if precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision must be one of fp32, tf32, bf16, not {precision!r}")
        _check_belongs(svi, vae)
        _check_data(data, vae, batch_size)
        self.vae, self.svi, self.data = vae, svi, data
        self.optimizer = svi.optim.optimizer
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.schedule, self.precision = schedule, precision
        self.folder, self.quiet, self.on_epoch, self.go_on = folder, quiet, on_epoch, go_on
        self.steps_per_epoch = math.ceil(len(data.train.images) / batch_size)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._kept_epochs = 0
        self._shown = spread(epochs, _LINES)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        first = data.validation.first(_CHECKED)
        self._checked = pixels(first.images), vae.given(first.y)
        with self._explained(*self._checked):
            self.vae.check(*self._checked)
        self._against = self._cross_check(1.0).against  # refused before the run, not after it

    # ---- the loop ----

    def fit(self, until: int | None = None) -> None:
        """Trains from wherever the trainer stands to the last epoch, or to the epoch `until`; the
        schedules are those of all epochs.

        Raises:
            TrainingFailed: the loss is not finite, or Pyro and the hand-written loss disagree.
            KeyboardInterrupt: as it came, with a message that says how to go on.
        """
        images = len(self.data.train.images)
        if not self.quiet:
            self._say(_header(self._against))
        # the bar covers the whole run: it shows images a second and the time left.
        # disable=None: no bar where the output is not a terminal
        with tqdm(
            total=images * self.epochs,
            initial=images * self.epoch,
            unit="img",
            unit_scale=True,
            leave=False,
            disable=True if self.quiet else None,
        ) as bar:
            try:
                while self.epoch < (self.epochs if until is None else until):
                    self._one_epoch(bar)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"stopped in epoch {self.epoch + 1} of {self.epochs}.{self._kept()}"
                ) from None

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def objective(self) -> str:
        """What the column `train_objective` of the history holds."""
        return objective_of(self.svi, self.schedule.beta)

    @property
    def best(self) -> dict[str, float]:
        """The row of the history with the best validation ELBO."""
        return max(self.history, key=lambda row: row["validation_elbo"])

    def _one_epoch(self, bar: Any) -> None:
        start = time.perf_counter()
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        objective = self._train(bar)
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "beta": self._beta(self.step - 1),
            "train_objective": objective,
            **self._validate(),
        }
        check = self._cross_check(row["beta"])
        row["seconds"] = time.perf_counter() - start
        row |= _check_columns(check)
        self.history.append(row)
        self._keep()
        if not self.quiet and self.epoch in self._shown:
            self._say(_line(row, check))
        if check.suspicious:
            self._say(
                f"warning: the sampled KL is off the analytic one by more than "
                f"{STANDARD_ERRORS:g} standard errors: {check}"
            )
        if self.on_epoch is not None:
            self.on_epoch(self)

    def _train(self, bar: Any) -> float:
        """One pass over the data; the mean of the (tempered) objective, nats per image."""
        self.vae.train()
        total: Any = 0.0  # on a GPU a tensor there, which is read now and then
        batches = self.data.batches(self.batch_size, seed=self.seed, epoch=self.epoch)
        for x, y in batches:
            self._set_learning_rate()
            total = total + self._step(x, self.vae.given(y))
            self.step += 1
            bar.update(len(x))
            if self.step % _LOOKS == 0:
                self._finite(float(total))
        return -self._finite(float(total)) / len(self.data.train.images)

    def _step(self, x: Tensor, y: Tensor | None) -> float | Tensor:
        launch = self.svi.launch if isinstance(self.svi, captured.SVI) else self.svi.step
        with temper(self._beta(self.step)), self._precisely(x.device.type), self._explained(x, y):
            loss = launch(x, y)
        # to read a number from a GPU is to wait for it
        return loss if isinstance(loss, Tensor) and loss.is_cuda else self._finite(float(loss))

    @contextlib.contextmanager
    def _explained(self, x: Tensor, y: Tensor | None) -> Iterator[None]:
        """Pyro's validation stops at a number that is not finite: which site it is, in words."""
        try:
            yield
        except ValueError as error:
            try:
                site = evaluate.not_finite(self.vae.model, self.vae.guide, x, y)
            except (ValueError, RuntimeError):  # the pair does not run at all: another error
                site = None
            if site is None:
                raise
            raise TrainingFailed(self._not_finite(f"site {site!r} is not finite")) from error

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrainingFailed(self._not_finite(f"the loss is {loss}"))
        return loss

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
        """The means of the ELBO at beta = 1 and its terms, with fixed noise."""

        def bound(x: Tensor, y: Tensor | None) -> evaluate.Bound:
            y = self.vae.given(y)
            with self._explained(x, y):
                return evaluate.elbo(self.vae.model, self.vae.guide, x, y)

        means = evaluate.over(self.data.validation, bound, batch_size=500, seed=self.seed)
        return {f"validation_{name}": t.mean().item() for name, t in means._asdict().items()}

    def _cross_check(self, beta: float) -> Check:
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

    def _beta(self, step: int) -> float:
        return self.schedule.kl_weight(step, self.epochs * self.steps_per_epoch)

    def _set_learning_rate(self) -> None:
        total = self.epochs * self.steps_per_epoch
        factor = self.schedule.learning_rate_factor(self.step, total)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    # ---- what is kept ----

    def _keep(self) -> None:
        if self.folder is None:
            return
        _write_csv(self.folder / "metrics.csv", self.history)
        if self.best is self.history[-1]:
            notes = {name: self.best[name] for name in ("epoch", "validation_elbo")}
            checkpoint.save(self.vae, self.folder / "best.pt", notes)
        checkpoint.write(self.folder / "checkpoint.pt", self.state())
        self._kept_epochs = self.epoch

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values only."""
        saved = self.optimizer.state_dict()["state"]
        optimizer = {path: saved[i] for i, path in enumerate(self._paths()) if i in saved}
        device = self._checked[0].device
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
        return {
            **checkpoint.pair_state(self.vae),
            "optimizer": optimizer,  # by module path: store names differ from run to run
            "history": self.history,
            "step": self.step,
            "random_state": torch.get_rng_state(),
            "device_random_state": own,
        }

    def restore_best(self) -> None:
        """Puts the model of the best validation ELBO into `vae`, where a folder keeps it."""
        if self.folder is not None:
            path = self.folder / "best.pt"
            checkpoint.restore(self.vae, checkpoint.read(path)["model"], path)

    def resume(self, path: str | Path) -> None:
        """Goes back to the state of a checkpoint; nothing is changed if it does not fit.

        Raises:
            FileNotFoundError, ValueError: no checkpoint, a damaged one, or of another architecture.
        """
        state = checkpoint.read(path)
        checkpoint.restore(self.vae, state["model"], path)
        saved = state["optimizer"]
        by_index = {i: saved[path] for i, path in enumerate(self._paths()) if path in saved}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        self.history, self.step = state["history"], state["step"]
        self._kept_epochs = self.epoch
        torch.set_rng_state(state["random_state"])
        if state["device_random_state"] is not None:
            own = torch.get_device_module(self._checked[0].device)
            own.set_rng_state(state["device_random_state"])

    def _paths(self) -> list[str]:
        """The module path of each parameter, in the optimizer's order."""
        paths = {p: path for path, p in self.vae.named_parameters()}
        return [paths[p] for group in self.optimizer.param_groups for p in group["params"]]

    # ---- what is said ----

    def _say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # a pipe is to see each epoch as it ends

    def _not_finite(self, what: str) -> str:
        return (
            f"{what}, at step {self.step} (epoch {self.epoch + 1}).{self._kept()} Try a smaller "
            "learning rate; with a learned scale, a larger floor or dequantised pixels"
        )

    def _kept(self) -> str:
        if not self._kept_epochs:
            return " Nothing was kept yet."
        by = "" if self.go_on is None else f"; go on by {self.go_on}"
        return (
            f" {self.folder}/checkpoint.pt holds the state after epoch {self._kept_epochs}, "
            f"best.pt the best model so far{by}."
        )


def _check_columns(check: Check) -> dict[str, float]:
    columns = {} if check.relative is None else {"check_relative": check.relative}
    if check.kl_difference is not None:
        columns |= {"check_kl": check.kl_difference.mean, "check_kl_se": check.kl_difference.se}
    return columns


def _header(against: str) -> str:
    return (
        "nats per image; train: the objective at this beta; validation: ELBO at beta = 1\n"
        f"{'epoch':>5} {'beta':>5} {'train':>9} {'validation':>10} {'reconstr.':>10} {'KL':>7} "
        f"{'time':>7}  SVI against {against}"
    )


def _line(row: dict[str, float], check: Check) -> str:
    return (
        f"{row['epoch']:>5} {row['beta']:>5.2f} {row['train_objective']:>9.2f} "
        f"{row['validation_elbo']:>10.2f} {row['validation_reconstruction']:>10.2f} "
        f"{row['validation_kl']:>7.2f} {row['seconds']:>6.1f}s  {check}"
    )


def _check_belongs(svi: SVI, vae: VAE) -> None:
    """Whether `svi` trains `vae`, all of it and nothing else."""
    for name in ("model", "guide"):
        if getattr(svi, name) is not getattr(vae, name):
            raise ValueError(f"svi.{name} must be vae.{name}, the very object, not another program")
    if not isinstance(svi.optim, SingleOptimizer):
        raise ValueError(
            f"svi must have a pvae.SingleOptimizer, not a {type(svi.optim).__name__}: the trainer "
            "schedules and saves one torch optimizer"
        )
    held = {p for group in svi.optim.optimizer.param_groups for p in group["params"]}
    trained = {p: name for name, p in vae.named_parameters() if p.requires_grad}
    missing = [name for p, name in trained.items() if p not in held]
    if missing or len(held - set(vae.parameters())):
        raise ValueError(
            "the optimizer of svi must hold the parameters of vae, not others: "
            + (f"it lacks {', '.join(missing[:3])}" if missing else "it holds foreign ones")
        )


def _check_data(data: Observed, vae: VAE, batch_size: int) -> None:
    if vae.takes_y and data.train.y is None:
        raise ValueError("the pair takes y, but the data has neither labels nor masks")
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in vae.modules())
    if has_batchnorm and len(data.train.images) % batch_size == 1:
        raise ValueError(
            f"batch_size must not leave one image over, which BatchNorm cannot normalize: "
            f"{len(data.train.images):,} training images by {batch_size} do; choose another"
        )


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
