"""Several processes train one pair as a single process does: gradients, data, noise, errors.

The processes are started once for all tests. Each job has its own group of processes, on loopback.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from conftest import example, tiny
from pyro.distributions import Independent, Normal
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor, nn

import pvae
from pvae import captured, crosscheck, data, processes, study, train
from pvae.objectives import OBJECTIVES, kl_by_unit
from pvae.train import Trainer

CPU = torch.device("cpu")
SLOW = pytest.mark.slow
IMAGES, BATCH, EPOCHS = 50, 12, 4  # 5 steps an epoch; the last batch has 2 images


# ---- processes that do jobs ----


def serve(connection: Any) -> None:
    """Receives jobs in a process of its own, and does one after another."""
    torch.set_num_threads(1)
    while True:
        environment, job, arguments = connection.recv()
        os.environ.update(environment)
        pyro.clear_param_store()
        torch.manual_seed(0)
        try:
            processes.start(CPU, timeout=20.0)
            result = job(*arguments)
        except Exception as error:
            result = error
        processes.stop()
        connection.send(result)


class Workers:
    """Four processes; a job runs on the first `n` of them."""

    def __init__(self) -> None:
        # this process may have threads, so the workers are forked from one that only imports
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pvae", "conftest", "sklearn.datasets"])
        self.workers = [self._new() for _ in range(4)]

    def _new(self) -> Any:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return SimpleNamespace(process=process, connection=ours)

    def __call__(self, n: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what `job(*arguments)` returns or raises in each process; None if killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
        for rank, worker in enumerate(self.workers[:n]):
            given = {**group, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            worker.connection.send(({k: str(v) for k, v in given.items()}, job, arguments))
        return [self._result(rank) for rank in range(n)]

    def _result(self, rank: int) -> Any:
        try:
            return self.workers[rank].connection.recv()
        except (EOFError, ConnectionResetError):
            self.workers[rank] = self._new()
            return None


@pytest.fixture(scope="module")
def run() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    for worker in workers.workers:
        worker.process.terminate()
        worker.process.join()
        worker.connection.close()


# ---- a pair whose noise is a function of the image, so it is the same in every process ----


class Same(Normal):
    """A normal distribution whose draw is a function of its mean."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = (5 * self.loc.detach()).cos()
        return (self.loc + self.scale * noise).expand(self._extended_shape(sample_shape))


class SameNoise(nn.Module):
    def __init__(self, posterior: nn.Module) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, x: Tensor) -> Independent:
        q = self.posterior(x).base_dist
        return Independent(Same(q.loc, q.scale), 1)


def observed(images: int = IMAGES, dtype: torch.dtype = torch.float64) -> data.Observed:
    generator = torch.Generator().manual_seed(1)
    splits = [
        data.Split(torch.rand(n, 1, 8, 8, generator=generator).round().to(dtype), None)
        for n in (images, 11, 9)
    ]
    return data.Observed("as_is", *splits, None)


def pair(net: str, dtype: torch.dtype) -> pvae.VAE:
    torch.manual_seed(2)
    vae = tiny(net=net).to(dtype)
    guide = pvae.Guide(SameNoise(vae.guide.posterior))
    return pvae.VAE(pvae.Model(vae.model.prior, vae.model.likelihood), guide)


def trainer(
    net: str = "mlp",
    engine: str = "eager",
    dtype: torch.dtype = torch.float64,
    vae: pvae.VAE | None = None,
    **settings: Any,
) -> Trainer:
    vae = pair(net, dtype) if vae is None else vae
    adam = torch.optim.Adam(vae.parameters(), lr=1e-2, eps=1e-3)
    arguments = vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO()
    svi = SVI(*arguments)
    if engine == "captured":
        svi = captured.SVI(*arguments, compiler=captured.as_traced, strict=True)
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "quiet": True, **settings}
    return Trainer(vae, svi, observed(dtype=dtype), **settings)


def outcome(t: Trainer) -> tuple[list[Tensor], list[float]]:
    names = ("train_objective", "validation_elbo", "validation_kl")
    numbers = [row[name] for row in t.history for name in names]
    return [p.detach().clone() for p in t.vae.parameters()], numbers


