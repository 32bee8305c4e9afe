"""The posterior of one image by Pyro's own NUTS: the distribution that the guide approximates."""

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pvae.evaluate.bounds import fixed_noise
from pvae.kinds import Fn
from pvae.programs import evaluating


def nuts(
    model: Fn,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 1000,
    warmup_steps: int = 300,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Tensor]:
    """Draws of `p(z | x)` for one image `x` `(1, C, H, W)`: `(num_samples, *event)` of each latent.

    One chain of the No-U-Turn sampler, exact as its length grows: successive draws are correlated,
    and a mode that the chain never visits is missing. The guide is not used.
    Source: The No-U-Turn Sampler (2011), arXiv:1111.4246.

    Raises:
        ValueError: `x` holds more than one image.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> nuts(vae.model, torch.ones(1, 1, 8, 8), num_samples=5, warmup_steps=5)["z"].shape
    torch.Size([5, 2])
    """
    if len(x) != 1:
        raise ValueError(f"x must be one image, (1, C, H, W), not {tuple(x.shape)}")
    with fixed_noise(x.device, seed), evaluating(model), torch.enable_grad():
        mcmc = MCMC(NUTS(model), num_samples, warmup_steps, disable_progbar=quiet)
        mcmc.run(x, y)
    return {name: values.detach().squeeze(1) for name, values in mcmc.get_samples().items()}
