"""The cost of a training step: the same VAE by hand, by stock Pyro, by this package and by peers.

Each variant runs in its own process, with its own allocator. The variants take turns of some steps
each (A B C A B C ...), so that other work of the machine slows all of them. A ratio is the time of
a variant divided by that of the plain loop *in the same turn*; the median and the range over the
turns are printed. The nets are those of the tutorials: `conv`, two strided convolutions and their
mirror (hidden 16, latent 16), and `mlp`, 784-400-20-400-784. The data are uniform binary noise, as
a step costs the same on every image.

The floor is the time of the arithmetic alone: the floating point operations of one step (as torch
counts them) divided by the rate of the machine's best matrix product, which is measured first.
"""

import argparse
import importlib.util
import itertools
import logging
import math
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from growth import peak as peak_memory
from matplotlib.figure import Figure
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import ToTensor
from tqdm import tqdm

import pvae
from pvae import captured, cli, data, memory, plots, run, tables
from pvae.captured.capturing import is_due

NETS: Mapping[str, dict[str, Any]] = {
    "conv": {"net": "conv", "latent_dim": 16, "hidden": 16, "activation": "relu"},
    "mlp": {"net": "mlp", "latent_dim": 20, "hidden": 400, "activation": "relu"},
}
Step = Callable[[], Any]


def _pair(net: str, batch: int, layout: torch.memory_format) -> tuple[pvae.VAE, Tensor]:
    pyro.set_rng_seed(0)
    vae = pvae.build((1, 28, 28), **NETS[net]).to(memory_format=layout)
    return vae, (torch.rand(batch, 1, 28, 28) > 0.5).float()


def _adam(vae: nn.Module, fused: bool) -> torch.optim.Adam:
    return torch.optim.Adam(vae.parameters(), lr=1e-3, fused=fused)


def _negative_elbo(vae: pvae.VAE, x: Tensor, latent_dim: int) -> Tensor:
    """The negative ELBO by the closed form at fresh noise, summed over the batch, without Pyro."""
    assert vae.oracle is not None
    return -vae.oracle.terms(x, noise=torch.randn(len(x), latent_dim)).elbo_sampled().sum()


# ---- the variants: each function builds a step ----


def _by_hand(vae: pvae.VAE, net: str) -> Callable[[Tensor], float]:
    adam = _adam(vae, fused=False)

    def step(x: Tensor) -> float:
        adam.zero_grad()
        loss = _negative_elbo(vae, x, NETS[net]["latent_dim"])
        loss.backward()
        adam.step()
        return loss.item()

    return step


def plain(net: str, batch: int) -> Step:
    """The step of a loop by hand over the closed form, as a person would write it."""
    vae, x = _pair(net, batch, torch.contiguous_format)
    return partial(_by_hand(vae, net), x)


def plain_captured(net: str, batch: int) -> Step:
    """The closed form with all optimizations of the captured step, but without a Pyro program."""
    memory.keep_freed_memory()
    vae, x = _pair(net, batch, torch.channels_last)

    def loss(model: Any, guide: Any, x: Tensor) -> float:
        model.register()
        guide.register()
        value = _negative_elbo(vae, x, NETS[net]["latent_dim"])
        value.backward()
        return value.item()

    optim = pvae.SingleOptimizer(_adam(vae, fused=True))
    svi = captured.SVI(vae.model, vae.guide, optim, loss, loss, strict=True)
    return lambda: svi.step(x)


def stock(net: str, batch: int) -> Step:
    """Stock SVI with pyro.optim.Adam."""
    vae, x = _pair(net, batch, torch.contiguous_format)
    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]  # made at import
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    return lambda: svi.step(x)


def _single(kind: Callable[..., SVI], net: str, batch: int) -> tuple[Any, Tensor]:
    """An SVI with one fused optimizer, in channels last, while the allocator keeps memory."""
    memory.keep_freed_memory()
    vae, x = _pair(net, batch, torch.channels_last)
    optim = pvae.SingleOptimizer(_adam(vae, fused=True))
    return kind(vae.model, vae.guide, optim, Trace_ELBO()), x