def trained(*arguments: Any, until: int | None = None, **settings: Any) -> Any:
    t = trainer(*arguments, **settings)
    t.fit(until)
    return *outcome(t), getattr(t.svi, "engine", "eager"), t.step


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert found[1] == pytest.approx(expected[1], rel=10 * tolerance)


@pytest.mark.parametrize(
    ("n", "engine", "net"),
    [
        (2, "eager", "mlp"),
        pytest.param(2, "captured", "conv", marks=SLOW),
        pytest.param(4, "eager", "conv", marks=SLOW),
        (4, "captured", "mlp"),
        pytest.param(2, "eager", "conv", marks=SLOW),
        pytest.param(2, "captured", "mlp", marks=SLOW),
        pytest.param(4, "eager", "mlp", marks=SLOW),
        pytest.param(4, "captured", "conv", marks=SLOW),
    ],
)
def test_training_is_that_of_one_process(run, n, engine, net):
    """Parameters and history agree after 20 steps, although last batches leave processes idle."""
    expected = trained(net)
    for found in run(n, trained, net, engine):
        assert_same(found, expected, 1e-10)
        assert found[2:] == (engine, 20)


def test_training_is_that_of_one_process_in_float32(run):
    for found in run(2, trained, "mlp", "eager", torch.float32):
        assert_same(found, trained("mlp", dtype=torch.float32), 1e-5)


def accumulated(engine: str, k: int) -> Any:
    return trained("mlp", engine, accumulate=k)


@pytest.mark.parametrize("engine", ["eager", "captured"])
def test_a_batch_in_parts_is_the_batch(run, engine):
    expected = trained("mlp")
    assert_same(accumulated(engine, 3), expected, 1e-10)
    for found in run(2, accumulated, engine, 3):
        assert_same(found, expected, 1e-10)


def in_bf16(k: int) -> Any:
    return trained("mlp", dtype=torch.float32, accumulate=k, precision="bf16")


def test_bf16_trains_in_parts(run):
    """In bfloat16, one process with parts and two processes come near the float32 run."""
    expected = trained("mlp", dtype=torch.float32)
    first, second = run(2, in_bf16, 1)
    for found in (in_bf16(3), first, second):
        assert not torch.equal(found[0][0], expected[0][0])
        assert found[1] == pytest.approx(expected[1], rel=0.02)


def bayesian(engine: str) -> list[Tensor]:
    """Trains an epoch in the loop of `examples/bayesian_decoder.py`; returns the parameters."""
    from bayesian_decoder import BayesianGuide, BayesianModel

    vae = pair("mlp", torch.float64)
    model = BayesianModel(vae.model.prior, vae.model.likelihood, IMAGES)
    guide = BayesianGuide(vae.guide.posterior, vae.model.likelihood, IMAGES)
    adam = pvae.SingleOptimizer(torch.optim.Adam(guide.parameters(), lr=1e-2, eps=1e-3))
    svi = SVI(model, guide, adam, TraceMeanField_ELBO())
    if engine == "captured":
        svi = captured.SVI(
            model, guide, adam, TraceMeanField_ELBO(), compiler=captured.as_traced, strict=True
        )
    for x, _ in observed().batches(11, seed=0, epoch=0):  # two processes get 6 and 5 of them
        torch.manual_seed(3)  # the weights are drawn first, so they are equal in all processes
        with pvae.part_of_batch(len(x) / processes.total(len(x))):
            svi.step(x)
    return [p.detach() for p in guide.parameters()]


@pytest.mark.parametrize("engine", ["eager", "captured"])
def test_weights_for_all_images_count_once(run, engine):
    expected = bayesian("eager")
    for found in run(2, bayesian, engine):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Scaled(pvae.Model):
    """A model in which one Bayesian weight for all images scales their latents.

    If `images` is given, the plate has all training images and the batch is its subsample.
    """

    images: int | None = None

    def forward(self, x: Any = None, y: Any = None, *, size: int = 1) -> Any:
        self.register()
        w = pyro.sample("w", Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", self.images or len(x), subsample=x if self.images else None):
            return pyro.sample("x", self.likelihood(w * pyro.sample("z", self.prior())), obs=x)


class Scaling(pvae.Guide):
    images: int | None = None

    def __init__(self, posterior: nn.Module) -> None:
        super().__init__(posterior)
        self.loc = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Any = None, y: Any = None, **of_others: Any) -> Any:
        self.register()
        pyro.sample("w", Same(self.loc, 0.1))
        with pyro.plate("data", self.images or len(x), subsample=x if self.images else None):
            return pyro.sample("z", self.posterior(x))


