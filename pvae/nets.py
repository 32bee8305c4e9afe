"""Encoders and decoders: networks from tensors to tensors, without any probability.

A net for images takes any image size and number of channels, or raises an error at construction. An
MLP takes data of any shape, `Conv1dEncoder` takes signals. Every decoder has `set_output_bias`. In
the docstrings "3x3 s2 p1" means kernel size 3x3, stride 2 and padding 1.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pvae.kinds import Shape

Activation = Callable[[], nn.Module]


# names of the sizes of one datum, for error messages
IMAGE = ("channels", "height", "width")
SIGNAL = ("channels", "length")


def _check_shape(name: str, shape: Shape, sizes: Sequence[str]) -> None:
    if len(shape) != len(sizes) or min(shape) < 1:
        raise ValueError(f"{name} must be ({', '.join(sizes)}), not {tuple(shape)}")


def _check_input(v: Tensor, shape: torch.Size) -> None:
    if v.shape[1:] != shape:
        raise ValueError(
            f"the net was built for inputs of shape {tuple(shape)} each, "
            f"but was given {tuple(v.shape[1:])}"
        )


def _halvings(shape: Shape, times: int) -> list[tuple[int, ...]]:
    """Returns the sizes of an image `(C, H, W)` or a signal `(C, L)`, then the sizes after each
    convolution of kernel 3, stride 2 and padding 1."""
    sizes = [tuple(shape[1:])]
    for _ in range(times):
        sizes.append(tuple((size + 1) // 2 for size in sizes[-1]))
    return sizes


class MLP(nn.Module):
    """A multilayer perceptron between events of any two shapes.

    Args:
        in_shape: shape of one input; it is flattened.
        out_shape: shape of one output.
        hidden: widths of the hidden layers; the classic VAE, 784-400-20, has `(400,)`.
        activation: makes the activation after each hidden layer.

    Raises:
        ValueError: the input is not `(N, *in_shape)`.

    >>> MLP((1, 28, 28), (40,))(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 40])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[int] = (400,),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        layers: list[nn.Module] = []
        widths = [math.prod(in_shape), *hidden]
        for width, next_width in pairwise(widths):
            layers += self._layer(width, next_width, activation)
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], math.prod(out_shape))

    def _layer(self, width: int, next_width: int, activation: Activation) -> list[nn.Module]:
        return [nn.Linear(width, next_width), activation()]

    def forward(self, v: Tensor) -> Tensor:
        _check_input(v, self.in_shape)
        return self.out(self.hidden(v.flatten(1))).reshape(-1, *self.out_shape)

    def set_output_bias(self, raw: Tensor) -> None:
        """Sets the output bias to `raw` (`out_shape`): training then starts near this output."""
        with torch.no_grad():
            self.out.bias.copy_(raw.flatten())


class _Gated(nn.Module):
    """`v -> a(W v + b) sigmoid(U v + c)`, with `W` and `U` in one linear map."""

    def __init__(self, width: int, next_width: int, activation: Activation) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * next_width)
        self.activation = activation()

    def forward(self, v: Tensor) -> Tensor:
        h, gate = self.linear(v).chunk(2, dim=-1)
        return self.activation(h) * gate.sigmoid()


