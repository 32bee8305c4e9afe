"""Conditional distributions: a network, then a head that turns its output into a distribution."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Join = Callable[[Tensor, Tensor], Tensor]


def ignore_label(v: Tensor, y: Tensor) -> Tensor:
    """A join that leaves the label out on purpose: `p(u | v, y) = p(u | v)`.

    >>> import torch
    >>> ignore_label(torch.zeros(3, 2), torch.tensor([0, 1, 2])).shape
    torch.Size([3, 2])
    """
    return v


class Conditional(nn.Module):
    r"""The conditional distribution `p(u | v, y) = head(net(join(v, y)))`.

    `net` maps tensors to tensors and sees one batch dimension only; `head` maps its output to a
    distribution. `v` may have any leading dimensions, `(*, B) + event`: they are folded into one
    for the network and restored for the head, so particles and enumeration pass through
    convolutions.

    Args:
        net: `(N,) + event -> (N,) + param_shape`.
        head: `(*, B) + param_shape -> Distribution` with batch shape `(*, B)`.
        event_dim: dimensions of one `v`: 1 for a latent vector, 3 for an image, 0 for an index.
        join: combines `v` with a label or side vector `y`; None where there is none.

    Raises:
        ValueError: `y` is given and there is no join, or is missing and there is one; or the
            network's output is not of the head's `param_shape`.

    >>> import torch
    >>> from pvae.heads import Bernoulli
    >>> likelihood = Conditional(nn.Linear(2, 5), Bernoulli((5,)), event_dim=1)
    >>> likelihood(torch.zeros(7, 3, 2)).batch_shape
    torch.Size([7, 3])
    """

    def __init__(
        self, net: nn.Module, head: nn.Module, *, event_dim: int, join: Join | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.head = head
        self.event_dim = event_dim
        self.join = join

    def raw(self, v: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's raw parameters `net(join(v, y))`, shape `(*, B) + param_shape`."""
        v = self._joined(v, y)
        batch = v.shape[: v.dim() - self.event_dim]
        h = self.net(v.reshape(-1, *v.shape[len(batch) :]))
        expected = getattr(self.head, "param_shape", h.shape[1:])
        if h.shape[1:] != expected:
            raise ValueError(
                f"net returns {tuple(h.shape[1:])} for one input, "
                f"but the head needs param_shape {tuple(expected)}"
            )
        return h.reshape(*batch, *h.shape[1:])

    def forward(self, v: Tensor, y: Tensor | None = None) -> Any:
        return self.head(self.raw(v, y))

    def _joined(self, v: Tensor, y: Tensor | None) -> Tensor:
        if self.join is None:
            if y is not None:
                raise ValueError(
                    f"y was given (shape {tuple(y.shape)}), but this distribution takes no labels; "
                    "construct it with a join (ignore_label leaves them out on purpose)"
                )
            return v
        if y is None:
            raise ValueError("y is missing: this distribution is conditional on labels")
        return self.join(v, y)
