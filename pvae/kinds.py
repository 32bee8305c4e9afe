"""The names of the types that parts of the package pass to each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Pyro's own types for these two declare every entry of a site as optional, and a type checker
# refuses all code that reads them: here both are Any, and the names are for the reader
Trace = Any  # a pyro.poutine.Trace
Message = Any  # a handler gets one for each site: a pyro.poutine.runtime.Message
Distribution = torch.distributions.Distribution
Shape = Sequence[int]  # of one event, such as (C, H, W) or (D,)
Fn = Callable[..., Any]  # a Pyro program, any function of (x, y) that samples
Latents = Mapping[str, Tensor]  # draws by the name of their site