class GatedMLP(MLP):
    """An MLP with gated hidden layers, `a(W v + b) sigmoid(U v + c)`.

    Sources: Language Modeling with Gated Convolutional Networks (2016), arXiv:1612.08083; with
    two layers of 300 in a VAE: VAE with a VampPrior (2017), arXiv:1705.07120, and Exemplar VAE
    (2020), arXiv:2004.04795.

    Args:
        in_shape, out_shape: as in `MLP`.
        hidden: widths of the hidden layers (300 and 300 as published).
        activation: makes the activations `a` (the identity as published).

    Raises:
        ValueError: the input is not `(N, *in_shape)`.

    >>> GatedMLP((1, 28, 28), (80,))(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 80])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[int] = (300, 300),
        activation: Activation = nn.Identity,
    ) -> None:
        super().__init__(in_shape, out_shape, hidden, activation)

    def _layer(self, width: int, next_width: int, activation: Activation) -> list[nn.Module]:
        return [_Gated(width, next_width, activation)]


class _Encoder(nn.Module):
    """Base of the encoders for images, or for signals if `sizes` says so: a subclass makes
    `layers`, from an image to its output."""

    layers: nn.Sequential
    sizes: Sequence[str] = IMAGE

    def __init__(self, image_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        _check_shape("image_shape", image_shape, self.sizes)
        self.image_shape, self.out_shape = torch.Size(image_shape), torch.Size(out_shape)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.image_shape)
        return self.layers(x).reshape(-1, *self.out_shape)


class _Decoder(nn.Module):
    """Base of the decoders to images, or to signals if `sizes` says so: a subclass makes `layers`,
    from a flat latent to channels, and `out`, a convolution from these to the output's channels."""

    layers: nn.Sequential
    out: nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
    sizes: Sequence[str] = IMAGE

    def __init__(self, latent_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        _check_shape("out_shape", out_shape, self.sizes)
        self.latent_shape, self.out_shape = torch.Size(latent_shape), torch.Size(out_shape)

    def forward(self, z: Tensor) -> Tensor:
        _check_input(z, self.latent_shape)
        return self.out(self.layers(z.flatten(1)))

    def set_output_bias(self, raw: Tensor) -> None:
        """Sets each channel's output bias to the mean of `raw` (`out_shape`) over its pixels."""
        assert self.out.bias is not None
        with torch.no_grad():
            self.out.bias.copy_(raw.mean(dim=tuple(range(1, raw.dim()))))


class ConvEncoder(_Encoder):
    """The Keras tutorial's encoder: Conv 3x3 s2 C->32, 32->64, a hidden layer, the output.

    Args:
        image_shape: `(C, H, W)`, any sizes.
        out_shape: shape of one output, such as `(2 * latent_dim,)`.
        hidden: width of the hidden layer (16 as published).
        activation: makes the activations (ReLU as published).

    Raises:
        ValueError: `image_shape` is not three sizes, or the input is not `(N, *image_shape)`.

    >>> ConvEncoder((3, 28, 20), (40,))(torch.zeros(5, 3, 28, 20)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        image_shape: Shape,
        out_shape: Shape,
        hidden: int = 256,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(image_shape, out_shape)
        flat = 64 * math.prod(_halvings(image_shape, 2)[-1])
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, 3, stride=2, padding=1),  # (N, 32, H/2, W/2)
            activation(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # (N, 64, H/4, W/4)
            activation(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            activation(),
            nn.Linear(hidden, math.prod(out_shape)),
        )


def _doubling(in_channels: int, out_channels: int, size: tuple[int, ...]) -> nn.ConvTranspose2d:
    """Makes a ConvTranspose 3x3 s2 from the halved size to `size`, which may be odd or even."""
    even = (1 - size[0] % 2, 1 - size[1] % 2)
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=even
    )


class ConvDecoder(_Decoder):
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
        self, latent_shape: Shape, out_shape: Shape, activation: Activation = nn.SiLU
    ) -> None:
        super().__init__(latent_shape, out_shape)
        full, half, quarter = _halvings(out_shape, 2)
        self.layers = nn.Sequential(
            nn.Linear(math.prod(latent_shape), 64 * math.prod(quarter)),
            activation(),
            nn.Unflatten(1, (64, *quarter)),
            _doubling(64, 64, half),
            activation(),
            _doubling(64, 32, full),
            activation(),
        )
        self.out = nn.ConvTranspose2d(32, out_shape[0], 3, padding=1)


class Conv1dEncoder(_Encoder):
    """`ConvEncoder` for signals: Conv 3 s2 C->32, 32->64, a hidden layer, the output.

    Args:
        signal_shape: `(C, L)`, any sizes.
        out_shape, hidden, activation: as in `ConvEncoder`.

    Raises:
        ValueError: `signal_shape` is not two sizes, or the input is not `(N, *signal_shape)`.

    >>> Conv1dEncoder((2, 50), (40,))(torch.zeros(5, 2, 50)).shape
    torch.Size([5, 40])
    """

    sizes = SIGNAL

    def __init__(
        self,
        signal_shape: Shape,
        out_shape: Shape,
        hidden: int = 256,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(signal_shape, out_shape)
        flat = 64 * math.prod(_halvings(signal_shape, 2)[-1])
        self.layers = nn.Sequential(
            nn.Conv1d(signal_shape[0], 32, 3, stride=2, padding=1),  # (N, 32, L/2)
            activation(),
            nn.Conv1d(32, 64, 3, stride=2, padding=1),  # (N, 64, L/4)
            activation(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            activation(),
            nn.Linear(hidden, math.prod(out_shape)),
        )


class Conv1dDecoder(_Decoder):
    """`ConvDecoder` for signals: Linear to 64 x L/4, ConvTranspose 3 s2 64->64, 64->32,
    ConvTranspose 3 to the likelihood's parameters.

    Args:
        latent_shape: shape of one latent, `(D,)`.
        out_shape: `(channels, L)` of the output, any sizes.
        activation: makes the activations.

    Raises:
        ValueError: `out_shape` is not two sizes, or the input is not `(N, *latent_shape)`.

    >>> Conv1dDecoder((20,), (2, 50))(torch.zeros(5, 20)).shape
    torch.Size([5, 2, 50])
    """

    sizes = SIGNAL

    def __init__(
        self, latent_shape: Shape, out_shape: Shape, activation: Activation = nn.SiLU
    ) -> None:
        super().__init__(latent_shape, out_shape)
        (full,), (half,), (quarter,) = _halvings(out_shape, 2)
        self.layers = nn.Sequential(
            nn.Linear(math.prod(latent_shape), 64 * quarter),
            activation(),
            nn.Unflatten(1, (64, quarter)),
            nn.ConvTranspose1d(64, 64, 3, stride=2, padding=1, output_padding=1 - half % 2),
            activation(),
            nn.ConvTranspose1d(64, 32, 3, stride=2, padding=1, output_padding=1 - full % 2),
            activation(),
        )
        self.out = nn.ConvTranspose1d(32, out_shape[0], 3, padding=1)


_COURSE = (28, 28)


def _check_course(name: str, shape: Shape) -> None:
    if tuple(shape[1:]) != _COURSE:
        raise ValueError(
            f"{name} is {tuple(shape)}, but the course's net takes {_COURSE[0]}x{_COURSE[1]} "
            f"images alone, not {shape[1]}x{shape[2]}: its decoder has no padding to choose, "
            "1 -> 5 -> 13 -> 28; the nets conv, deep and mlp take any size"
        )


class CourseEncoder(_Encoder):
    """The course's CNN: Conv 4x4 s2 C->32, 4x4 s2 p1 32->64, 4x4 s2 64->128, the output.

    Height and width shrink 28 -> 13 -> 6 -> 2, which leaves 512 features. A linear layer from them
    to `2 * latent_dim` is the same as the two published layers, for the loc and the log-scale.

    Args:
        image_shape: `(C, 28, 28)`.
        out_shape: shape of one output, such as `(2 * latent_dim,)`.
        activation: makes the activations (ReLU as published).

    Raises:
        ValueError: the images are not 28x28, or the input is not `(N, C, 28, 28)`.

    >>> CourseEncoder((1, 28, 28), (40,))(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self, image_shape: Shape, out_shape: Shape, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__(image_shape, out_shape)
        _check_course("image_shape", image_shape)
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, 4, stride=2),  # (N, 32, 13, 13)
            activation(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (N, 64, 6, 6)
            activation(),
            nn.Conv2d(64, 128, 4, stride=2),  # (N, 128, 2, 2)
            activation(),
            nn.Flatten(),
            nn.Linear(512, math.prod(out_shape)),
        )


class CourseDecoder(_Decoder):
    """The course's CNN: Linear to 512, ConvTranspose 5x5 s2 512->64, 5x5 s2 64->32, 4x4 s2 to the
    likelihood's parameters. Height and width grow 1 -> 5 -> 13 -> 28.

    Args:
        latent_shape: shape of one latent, `(D,)`.
        out_shape: `(channels, 28, 28)` of the output.
        activation: makes the activations (ReLU as published).

    Raises:
        ValueError: the output is not 28x28, or the input is not `(N, *latent_shape)`.

    >>> CourseDecoder((20,), (1, 28, 28))(torch.zeros(5, 20)).shape
    torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self, latent_shape: Shape, out_shape: Shape, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__(latent_shape, out_shape)
        _check_course("out_shape", out_shape)
        self.layers = nn.Sequential(
            nn.Linear(math.prod(latent_shape), 512),
            activation(),
            nn.Unflatten(1, (512, 1, 1)),
            nn.ConvTranspose2d(512, 64, 5, stride=2),  # (N, 64, 5, 5)
            activation(),
            nn.ConvTranspose2d(64, 32, 5, stride=2),  # (N, 32, 13, 13)
            activation(),
        )
        self.out = nn.ConvTranspose2d(32, out_shape[0], 4, stride=2)  # (N, channels, 28, 28)


WIDTHS = (32, 64, 128, 256, 512)


def _check_widths(widths: Sequence[int]) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be channels of at least 1, not {tuple(widths)}")


class DeepEncoder(_Encoder):
    """The deep "vanilla VAE": a Conv 3x3 s2, BatchNorm and LeakyReLU for each width, the output.

    Every layer halves height and width, rounding up. In train mode BatchNorm normalizes by the
    batch: the output for an image depends on the other images of its batch, and every call updates
    the running statistics, which eval mode uses. (A step of SVI calls the encoder once, in the
    guide.)
    Source: the "vanilla VAE" of github.com/AntixK/PyTorch-VAE (2020); Batch Normalization (2015),
    arXiv:1502.03167.

    Args:
        image_shape: `(C, H, W)`, any sizes.
        out_shape: shape of one output, such as `(2 * latent_dim,)`.
        widths: channels after each convolution.
        activation: makes the activations (LeakyReLU as published).

    Raises:
        ValueError: `image_shape` is not three sizes; `widths` are not sizes; the input is not
            `(N, C, H, W)`; in train mode, the batch is one image whose halvings end at one pixel,
            so that BatchNorm has no variance (torch's error).

    >>> DeepEncoder((3, 64, 48), (256,), widths=(8, 16))(torch.zeros(5, 3, 64, 48)).shape
    torch.Size([5, 256])
    """

    def __init__(
        self,
        image_shape: Shape,
        out_shape: Shape,
        widths: Sequence[int] = WIDTHS,
        activation: Activation = nn.LeakyReLU,
    ) -> None:
        super().__init__(image_shape, out_shape)
        _check_widths(widths)
        layers: list[nn.Module] = []
        for channels, next_channels in pairwise([image_shape[0], *widths]):
            layers += [
                nn.Conv2d(channels, next_channels, 3, stride=2, padding=1),
                nn.BatchNorm2d(next_channels),
                activation(),
            ]
        flat = widths[-1] * math.prod(_halvings(image_shape, len(widths))[-1])
        layers += [nn.Flatten(), nn.Linear(flat, math.prod(out_shape))]
        self.layers = nn.Sequential(*layers)


class DeepDecoder(_Decoder):
    """The mirror of `DeepEncoder`: Linear, a ConvTranspose 3x3 s2, BatchNorm and LeakyReLU for each
    width, and a Conv 3x3 to the likelihood's parameters, which are any real numbers.

    The published form, for images in [-1, 1], ends in a tanh: `nn.Sequential(DeepDecoder(...),
    nn.Tanh())`. `DeepEncoder` describes BatchNorm and names the source.

    Args:
        latent_shape: shape of one latent, `(D,)`.
        out_shape: `(channels, H, W)` of the output, any sizes.
        widths: those of the encoder, in the encoder's order.
        activation: makes the activations (LeakyReLU as published).

    Raises:
        ValueError: `out_shape` is not three sizes, `widths` are not sizes, or the input is not
            `(N, *latent_shape)`.

    >>> DeepDecoder((128,), (3, 64, 48), widths=(8, 16))(torch.zeros(5, 128)).shape
    torch.Size([5, 3, 64, 48])
    """

    def __init__(
        self,
        latent_shape: Shape,
        out_shape: Shape,
        widths: Sequence[int] = WIDTHS,
        activation: Activation = nn.LeakyReLU,
    ) -> None:
        super().__init__(latent_shape, out_shape)
        _check_widths(widths)
        *larger, smallest = _halvings(out_shape, len(widths))
        deepest = (widths[-1], *smallest)
        layers: list[nn.Module] = [
            nn.Linear(math.prod(latent_shape), math.prod(deepest)),
            nn.Unflatten(1, deepest),
        ]
        channels = [*reversed(widths), widths[0]]
        for (wide, narrow), size in zip(pairwise(channels), reversed(larger), strict=True):
            layers += [_doubling(wide, narrow, size), nn.BatchNorm2d(narrow), activation()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Conv2d(widths[0], out_shape[0], 3, padding=1)


class _Residual(nn.Module):
    """`v -> v + f(v)`: `f` is two 3x3 convolutions, with a norm and an activation before each.

    In a gated block the second convolution returns two images `a` and `b`, and
    `f(v) = a sigmoid(b)`.
    """

    def __init__(self, width: int, groups: int | None, gated: bool, activation: Activation) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_normed(width, groups, activation),
            nn.Conv2d(width, width, 3, padding=1),
            *_normed(width, groups, activation),
            nn.Conv2d(width, 2 * width if gated else width, 3, padding=1),
            *([nn.GLU(dim=1)] if gated else []),
        )

    def forward(self, v: Tensor) -> Tensor:
        return v + self.layers(v)


def _normed(width: int, groups: int | None, activation: Activation) -> list[nn.Module]:
    norm = [] if groups is None else [nn.GroupNorm(groups, width)]
    return [*norm, activation()]


def _check_residual(widths: Sequence[int], depths: Sequence[int]) -> None:
    _check_widths(widths)
    if len(depths) != len(widths) or min(depths) < 0:
        raise ValueError(
            f"depths must be blocks of at least 0, one for each of {len(widths)} widths, not "
            f"{tuple(depths)}"
        )


class ResNetEncoder(_Encoder):
    """A residual network: Conv 3x3 C->widths[0], residual blocks at each size, the output.

    Between two sizes a Conv 3x3 s2 halves height and width, rounding up. A block is `v + f(v)`:
    `f` is two 3x3 convolutions with a norm and an activation before each; a norm and an activation
    come before the output too. GroupNorm normalizes each image by itself: unlike with BatchNorm,
    the output for an image does not depend on the other images of its batch.
    Sources: Identity Mappings in Deep Residual Networks (2016), arXiv:1603.05027; Group
    Normalization (2018), arXiv:1803.08494; the gate: PixelCNN++ (2017), arXiv:1701.05517.

    Args:
        image_shape: `(C, H, W)`, any sizes.
        out_shape: shape of one output, such as `(2 * latent_dim,)`.
        widths: channels at each size, from the image's own size down.
        activation: makes the activations.
        depths: residual blocks at each size.
        hidden: width of a hidden layer before the output; None for no such layer.
        groups: the number of groups of GroupNorm, a divisor of all `widths`; None for no norm.
        gated: whether `f(v)` is `a sigmoid(b)`; the second convolution returns `a` and `b`.

    Raises:
        ValueError: `image_shape` is not three sizes; `widths` are not sizes; `depths` are not one
            number of at least 0 for each width; `groups` does not divide a width (torch's error);
            the input is not `(N, C, H, W)`.

    >>> ResNetEncoder((3, 28, 20), (40,), (8, 8, 16))(torch.zeros(5, 3, 28, 20)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        image_shape: Shape,
        out_shape: Shape,
        widths: Sequence[int] = (64, 64, 64),
        activation: Activation = nn.SiLU,
        *,
        depths: Sequence[int] = (1, 1, 1),
        hidden: int | None = None,
        groups: int | None = 1,
        gated: bool = False,
    ) -> None:
        super().__init__(image_shape, out_shape)
        _check_residual(widths, depths)
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], widths[0], 3, padding=1)]
        for above, width, depth in zip((None, *widths), widths, depths, strict=False):
            if above is not None:
                layers.append(nn.Conv2d(above, width, 3, stride=2, padding=1))
            layers += [_Residual(width, groups, gated, activation) for _ in range(depth)]
        flat = widths[-1] * math.prod(_halvings(image_shape, len(widths) - 1)[-1])
        sizes = [flat, *([] if hidden is None else [hidden]), math.prod(out_shape)]
        self.layers = nn.Sequential(
            *layers,
            *_normed(widths[-1], groups, activation),
            nn.Flatten(),
            *_linear(sizes, activation),
        )


