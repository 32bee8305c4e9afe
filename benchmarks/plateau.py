"""Does training leave the collapsed solution in its first epoch, for every seed?

A decoder that ignores z gives each pixel one Bernoulli rate. The best such model scores

    sum_i m_i log m_i + (1 - m_i) log(1 - m_i),   m the mean image,

nats per image, in expectation over binarisations: -206.0 on MNIST's 60,000. The form of the Keras
tutorial (`--published`: hidden 16, ReLU, no warm-up, no output bias) can stay there for epochs.
This program trains the first of 10 epochs for many seeds, and prints for each seed the validation
ELBO after it.
"""

import argparse
from collections.abc import Sequence

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import cli, data, memory
from pvae.closed_form import collapsed
from pvae.schedule import Schedule
from pvae.train import Trainer

MARGIN = 20.0  # nats above the collapsed solution, beyond which a seed has left it


def first_epoch(dataset: data.Dataset, seed: int, published: bool) -> dict[str, float]:
    """Trains the first epoch; returns its row of the history."""
    defaults = cli.parser("").parse_args([])
    pyro.set_rng_seed(seed)
    vae = pvae.build(
        dataset.image_shape,
        defaults.latent_dims,
        hidden=16 if published else defaults.hidden,
        activation="relu" if published else defaults.activation,
        mean_image=None if published else dataset.mean_image,
    ).to(memory_format=torch.channels_last)
    rate = 1e-3 if published else defaults.learning_rate
    adam = torch.optim.Adam(vae.parameters(), lr=rate, fused=True)
    trainer = Trainer(
        vae,
        SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO()),
        data.observe(dataset, "dynamic", seed=seed),
        epochs=10,
        batch_size=defaults.batch_size,
        schedule=Schedule(cosine=False) if published else cli.schedule(defaults),
        seed=seed,
        quiet=True,
    )
    trainer.fit(until=1)
    return trainer.history[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Does training leave the collapsed solution in its first epoch?"
    )
    parser.add_argument(
        "--seeds", type=cli.NATURAL, default=10, help="how many seeds (default: 10)"
    )
    parser.add_argument("--dataset", help="as in the examples (default: MNIST, else digits)")
    parser.add_argument("--data-root", help="as in the examples")
    parser.add_argument("--published", action="store_true", help="the Keras tutorial's form")
    args = parser.parse_args(argv)

    memory.keep_freed_memory()
    dataset = data.load(args.dataset, args.data_root)
    floor = collapsed(data.pixels(dataset.validation.images).double().mean(0)).item()
    print(f"{dataset.name}: collapsed solution {floor:.1f} nats per image (validation)")
    print(f"{'seed':>4} {'validation ELBO':>16} {'KL':>6} {'time':>7}")
    left = 0
    for seed in range(args.seeds):
        row = first_epoch(dataset, seed, args.published)
        gone = row["validation_elbo"] > floor + MARGIN
        left += gone
        print(
            f"{seed:>4} {row['validation_elbo']:>16.2f} {row['validation_kl']:>6.2f} "
            f"{row['seconds']:>6.1f}s  {'left' if gone else 'still there'}",
            flush=True,
        )
    print(f"{left} of {args.seeds} seeds left the plateau in the first epoch")


if __name__ == "__main__":
    cli.run_main(main)