def with_weight(images: int | None = None) -> pvae.VAE:
    vae = pair("mlp", torch.float64)
    model = Scaled(vae.model.prior, vae.model.likelihood)
    guide = Scaling(vae.guide.posterior)
    model.images = guide.images = images
    return pvae.VAE(model, guide)


def weighted(engine: str, accumulate: int, images: int | None) -> Any:
    return trained(engine=engine, vae=with_weight(images), accumulate=accumulate)


@pytest.mark.parametrize(
    ("engine", "images"), [("eager", IMAGES), pytest.param("captured", None, marks=SLOW)]
)
def test_the_trainer_counts_a_weight_for_all_images_once(run, engine, images):
    """At the same draw of the weight, parts and processes give the parameters of one process."""
    expected = weighted("eager", 1, None)
    (loc,) = (p for p in expected[0] if not p.dim())
    assert (loc - 1).abs() > 1e-3  # the weight was trained
    assert_same(weighted(engine, 3, images), expected, 1e-10)
    for found in run(2, weighted, engine, 2, images):
        assert_same(found, expected, 1e-10)
        assert found[2] == engine


# ---- data and noise ----


def batches(how: str) -> list[Tensor]:
    digits = data.load("digits")
    return [x for x, _ in data.observe(digits, how).batches(100, seed=3, epoch=1)]


@pytest.mark.parametrize(
    "how", ["dynamic", *(pytest.param(how, marks=SLOW) for how in ("grey", "dequantized"))]
)
def test_the_parts_of_each_batch_are_that_of_one_process(run, how):
    for *parts, whole in zip(*run(4, batches, how), batches(how), strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat(parts), whole)


def shares(n: int) -> tuple[Tensor, Tensor]:
    mine = torch.arange(n)[processes.part(n)]
    return mine, processes.gather(mine[:, None].double(), n)


def refused_by_first() -> None:
    def refuse() -> None:
        raise ValueError(f"refused by {processes.rank()}")

    processes.from_first(refuse)


def test_what_the_first_process_raises_all_raise(run):
    assert [str(error) for error in run(4, refused_by_first)] == ["refused by 0"] * 4


def cross_checks() -> tuple[int, list[float]]:
    """Returns how often this process makes the cross-check, and the differences in its history."""
    made = []

    def noted(*arguments: Any, **settings: Any) -> Any:
        made.append(crosscheck.cross_check(*arguments, **settings))
        return made[-1]

    train.cross_check = noted
    try:
        t = trainer(epochs=2)
        t.fit()
    finally:
        train.cross_check = crosscheck.cross_check
    return len(made), [row["check_relative"] for row in t.history]


def test_the_first_process_makes_the_cross_check(run):
    (first, found), (second, told) = run(2, cross_checks)
    assert (first, second) == (3, 0)
    assert found == told


def test_each_of_n_things_is_in_one_share(run):
    for n in (4, 7, 16):
        parts, gathered = zip(*run(4, shares, n), strict=True)
        assert torch.cat(parts).tolist() == list(range(n))
        for rows in gathered:
            assert rows.flatten().tolist() == list(range(n))


def seeds() -> list[int]:
    t, found = trainer(epochs=1), []

    def note(module: nn.Module, inputs: Any) -> None:
        if module.training:
            found.append(torch.initial_seed())

    t.vae.guide.posterior.register_forward_pre_hook(note)
    t.fit()
    return found


def test_noise_differs_by_process_and_by_step(run):
    found = [seed for of_one in run(2, seeds) for seed in of_one]
    assert len(found) == len(set(found)) == 10


# ---- gradients ----


