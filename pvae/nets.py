"""Encoders and decoders: tensors to tensors, knowing nothing of probability.

Every net takes any image size and channel count, and sets its own output bias on request.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


def _check_image_shape(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name} must be (channels, height, width), not {tuple(shape)}")


def _check_input(v: Tensor, shape: torch.Size) -> None:
    if v.shape[1:] != shape:
        raise ValueError(
            f"the net was built for inputs of shape {tuple(shape)} each, "
            f"but was given {tuple(v.shape[1:])}"
        )


def _halved(size: int) -> int:
    """What a 3x3 convolution of stride 2 and padding 1 makes of a size."""
    return (size + 1) // 2


class MLP(nn.Module):
    """A multilayer perceptron between events of any two shapes.

    Args:
        in_shape: shape of one input; it is flattened.
        out_shape: shape of one output.
        hidden: widths of the hidden layers; `(400,)` and 784-400-20 are the classic VAE.
        activation: makes the activation after each hidden layer.

    Raises:
        ValueError: the input is not `(N, *in_shape)`.

    >>> MLP((1, 28, 28), (40,))(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 40])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: Sequence[int] = (400,),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        layers: list[nn.Module] = []
        width = math.prod(in_shape)
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), activation()]
            width = next_width
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(width, math.prod(out_shape))

    def forward(self, v: Tensor) -> Tensor:
        _check_input(v, self.in_shape)
        return self.out(self.hidden(v.flatten(1))).reshape(-1, *self.out_shape)

    def set_output_bias(self, raw: Tensor) -> None:
        """Starts the output at `raw` (`out_shape`) plus what the weights add."""
        with torch.no_grad():
            self.out.bias.copy_(raw.flatten())


class ConvEncoder(nn.Module):
    """The Keras tutorial's encoder: Conv 3x3 s2 C->32, 32->64, a hidden layer, the output.

    Args:
        image_shape: `(C, H, W)`, any sizes.
        out_shape: shape of one output, such as `(2 * latent_dim,)`.
        hidden: width of the hidden layer (16 as published).
        activation: makes the activations (ReLU as published).

    Raises:
        ValueError: `image_shape` is not three sizes, or the input is not `(N, C, H, W)` of it.

    >>> ConvEncoder((3, 28, 20), (40,))(torch.zeros(5, 3, 28, 20)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: int = 256,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        _check_image_shape("image_shape", image_shape)
        channels, height, width = image_shape
        self.image_shape, self.out_shape = torch.Size(image_shape), torch.Size(out_shape)
        flat = 64 * _halved(_halved(height)) * _halved(_halved(width))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),  # (N, 32, H/2, W/2)
            activation(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # (N, 64, H/4, W/4)
            activation(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            activation(),
            nn.Linear(hidden, math.prod(out_shape)),
        )

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.image_shape)
        return self.layers(x).reshape(-1, *self.out_shape)


def _doubling(in_channels: int, out_channels: int, size: tuple[int, int]) -> nn.ConvTranspose2d:
    """A 3x3 s2 transposed convolution from the halved size to `size`, odd or even."""
    even = (1 - size[0] % 2, 1 - size[1] % 2)
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=even
    )


class ConvDecoder(nn.Module):
    """The Keras tutorial's decoder: Linear to 64 x H/4 x W/4, ConvTranspose 3x3 s2 64->64, 64->32,
    ConvTranspose 3x3 to the likelihood's parameters.

    Args:
        latent_shape: shape of one latent, `(D,)`.
        out_shape: `(channels, H, W)` of the output, any sizes.
        activation: makes the activations (ReLU as published).

    Raises:
        ValueError: `out_shape` is not three sizes, or the input is not `(N, *latent_shape)`.

    >>> ConvDecoder((20,), (3, 28, 20))(torch.zeros(5, 20)).shape
    torch.Size([5, 3, 28, 20])
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        out_shape: Sequence[int],
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        _check_image_shape("out_shape", out_shape)
        channels, height, width = out_shape
        self.latent_shape, self.out_shape = torch.Size(latent_shape), torch.Size(out_shape)
        half = (_halved(height), _halved(width))
        quarter = (_halved(half[0]), _halved(half[1]))
        self.layers = nn.Sequential(
            nn.Linear(math.prod(latent_shape), 64 * math.prod(quarter)),
            activation(),
            nn.Unflatten(1, (64, *quarter)),
            _doubling(64, 64, half),
            activation(),
            _doubling(64, 32, (height, width)),
            activation(),
        )
        self.out = nn.ConvTranspose2d(32, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        _check_input(z, self.latent_shape)
        return self.out(self.layers(z.flatten(1)))

    def set_output_bias(self, raw: Tensor) -> None:
        """Starts each channel at the mean of `raw` (`out_shape`) over its pixels."""
        assert self.out.bias is not None
        with torch.no_grad():
            self.out.bias.copy_(raw.mean(dim=(1, 2)))
