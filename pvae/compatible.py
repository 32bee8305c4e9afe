"""Checks that SVI, pair and data fit together, before the Trainer starts."""

from pyro import poutine
from pyro.infer import SVI, RenyiELBO
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pvae import evaluate, processes
from pvae.crosscheck import by_hand
from pvae.data import Observed
from pvae.objectives import in_data_plate, latent_names
from pvae.optim import SingleOptimizer
from pvae.programs import HierarchicalModel, evaluating, optional
from pvae.schedule import Schedule
from pvae.vae import VAE


def check_svi(svi: SVI, vae: VAE) -> None:
    """Checks that `svi` trains the programs of `vae`, all its parameters and no others.

    Raises:
        ValueError: `svi` has other programs, no `SingleOptimizer`, or one of other parameters.
    """
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


def check_layers(schedule: Schedule, vae: VAE) -> None:
    """Checks that the schedule has one KL warm-up for all latent layers, or one for each layer.

    Raises:
        ValueError: it has another number of warm-ups.
    """
    layers = len(vae.model.between) + 2 if isinstance(vae.model, HierarchicalModel) else 1
    if len(schedule.warmups) not in (1, layers):
        raise ValueError(
            f"kl_warmup must be one fraction, or one for each of {layers} latent layer(s), not "
            f"{len(schedule.warmups)}"
        )


def check_data(data: Observed, vae: VAE, batch_size: int) -> None:
    """Checks that the pair can be trained on this data, in batches of this size.

    Raises:
        ValueError: a split is empty, or has no `y` for a pair that takes it, or a pair with
            BatchNorm gets a batch of one image.
    """
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if not len(split.images):
            raise ValueError(f"data.{name} must hold an image or more, not none")
        if vae.takes_y and split.y is None:
            raise ValueError(f"the pair takes y, but data.{name} has neither labels nor masks")
    images = len(data.train.images)
    if _has_batchnorm(vae) and 1 in (batch_size, images % batch_size):
        raise ValueError(
            "batch_size must be above 1, and must not leave one image over, which BatchNorm cannot "
            f"normalize: {images:,} training images by {batch_size} do; choose another"
        )


def check_parts(svi: SVI, vae: VAE, data: Observed, batch_size: int, parts: int) -> None:
    """Checks that a step on a batch in `parts` gives the same as a step on the whole batch.

    A batch is divided among the processes, and again by `accumulate`.

    Raises:
        ValueError: `parts` does not divide the batch, a split has fewer images than there are
            processes, the loss is not a sum over images, `vae` has BatchNorm, `svi` records a CUDA
            graph, or `on_nan` is "skip" with several processes.
    """
    if batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts} ({processes.count()} process(es) by "
            f"{parts // processes.count()} part(s) of each), not {batch_size}"
        )
    for name in ("train", "validation", "test"):
        images = len(getattr(data, name).images)
        if images < processes.count():
            raise ValueError(
                f"data.{name} must hold an image for each of {processes.count()} processes, "
                f"not {images} image(s)"
            )
    elbo = getattr(svi.loss, "__self__", None)
    if not getattr(elbo, "sums_over_images", by_hand(svi) is not None):
        raise ValueError(
            "svi must have a loss that is a sum over images, so that those of the parts of a batch "
            f"add up: {type(elbo).__name__} does not say so by sums_over_images = True; train it "
            "in one process, without accumulate"
        )
    if _has_batchnorm(vae):
        raise ValueError(
            "vae must be without BatchNorm, which normalizes by the batch, and would see only a "
            "part of it; train it in one process, without accumulate"
        )
    if getattr(svi, "record", None) is not None:
        raise ValueError("svi must not record a CUDA graph where batches are taken in parts")
    if svi.optim.on_nan == "skip" and processes.count() > 1:
        raise ValueError("on_nan must be stop with several processes: one cannot skip alone")


def shared_latents(svi: SVI, vae: VAE, x: Tensor, y: Tensor | None, parts: int) -> list[str]:
    """Returns the names of the latents outside the data plate: drawn once for all images.

    Raises:
        ValueError: there are such latents, and the loss is a bound for each image, as IWAE; or an
            observed site is outside the data plate, and `parts` is above 1.
    """
    with evaluating(vae), evaluate.fixed_noise(x.device, 0):
        drawn = poutine.trace(vae.guide).get_trace(x, *optional(y))
        model = poutine.trace(poutine.replay(vae.model, trace=drawn)).get_trace(x, *optional(y))
    shared = [name for name in latent_names(drawn) if not in_data_plate(drawn.nodes[name])]
    if shared and isinstance(getattr(svi.loss, "__self__", None), RenyiELBO):
        raise ValueError(
            f"vae must have all latents in the data plate under a bound per image: {shared[0]!r} "
            "is outside of it; train it by Trace_ELBO"
        )
    for name in model.observation_nodes:
        if parts > 1 and not in_data_plate(model.nodes[name]):
            raise ValueError(
                "vae must have all observed sites in the data plate where batches are taken in "
                f"parts: {name!r}, outside of it, may be of the whole batch"
            )
    return shared


def _has_batchnorm(vae: VAE) -> bool:
    return any(isinstance(module, _BatchNorm) for module in vae.modules())