def lone_gradients() -> tuple[list[float], list[Any]]:
    """Makes steps in which each process has the gradient of one parameter, not the same one."""
    a, b = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = pvae.SingleOptimizer(torch.optim.SGD([a, b], lr=1.0))
    mine = (a, b)[processes.rank()]
    for _ in range(2):
        mine.grad = torch.tensor(1.0 + processes.rank())
        optimizer([mine])
        mine.grad = None
    return [a.item(), b.item()], [a.grad, b.grad]


def test_a_gradient_that_one_process_has_counts_once_a_step(run):
    for values, left in run(2, lone_gradients):
        assert values == [-2.0, -4.0]
        assert left == [None, None]


def strangers() -> list[Tensor]:
    t = trainer(vae=tiny(net="mlp").double(), epochs=1)
    with torch.no_grad():
        for p in t.vae.parameters():
            p.add_(processes.rank())
    t.fit()
    return outcome(t)[0]


def test_all_processes_start_from_the_parameters_of_the_first(run):
    first, second = run(2, strangers)
    assert all(map(torch.equal, first, second))


# ---- runs that stop and are resumed ----


def noisy(folder: Path, until: int | None) -> Any:
    return kept(folder, until, tiny(net="mlp").double())


def kept(folder: Path, until: int | None, vae: pvae.VAE | None = None) -> Any:
    t = trainer(vae=vae, folder=folder)
    if (folder / "checkpoint.pt").exists():
        t.resume(folder / "checkpoint.pt")
    t.fit(until)
    return outcome(t)


def test_a_run_goes_on_in_another_number_of_processes(run, tmp_path):
    run(2, kept, tmp_path, 1)
    run(4, kept, tmp_path, 3)
    assert_same(kept(tmp_path, None), trained("mlp"), 1e-10)


def test_a_resumed_run_has_the_noise_that_it_would_have_had(run, tmp_path):
    (whole := tmp_path / "whole").mkdir()
    (stopped := tmp_path / "stopped").mkdir()
    expected = run(2, noisy, whole, None)
    run(2, noisy, stopped, 2)
    for found, wanted in zip(run(2, noisy, stopped, None), expected, strict=True):
        assert_same(found, wanted, 0.0)


def killed(folder: Path) -> Any:
    """Kills the second process in the second epoch; returns the first's error and its time."""
    t = trainer(folder=folder)
    step, began = t.svi.step, time.perf_counter()

    def until_killed(*args: Any) -> Any:
        if processes.rank() == 1 and t.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    t.svi.step = until_killed
    with pytest.raises(ConnectionError) as stopped:
        t.fit()
    return str(stopped.value), time.perf_counter() - began


def test_a_killed_process_ends_the_run_and_leaves_its_checkpoint(run, tmp_path):
    (message, seconds), nothing = run(2, killed, tmp_path)
    assert nothing is None
    assert message.startswith("another process of this run has ended, or does not answer")
    assert "checkpoint.pt holds the state after epoch 1" in message
    assert seconds < 60
    assert_same(kept(tmp_path, None), trained("mlp"), 1e-10)


def silent() -> str:
    """Lets the second process be silent for longer than the others wait."""
    if processes.rank() == 1:
        time.sleep(23)
    try:
        processes.total(1.0)
    except ConnectionError as error:
        return str(error)
    return "answered"


@SLOW
def test_a_process_that_does_not_answer_ends_the_run(run):
    assert all("does not answer" in message for message in run(2, silent))


# ---- the main run ----


