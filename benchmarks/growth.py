"""How the cost of training grows with the data, the image size, the latent and the particles.

For each point a separate process makes random images, and trains the pair on some batches, which it
draws as `pvae.train.Trainer` does (shuffled, pixels redrawn). It reports the median time of a
batch, the time of an epoch (the median times the number of batches), and its peak memory. The base
is 50,000 images of 28x28, a 16-D latent, one particle and batches of 128; a point changes one size.
"""

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import pvae
from pvae import captured, cli, data, memory, plots, run, tables


class Size(NamedTuple):
    """The sizes of one point."""

    images: int = 50_000
    pixels: int = 28  # of a side
    latent: int = 16
    particles: int = 1


AXES: Mapping[str, tuple[str, Sequence[int]]] = {
    "images": ("training images", (10_000, 50_000, 200_000, 1_000_000)),
    "pixels": ("image size, pixels a side", (28, 64, 128, 256)),
    "latent": ("latent dimensions", (2, 16, 128, 512)),
    "particles": ("particles of the ELBO", (1, 4, 16)),
}
ENGINES = ("eager", "captured")


def points(most: int) -> list[tuple[str, Size]]:
    """All points of all axes, which include the base; at most `most` training images."""
    return [
        (axis, Size()._replace(**{axis: value}))
        for axis, (_, values) in AXES.items()
        for value in values
        if axis != "images" or value <= most
    ]


def _observed(size: Size) -> data.Observed:
    """Random grey images of 8 bits, in memory like every data set of `pvae.data`."""

    def split(n: int) -> data.Split:
        shape = (n, 1, size.pixels, size.pixels)
        return data.Split(torch.randint(0, 256, shape, dtype=torch.uint8), None)

    return data.observe(
        data.Dataset("noise", split(size.images), split(1), split(1), ""), "dynamic"
    )


def peak() -> float:
    """The peak memory of the process in MiB, without that of a GPU."""
    if sys.platform.startswith("linux"):
        # not getrusage: the peak of a child process starts at the peak of its parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    import resource  # Windows has no such module

    in_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return in_bytes / 2**20


def _measure(size: Size, engine: str, batch: int, timed: int, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    memory.keep_freed_memory()
    pyro.set_rng_seed(0)
    shape = (1, size.pixels, size.pixels)
    vae = pvae.build(shape, size.latent, "conv").to(memory_format=torch.channels_last)
    optim = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True))
    elbo = Trace_ELBO(num_particles=size.particles, vectorize_particles=True, max_plate_nesting=1)
    kind = SVI if engine == "eager" else partial(captured.SVI, strict=True)
    svi = kind(vae.model, vae.guide, optim, elbo)
    observed = _observed(size)
    epochs = (observed.batches(batch, seed=0, epoch=epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    times = []
    for step in range(3 + timed):  # the captured engine compiles in the second step
        start = time.perf_counter()
        svi.step(next(batches)[0])
        if step >= 3:
            times.append(time.perf_counter() - start)
    pipe.send((statistics.median(times), peak()))


def measure(size: Size, engine: str, *, batch: int, timed: int, threads: int) -> dict[str, Any]:
    """Measures one point in a separate process."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    told = (size, engine, batch, timed, threads, end)
    worker = context.Process(target=_measure, args=told, daemon=True)
    worker.start()
    end.close()
    try:
        seconds, most = pipe.recv()
    except EOFError:
        worker.join()
        raise ValueError(
            f"the process of {size} ({engine}) ended with exit code {worker.exitcode}"
            + (": killed, most likely for want of memory" if worker.exitcode == -9 else "")
        ) from None
    worker.join()
    return {
        **size._asdict(),
        "engine": engine,
        "milliseconds": 1e3 * seconds,
        "epoch_seconds": seconds * math.ceil(size.images / batch),
        "peak_mib": most,
    }


def picture(rows: list[dict[str, Any]], batch: int) -> Figure:
    """Draws seconds per epoch above and peak memory below, a column for each axis of growth."""
    measured = list(dict.fromkeys(r["axis"] for r in rows))
    figure = Figure(figsize=(3.2 * len(measured), 5.2), layout="constrained")
    axes = figure.subplots(2, len(measured), sharex="col", sharey="row", squeeze=False)
    figure.suptitle(f"What an epoch costs (conv net, batches of {batch})")
    for column, axis in enumerate(measured):
        label, _ = AXES[axis]
        for engine in dict.fromkeys(r["engine"] for r in rows):
            of = [r for r in rows if r["axis"] == axis and r["engine"] == engine]
            at = [r[axis] for r in of]
            for row, key in enumerate(("epoch_seconds", "peak_mib")):
                axes[row, column].plot(at, [r[key] for r in of], "o-", ms=4, label=engine)
        axes[0, column].set(xscale="log", yscale="log")
        axes[1, column].set(xscale="log", yscale="log", xlabel=label)
        axes[1, column].set_xticks([r[axis] for r in of], [f"{r[axis]:,}" for r in of])
        axes[1, column].minorticks_off()
    axes[0, 0].set_ylabel("seconds an epoch")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend(frameon=False)
    return figure


def text(axis: str, rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            f"{r[axis]:,}",
            r["engine"],
            f"{r['milliseconds']:.1f}",
            f"{r['epoch_seconds']:.1f}",
            f"{r['peak_mib']:,.0f}",
        ]
        for r in rows
    ]
    return tables.columns(AXES[axis][0], ["", "engine", "ms a batch", "s an epoch", "MiB"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--images", type=cli.NATURAL, default=1_000_000, metavar="N",
                   help="the most training images")  # fmt: skip
    p.add_argument("--batch", type=cli.NATURAL, default=128, metavar="B")
    p.add_argument("--timed", type=cli.NATURAL, default=5, metavar="N", help="batches of a point")
    p.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    p.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    p.add_argument("--threads", type=cli.NATURAL, default=torch.get_num_threads())
    p.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    p.add_argument("--figure", type=Path, metavar="FILE", help="where to draw them")
    args = p.parse_args(argv)

    asked = [(axis, size) for axis, size in points(args.images) if axis in args.axes]
    known: dict[tuple[Size, str], dict[str, Any]] = {}  # the base is a point of several axes
    sizes = dict.fromkeys(size for _, size in asked)
    bar = tqdm(total=len(sizes) * len(args.engines), leave=False, disable=None)
    for size in sizes:
        for engine in args.engines:
            bar.set_description(f"{size}, {engine}")
            known[size, engine] = measure(
                size, engine, batch=args.batch, timed=args.timed, threads=args.threads
            )
            bar.update()
    bar.close()
    rows = [
        {"axis": axis, **known[size, engine]} for axis, size in asked for engine in args.engines
    ]
    for axis in args.axes:
        print(text(axis, [r for r in rows if r["axis"] == axis]), flush=True)
    if args.json:
        run.write_json(args.json, {"threads": args.threads, "rows": rows})
    if args.figure:
        plots.save(picture(rows, args.batch), args.figure)


if __name__ == "__main__":
    cli.run_main(main)