def _linear(sizes: Sequence[int], activation: Activation) -> list[nn.Module]:
    first, *rest = (nn.Linear(size, next_size) for size, next_size in pairwise(sizes))
    return [first, *(module for layer in rest for module in (activation(), layer))]


class ResNetDecoder(_Decoder):
    """The mirror of `ResNetEncoder`: Linear, residual blocks at each size, ConvTransposes 3x3 s2
    between them, and a Conv 3x3 to the likelihood's parameters.

    Args:
        latent_shape: shape of one latent, `(D,)`.
        out_shape: `(channels, H, W)` of the output, any sizes.
        widths, depths, hidden, groups, gated, activation: as in `ResNetEncoder`, in its order.

    Raises:
        ValueError: `out_shape` is not three sizes, the input is not `(N, *latent_shape)`, or
            `widths`, `depths` or `groups` are invalid, as in `ResNetEncoder`.

    >>> ResNetDecoder((20,), (3, 28, 20), (8, 8, 16))(torch.zeros(5, 20)).shape
    torch.Size([5, 3, 28, 20])
    """

    def __init__(
        self,
        latent_shape: Shape,
        out_shape: Shape,
        widths: Sequence[int] = (64, 64, 64),
        activation: Activation = nn.SiLU,
        *,
        depths: Sequence[int] = (1, 1, 1),
        hidden: int | None = None,
        groups: int | None = 1,
        gated: bool = False,
    ) -> None:
        super().__init__(latent_shape, out_shape)
        _check_residual(widths, depths)
        *larger, smallest = _halvings(out_shape, len(widths) - 1)
        deepest = (widths[-1], *smallest)
        sizes = [math.prod(latent_shape), *([] if hidden is None else [hidden])]
        layers = [*_linear([*sizes, math.prod(deepest)], activation), nn.Unflatten(1, deepest)]
        up = zip((None, *reversed(widths)), reversed(widths), reversed(depths), strict=False)
        for below, width, depth in up:
            if below is not None:
                layers.append(_doubling(below, width, larger.pop()))
            layers += [_Residual(width, groups, gated, activation) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, *_normed(widths[0], groups, activation))
        self.out = nn.Conv2d(widths[0], out_shape[0], 3, padding=1)


class Affine(nn.Module):
    """`v -> scale v + shift`: converts between images in [0, 1] and the range of a net.

    With `Affine(2, -1)` before an encoder and `Affine(0.5, 0.5)` after a decoder's tanh, the nets
    work in [-1, 1], and the pair takes and returns images in [0, 1] like every other pair.

    >>> Affine(2, -1)(torch.tensor([0.0, 0.5, 1.0]))
    tensor([-1.,  0.,  1.])
    """

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, v: Tensor) -> Tensor:
        return self.scale * v + self.shift


class LogCounts(nn.Module):
    """`v -> sign(v) log(1 + |v|)`: brings counts, which may be large, into a range for a network.

    >>> LogCounts()(torch.tensor([0.0, 1.0, 999.0]))
    tensor([0.0000, 0.6931, 6.9078])
    """

    def forward(self, v: Tensor) -> Tensor:
        return v.sign() * v.abs().log1p()