def main_run(folder: Path, *more: str) -> str:
    arguments = ["--dataset", "digits", "-n", "1", "--net", "mlp", "--hidden", "16", "-b", "256"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        example("mnist_svi").main([*arguments, "--device", "cpu", "--out", str(folder), *more])
    return said.getvalue()


def test_one_process_of_the_main_run_writes_and_prints(run, tmp_path):
    first, second = run(2, main_run, tmp_path / "run", "--accumulate", "2")
    assert second == ""
    assert "run: on cpu, 2 processes" in first
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["numbers"]
    assert numbers["elbo"]["images"] == 179
    assert (tmp_path / "run" / "samples.png").exists()
    found = pvae.load(tmp_path / "run")
    subject = pvae.results.Subject(found, data.observe(data.load("digits"), "dynamic"), quiet=True)
    alone = pvae.results.elbo_rows(subject)[0].value
    assert numbers["elbo"]["mean"] == pytest.approx(alone.mean, abs=2)  # the noise differs


def study_run(folder: Path) -> None:
    args = pvae.cli.study_parser("").parse_args(["--dataset", "digits", "--out", str(folder)])
    study.start(args, "study", "grey")


def test_a_study_is_for_one_process(run, tmp_path):
    for error in run(2, study_run, tmp_path):
        assert str(error) == "this study runs in one process, not in 2"


# ---- what is refused, in plain words ----


def refused(batch_size: int, images: int) -> None:
    vae = pair("mlp", torch.float64)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    Trainer(vae, svi, observed(images), epochs=1, batch_size=batch_size, quiet=True)


@pytest.mark.parametrize(
    ("batch_size", "images", "message"),
    [
        (3, 50, "batch_size must be a multiple of 4 (4 process(es) by 1 part(s) of each), not 3"),
        (10, 50, "batch_size must be a multiple of 4 (4 process(es) by 1 part(s) of each), not 10"),
        (4, 3, "data.train must hold an image for each of 4 processes, not 3 image(s)"),
    ],
)
def test_too_few_images_are_refused(run, batch_size, images, message):
    for error in run(4, refused, batch_size, images):
        assert type(error) is ValueError
        assert str(error) == message


def in_parts(vae: pvae.VAE, elbo: Any) -> Trainer:
    """Returns a trainer that takes batches in parts; it refuses what several processes refuse."""
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, elbo)
    images = observed(dtype=torch.float32)
    if vae.recipe is not None and vae.recipe.net == "deep":
        images = data.observe(data.load("digits"), "dynamic")
    return Trainer(vae, svi, images, epochs=1, batch_size=12, accumulate=2, quiet=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_that_is_not_a_sum_over_images_is_refused(name):
    """It is a sum if the losses of two halves of a batch, with noise by image, add up to it."""
    vae = pair("mlp", torch.float64)
    elbo = OBJECTIVES[name].elbo(OBJECTIVES[name].min_particles)
    x = observed().train.images[:12]
    if name == "free_bits":  # a floor between the KLs of the two halves
        elbo.nats = kl_by_unit(vae.encode(x), vae.model.prior()).mean(0)[0].item()
    whole, *halves = (elbo.loss(vae.model, vae.guide, part) for part in (x, x[:6], x[6:]))
    assert (sum(halves) == pytest.approx(whole)) == getattr(elbo, "sums_over_images", True)
    if sum(halves) == pytest.approx(whole):
        in_parts(vae.float(), elbo)
    else:
        with pytest.raises(ValueError, match="svi must have a loss that is a sum over images"):
            in_parts(vae.float(), elbo)


def test_an_unknown_loss_is_refused_unless_it_says_that_it_is_a_sum():
    vae, elbo = tiny(net="mlp"), TraceTailAdaptive_ELBO(2, vectorize_particles=True)
    with pytest.raises(ValueError, match="TraceTailAdaptive_ELBO does not say so"):
        in_parts(vae, elbo)
    elbo.sums_over_images = True
    in_parts(vae, elbo)


def test_batchnorm_is_refused():
    vae = pvae.build((1, 28, 28), 2, net="deep")
    with pytest.raises(ValueError, match="vae must be without BatchNorm, which normalizes by"):
        in_parts(vae, Trace_ELBO())


def test_a_bound_per_image_of_a_weight_for_all_images_is_refused():
    with pytest.raises(ValueError, match="under a bound per image: 'w' is outside of it"):
        in_parts(with_weight().float(), RenyiELBO(num_particles=2))


class WithFactor(pvae.Model):
    """A model with a factor for the whole batch."""

    def forward(self, x: Any = None, y: Any = None, *, size: int = 1) -> Any:
        pyro.factor("of_the_batch", torch.zeros(()))
        return super().forward(x, y, size=size)


def test_an_observed_site_outside_the_data_plate_is_refused():
    vae = tiny(net="mlp")
    vae.model = WithFactor(vae.model.prior, vae.model.likelihood)
    with pytest.raises(ValueError, match="'of_the_batch', outside of it, may be of the whole"):
        in_parts(vae, Trace_ELBO())