def eager(net: str, batch: int) -> Step:
    """Stock SVI with all optimizations that need no capture."""
    svi, x = _single(SVI, net, batch)
    return partial(svi.step, x)


def captured_fp32(net: str, batch: int) -> Step:
    """The step of `eager`, captured."""
    svi, x = _single(partial(captured.SVI, strict=True), net, batch)
    return partial(svi.step, x)


def captured_bf16(net: str, batch: int) -> Step:
    step = captured_fp32(net, batch)

    def under_autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    return under_autocast


class _TutorialNet(nn.Module):
    """The VAE of pytorch/examples, written anew: 784-400-20, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU())
        self.loc, self.log_variance = nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        loc, log_variance = self.loc(h), self.log_variance(h)
        z = loc + torch.randn_like(loc) * (log_variance / 2).exp()
        kl = (log_variance.exp() + loc**2 - 1 - log_variance).sum() / 2
        logits = self.decoder(z)
        return binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum") + kl


def pytorch_examples(net: str, batch: int) -> Step:
    _, x = _pair(net, batch, torch.contiguous_format)
    vae = _TutorialNet()
    adam = _adam(vae, fused=False)

    def step() -> float:
        adam.zero_grad()
        loss = vae(x)
        loss.backward()
        adam.step()
        return loss.item()

    return step


def _pythae_trainer(net: str, images: Tensor, batch: int) -> Any:
    """pythae's VAE around the same networks, and its trainer, ready to train."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)  # pythae logs a line at every start
    ours, _ = _pair(net, 1, torch.contiguous_format)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = ours.guide.posterior.net

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.net(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = ours.model.likelihood.net

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    latent_dim = NETS[net]["latent_dim"]
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent_dim, reconstruction_loss="bce")
    folder = tempfile.TemporaryDirectory()
    trainer = BaseTrainer(
        VAE(config, encoder=Encoder(), decoder=Decoder()),
        BaseDataset(images, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=folder.name,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            no_cuda=True,
        ),
    )
    trainer.prepare_training()
    trainer.callback_handler.callbacks.clear()  # no progress bars, no printed lines
    trainer.folder = folder  # deleted together with the trainer
    return trainer


def pythae(net: str, batch: int) -> Step:
    """A step of pythae's trainer on one prepared batch."""
    _, x = _pair(net, batch, torch.contiguous_format)
    trainer = _pythae_trainer(net, x, batch)
    ready = next(iter(trainer.train_loader))
    one: Any = [ready]
    trainer.train_loader = torch.utils.data.DataLoader(one, batch_size=None)
    return partial(trainer.train_step, epoch=1)


def _numpyro_svi() -> tuple[Any, Any]:
    """NumPyro's SVI over the same MLP as two NumPyro programs, and its state."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    def layer(name: str, fan_in: int, fan_out: int) -> Callable[[Any], Any]:
        def start(key: Any) -> Any:
            return jax.random.uniform(key, (fan_in, fan_out), minval=-1, maxval=1) / fan_in**0.5

        w, b = numpyro.param(f"{name}.w", start), numpyro.param(f"{name}.b", jnp.zeros(fan_out))
        return lambda h: h @ w + b

    def model(x: Any) -> None:
        first, second = layer("d1", 20, 400), layer("d2", 400, 784)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
            logits = second(jax.nn.relu(first(z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        first, second = layer("e1", 784, 400), layer("e2", 400, 40)
        loc, log_variance = jnp.split(second(jax.nn.relu(first(x))), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_variance / 2)).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    return svi, svi.init(jax.random.PRNGKey(0), jnp.zeros((1, 784)))


def numpyro(net: str, batch: int) -> Step:
    """NumPyro with one jitted update for each step."""
    import jax
    import jax.numpy as jnp

    svi, state = _numpyro_svi()
    x = jnp.asarray((torch.rand(batch, 784) > 0.5).float().numpy())
    update = jax.jit(svi.update)

    def step() -> float:
        nonlocal state
        state, loss = update(state, x)
        return float(loss)

    return step


VARIANTS: Mapping[str, Callable[[str, int], Step]] = {
    "plain": plain,
    "plain, captured": plain_captured,
    "stock Pyro SVI": stock,
    "eager": eager,
    "captured": captured_fp32,
    "captured bf16": captured_bf16,
    "pytorch/examples": pytorch_examples,
    "pythae": pythae,
    "NumPyro": numpyro,
}


# ---- whole epochs, which include the loading of the data ----


class _OneByOne(torch.utils.data.Dataset[Tensor]):
    """Images as torchvision's data sets return them: through PIL, one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.to_tensor = images, ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.to_tensor(Image.fromarray(self.images[i, 0].numpy(), mode="L"))


