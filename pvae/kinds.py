"""One name each for what is handed from part to part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Pyro's own types for these two make every entry of a site optional, so that no reader of a trace
# passes a type checker: they are names for people
Trace = Any  # a pyro.poutine.Trace
Message = Any  # what a handler gets for each site: a pyro.poutine.runtime.Message
Distribution = torch.distributions.Distribution
Shape = Sequence[int]  # of one event, such as (C, H, W) or (D,)
Fn = Callable[..., Any]  # a Pyro program, any function of (x, y) that samples
Latents = Mapping[str, Tensor]  # draws by the name of their site
