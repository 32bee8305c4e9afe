"""A convolutional VAE on MNIST, as two Pyro programs trained by stock SVI.

The generative model is p(z) p(x|z), the amortized guide q(z|x); SVI maximizes

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z))  <=  log p(x).

After every epoch SVI's loss is held against the same loss written by hand, without Pyro.
With no arguments: 10 epochs on MNIST; the run is left in runs/.
"""

import time
from pathlib import Path

import pyro
import torch

import pvae
from pvae import checkpoint, cli, data, memory, report, run
from pvae.builder import OBJECTIVES
from pvae.train import Trainer


def main() -> None:
    args = cli.parse(cli.parser("A convolutional VAE on MNIST, by Pyro SVI."))
    start = time.perf_counter()
    pyro.set_rng_seed(args.seed)
    device = cli.device(args.device)

    # data: whole splits in memory; what the model is shown of them
    dataset = data.load(args.dataset, args.data_root, seed=args.seed)
    observed = data.observe(dataset, args.observe, seed=args.seed).to(device)
    args.num_epochs = cli.num_epochs(args, len(dataset.train.images))
    folder = Path(args.resume) if args.resume else run.new_folder(args.out, "mnist_svi")
    cli.keep_config(folder, args, dataset)

    # the pair of programs: p(z) p(x|z) and q(z|x)
    vae = pvae.build(
        dataset.image_shape,
        args.latent_dim,
        args.net,
        args.likelihood,
        args.guide,
        args.prior,
        hidden=args.hidden,
        activation=args.activation,
        num_classes=dataset.num_classes if args.conditional else None,
        top_dim=args.top_dim,
        components=args.components,
        mean_image=dataset.mean_image,
    )
    vae.to(device).to(memory_format=torch.channels_last)

    # stock SVI, or the same step compiled once; one optimizer over all parameters
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    objective = OBJECTIVES[args.objective]
    svi = cli.ENGINES[cli.engine(args, len(dataset.train.images), device)](
        vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(args.num_particles)
    )

    labels, pictured = args.conditional, cli.spread(args.num_epochs, 10)
    trainer = Trainer(
        vae,
        svi,
        objective,
        observed,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        beta=args.beta,
        kl_warmup=args.kl_warmup,
        kl_cycles=args.kl_cycles,
        lr_warmup=args.lr_warmup,
        cosine=args.schedule == "cosine",
        labels=labels,
        precision=args.precision,
        seed=args.seed,
        folder=folder,
        quiet=args.quiet,
        on_epoch=lambda t: (
            report.progress_picture(vae, observed, t.epoch, folder, labels=labels)
            if t.epoch in pictured
            else None
        ),
        go_on=f"--resume {folder}",
    )
    if args.resume and (folder / "checkpoint.pt").exists():  # else no epoch was finished
        trainer.resume(folder / "checkpoint.pt")
    kept = memory.keep_freed_memory()
    cli.announce(args, dataset, vae, device, folder, kept)
    trainer.fit()

    # the model of the best validation ELBO; the test set is touched here, once
    best = checkpoint.read(folder / "best.pt")
    checkpoint.restore(vae, best["model"])
    numbers = report.results(vae, observed, labels=labels, seed=args.seed, quiet=args.quiet)
    numbers["seconds"] = time.perf_counter() - start
    run.write_json(folder / "results.json", numbers)
    history = trainer.history
    report.pictures(vae, observed, history, folder, numbers, labels=labels, seed=args.seed)
    print(report.results_table(numbers, observed, dataset.name, args.latent_dim))
    print(
        f"best epoch {best['epoch']}; {numbers['seconds']:.0f} s; pictures and numbers: {folder}/"
    )


if __name__ == "__main__":
    cli.run_main(main)