def _with_loader(step: Callable[[Tensor], Any], batch: int) -> Step:
    loader = torch.utils.data.DataLoader(
        _OneByOne(data.load().train.images), batch_size=batch, shuffle=True
    )

    def epoch() -> None:
        for x in loader:
            step(torch.bernoulli(x))

    return epoch


def _in_memory(step: Callable[[Tensor], Any], batch: int) -> Step:
    observed, epochs = data.observe(data.load(), "dynamic"), itertools.count()

    def epoch() -> None:
        for x, _ in observed.batches(batch, seed=0, epoch=next(epochs)):
            step(x)

    return epoch


def plain_epoch(net: str, batch: int) -> Step:
    vae, _ = _pair(net, batch, torch.contiguous_format)
    return _with_loader(_by_hand(vae, net), batch)


def stock_epoch(net: str, batch: int) -> Step:
    vae, _ = _pair(net, batch, torch.contiguous_format)
    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]  # made at import
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    return _with_loader(svi.step, batch)


def eager_epoch(net: str, batch: int) -> Step:
    return _in_memory(_single(SVI, net, batch)[0].step, batch)


def captured_epoch(net: str, batch: int) -> Step:
    svi, x = _single(partial(captured.SVI, strict=True), net, batch)
    svi.prepare(x)
    if last := len(data.load().train.images) % batch:
        svi.prepare(x[:last])
    return _in_memory(svi.step, batch)


def pythae_epoch(net: str, batch: int) -> Step:
    """An epoch of pythae's trainer, on static binary pixels, as pythae cannot redraw them."""
    images = torch.bernoulli(data.pixels(data.load().train.images))
    return partial(_pythae_trainer(net, images, batch).train_step, epoch=1)


def numpyro_epoch(net: str, batch: int) -> Step:
    """A whole epoch as one jitted loop that redraws the pixels, as in NumPyro's own example; it
    leaves the short last batch out."""
    import jax
    import jax.numpy as jnp

    svi, state = _numpyro_svi()
    images = jnp.asarray(data.load().train.images.flatten(1).numpy())
    key = jax.random.PRNGKey(1)

    @jax.jit
    def one(state: Any, images: Any, key: Any) -> Any:
        order = jax.random.permutation(key, len(images))

        def step(i: Any, carry: Any) -> Any:
            state, total = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * batch, batch)
            noise = jax.random.fold_in(key, i)
            x = jax.random.bernoulli(noise, images[rows] / 255).astype(jnp.float32)
            state, loss = svi.update(state, x)
            return state, total + loss

        return jax.lax.fori_loop(0, len(images) // batch, step, (state, 0.0))

    def epoch() -> None:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, loss = one(state, images, now)
        float(loss)

    return epoch


EPOCHS: Mapping[str, Callable[[str, int], Step]] = {
    "plain": plain_epoch,
    "stock Pyro SVI": stock_epoch,
    "eager": eager_epoch,
    "captured": captured_epoch,
    "pythae": pythae_epoch,
    "NumPyro": numpyro_epoch,
}
_MLP_ONLY = {"pytorch/examples", "NumPyro"}
_NEEDS = {"NumPyro": "numpyro", "pythae": "pythae"}


# ---- taking turns ----


def _work(
    builder: Callable[[str, int], Step], net: str, batch: int, threads: int, warm: int, pipe: Any
) -> None:
    """A worker: builds its step, runs as many steps as it is told, and sends their mean time."""
    torch.set_num_threads(threads)
    step = builder(net, batch)
    for _ in range(warm):  # the captured variants compile here
        step()
    pipe.send(None)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - start) / steps
        pipe.send((seconds, peak_memory()))


def measure(
    builders: Mapping[str, Callable[[str, int], Step]],
    net: str,
    batch: int,
    *,
    turns: int,
    seconds: float | None,
    threads: int,
) -> dict[str, tuple[list[float], float]]:
    """For each variant the seconds per step in each turn, and the peak memory in MiB.

    A turn lasts about `seconds`; it is one step if `seconds` is None.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    bar = tqdm(total=len(builders) + turns, desc=f"{net} {batch}", leave=False, disable=None)
    for variant, builder in builders.items():  # one by one, so that compilers do not compete
        pipe, end = context.Pipe()
        warm = 1 if seconds is None else 4
        told = (builder, net, batch, threads, warm, end)
        worker = context.Process(target=_work, args=told, daemon=True)
        worker.start()
        end.close()
        pipe.recv()
        workers[variant] = (worker, pipe)
        bar.update()

    def ask(variant: str, steps: int) -> tuple[float, float]:
        workers[variant][1].send(steps)
        return workers[variant][1].recv()

    steps = {v: max(1, round(seconds / ask(v, 3)[0])) if seconds else 1 for v in builders}
    times: dict[str, list[float]] = {v: [] for v in builders}
    peak = {}
    for _ in range(turns):
        for variant in builders:
            took, peak[variant] = ask(variant, steps[variant])
            times[variant].append(took)
        bar.update()
    bar.close()
    for worker, pipe in workers.values():
        pipe.send(0)
        worker.join()
    return {v: (times[v], peak[v]) for v in builders}


def floor(net: str, batch: int, peak: float) -> float:
    """Seconds that the floating point operations of a step take at the rate `peak`."""
    step = plain(net, batch)
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops() / peak


def peak_rate(turns: int = 60) -> float:
    """The best rate of a product of two square matrices, in operations per second."""
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def product_rates(batch: int, turns: int = 300) -> str:
    """A table of the best rates, by torch and by oneDNN in turn, of the matrix products of the
    MLP's layers, forward and backward."""
    ways: list[Callable[..., Tensor]] = [_by_torch, torch.ops.pvae.product]
    cells = []
    for fan_in, fan_out in ((784, 400), (400, 40), (20, 400), (400, 784)):
        x, w = torch.randn(batch, fan_in), torch.randn(fan_out, fan_in)
        bias, g = torch.randn(fan_out), torch.randn(batch, fan_out)
        for what, given in (
            ("forward", (x, w.t(), bias)),
            ("gradient of the input", (g, w, None)),
            ("gradient of the weight", (g.t(), x, None)),
        ):
            best = [float("inf")] * len(ways)
            for _, (i, way) in itertools.product(range(turns), enumerate(ways)):
                start = time.perf_counter()
                way(*given)
                best[i] = min(best[i], time.perf_counter() - start)
            rates = [f"{2 * batch * fan_in * fan_out / t / 1e9:.0f}" for t in best]
            cells.append([f"{fan_in} to {fan_out}, {what}", *rates, f"{best[1] / best[0]:.2f}"])
    title = f"products at batch {batch}, GFLOP/s"
    return tables.columns(title, ["", "torch", "oneDNN", "time"], cells)


def _by_torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


_REPLAYS: list[float] = []  # the seconds that the graphs and the optimizer's steps took


class _Timed(captured.SVI):
    """A captured SVI that times its steps without the look-up before them."""

    def _replay(self, entry: Any, inputs: list[Tensor]) -> Any:
        start = time.perf_counter()
        loss = super()._replay(entry, inputs)
        _REPLAYS.append(time.perf_counter() - start)
        return loss


def look_up_and_checks(net: str, batch: int, steps: int = 4000) -> tuple[float, float]:
    """The parts of a run of `steps` captured steps that look-ups and comparisons take."""
    svi, x = _single(partial(_Timed, strict=True), net, batch)
    svi.prepare(x)
    looked, whole, compared = [], [], []
    for done in range(513):  # ten of these steps are compared, 512 is the last
        start = time.perf_counter()
        svi.step(x)
        took = time.perf_counter() - start
        if is_due(done):
            compared.append(took)
        else:
            whole.append(took)
            looked.append(took - _REPLAYS[-1])
    step = statistics.median(whole)
    checks = sum(map(is_due, range(steps))) * (statistics.median(compared) - step)
    return statistics.median(looked) / step, checks / (steps * step)


def _three_steps(builder: Callable[[str, int], Step], net: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    step = builder(net, batch)
    for _ in range(3):  # a captured SVI uses its graph from the third step on
        step()


def start_of_a_process(net: str, batch: int, *, turns: int, threads: int) -> float:
    """The seconds by which three steps in a new process take longer if they are captured.

    The code is compiled already, by an earlier process.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"captured": [], "eager": []}
    for _ in range(turns + 1):  # in the first turn torch compiles
        for variant, times in seconds.items():
            start = time.perf_counter()
            process = context.Process(
                target=_three_steps, args=(VARIANTS[variant], net, batch, threads)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{variant} has failed in a new process")
            times.append(time.perf_counter() - start)
    later = zip(seconds["captured"][1:], seconds["eager"][1:], strict=True)
    return statistics.median(ours - theirs for ours, theirs in later)


def costs(nets: Sequence[str], batch: int, *, turns: int, threads: int) -> str:
    """A table of what capture costs."""
    cells = []
    for net in nets:
        looked, checks = look_up_and_checks(net, batch)
        later = start_of_a_process(net, batch, turns=turns, threads=threads)
        cells.append([net, f"{looked:.1%}", f"{checks:.1%}", f"{later:.2f} s"])
    title = f"what capture costs at batch {batch}: parts of 4,000 steps, and the delay at the start"
    return tables.columns(title, ["", "look-up", "comparisons", "delay"], cells)


def rows_of(
    net: str, batch: int, measured: dict[str, tuple[list[float], float]], least: float
) -> list[dict[str, Any]]:
    """One row for each variant; each ratio is of two times in the same turn."""
    plain_times = measured["plain"][0]
    rows = []
    for variant, (times, memory_peak) in measured.items():
        ratios = [t / p for t, p in zip(times, plain_times, strict=True)]
        rows.append(
            {
                "net": net,
                "batch": batch,
                "variant": variant,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "milliseconds": 1e3 * statistics.median(times),
                "peak_mib": memory_peak,
                "over_floor": statistics.median(times) / least,
            }
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            f"{r['variant']}",
            f"{r['milliseconds']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['low']:.2f}-{r['high']:.2f}",
            f"{r['over_floor']:.1f}",
            f"{r['peak_mib']:.0f}",
        ]
        for r in rows
    ]
    title = f"{rows[0]['net']}, batch {rows[0]['batch']}"
    return tables.columns(title, ["", "ms", "ratio", "range", "/ floor", "MiB"], cells)


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Draws the ratios to the plain loop: a panel for each net, a group of bars for each batch."""
    nets = list(dict.fromkeys(r["net"] for r in rows))
    colours = {v: f"C{i}" for i, v in enumerate(dict.fromkeys(r["variant"] for r in rows))}
    drawn = {}
    figure = Figure(figsize=(6 * len(nets), 4.2), layout="constrained")
    figure.suptitle("Time relative to the plain loop by hand (lower is faster)")
    for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        of_net = [r for r in rows if r["net"] == net]
        batches = list(dict.fromkeys(r["batch"] for r in of_net))
        variants = list(dict.fromkeys(r["variant"] for r in of_net))
        width = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            bars = [r for r in of_net if r["variant"] == variant]
            at = [batches.index(r["batch"]) + (i - (len(variants) - 1) / 2) * width for r in bars]
            ratio = [r["ratio"] for r in bars]
            spread = [
                [r["ratio"] - r["low"] for r in bars],
                [r["high"] - r["ratio"] for r in bars],
            ]
            drawn[variant] = ax.bar(
                at,
                ratio,
                width * 0.9,
                yerr=spread,
                color=colours[variant],
                error_kw={"lw": 0.8},
            )
        ax.axhline(1, color="black", lw=0.6)
        ax.set_title(net)
        ax.set_xlabel("batch size")
        ax.set_xticks(range(len(batches)), [str(b) for b in batches])
        ax.set_ylabel("time / time of the plain loop")
        ax.set_ylim(bottom=0)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="What a training step costs, side by side.")
    p.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    p.add_argument("--batches", nargs="+", type=cli.NATURAL, default=[16, 128, 1024], metavar="B")
    p.add_argument("--turns", type=cli.NATURAL, default=7, help="how often each has its turn")
    p.add_argument("--seconds", type=float, default=1.0, help="of one turn, about")
    p.add_argument("--threads", type=cli.NATURAL, default=torch.get_num_threads())
    p.add_argument("--quick", action="store_true", help="batch 128 alone, 3 turns of 0.3 s")
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME",
                   help=f"some of: {', '.join(VARIANTS)} (plain is always measured)")  # fmt: skip
    p.add_argument("--epochs", action="store_true",
                   help="whole epochs of the training set instead of steps, data and all; stock "
                   "Pyro and the plain loop with a loader as torchvision's")  # fmt: skip
    p.add_argument("--products", action="store_true",
                   help="the MLP's matrix products alone, by torch and by oneDNN")  # fmt: skip
    p.add_argument("--costs", action="store_true",
                   help="what look-ups and comparisons of captured steps cost, and the start of a "
                   "process that finds its code compiled")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    p.add_argument("--figure", type=Path, metavar="FILE", help="where to draw them")
    args = p.parse_args(argv)
    if args.quick:
        args.batches, args.turns, args.seconds = [128], 3, 0.3

    variants = EPOCHS if args.epochs else VARIANTS
    asked = [v for v in variants if v == "plain" or v in (args.variants or variants)]
    missing = [v for v in asked if v in _NEEDS and importlib.util.find_spec(_NEEDS[v]) is None]
    for variant in missing:
        print(f"skipped: {variant} ({_NEEDS[variant]} is not installed)")
    torch.set_num_threads(args.threads)
    rate = peak_rate()
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} thread(s), torch "
        f"{torch.__version__}; a matrix product runs at {rate / 1e9:.0f} GFLOP/s"
    )
    if args.products:
        for batch in args.batches:
            print(product_rates(batch), flush=True)
        return
    if args.costs:
        for batch in args.batches:
            print(costs(args.nets, batch, turns=args.turns, threads=args.threads), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for net in args.nets:
        builders = {
            v: variants[v]
            for v in asked
            if v not in missing and (net == "mlp" or v not in _MLP_ONLY)
        }
        for batch in args.batches:
            measured = measure(
                builders,
                net,
                batch,
                turns=args.turns,
                seconds=None if args.epochs else args.seconds,
                threads=args.threads,
            )
            steps = math.ceil(len(data.load().train.images) / batch) if args.epochs else 1
            new = rows_of(net, batch, measured, steps * floor(net, batch, rate))
            print(text(new), flush=True)
            rows += new
    if args.json:
        run.write_json(args.json, {"threads": args.threads, "gflops": rate / 1e9, "rows": rows})
    if args.figure:
        plots.save(picture(rows), args.figure)


if __name__ == "__main__":
    cli.run_main(main)
