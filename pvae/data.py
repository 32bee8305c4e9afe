"""Data sets held in memory, pictures as bytes, and the ways in which a model may observe them.

A split of pictures is one uint8 tensor `(N, C, H, W)`; a batch is an `index_select` and a division
by 255. A split of data of any other kind is a float32 tensor `(N, *event)`. `load` finds and reads
the data, `observe` chooses how the model observes them (grey, binary or dequantised pixels, or
unchanged numbers), and `Observed.batches` gives the batches of one epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae import processes, reading, streaming
from pvae.files import write_atomically
from pvae.reading import NAMES as NAMES, is_found as is_found

# each use of a seed draws from its own random stream; 0, 1 and 2 are for the pixels of the splits
_EPOCHS, _SPLITTING = 3, 4


class Split(NamedTuple):
    """One part of a data set; its size is `len(split.images)`.

    Args:
        images: `(N, C, H, W)`, uint8, or float32 in [0, 1] if dequantised; data of any other kind
            `(N, *event)`, float32. In memory, or a `streaming.Streamed` tensor.
        labels: `(N,)` int64, or None.
        mask: `(N, 1 or C, H, W)` bool, True where the model sees a pixel; None if it sees all.

    >>> Split(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), None).images.shape
    torch.Size([5, 1, 8, 8])
    """

    images: Tensor
    labels: Tensor | None
    mask: Tensor | None = None

    @property
    def y(self) -> Tensor | None:
        """The `y` that a model may be conditional on: the mask if there is one, else the labels.

        >>> split = load("digits").test
        >>> split.y is split.labels
        True
        """
        return self.labels if self.mask is None else self.mask

    def first(self, n: int) -> Split:
        """The first `n` images with their labels and masks, or all images if there are fewer.

        Raises ValueError unless `n` is at least 1.

        >>> load("digits").test.first(3).images.shape
        torch.Size([3, 1, 28, 28])
        """
        _check_at_least(1, n=n)
        return _each(self, lambda tensor: tensor[:n])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three splits.

    `sha256` is that of all pixels, labels and shapes. `note` is one line for the user, or "".
    `class_names` are the names of the labels, if the labels have other names than their numbers.

    >>> digits = load("digits")
    >>> len(digits.train.images), digits.image_shape, digits.num_classes
    (1439, (1, 28, 28), 10)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    sha256: str
    note: str = ""
    class_names: Sequence[str] | None = None

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The splits for training, validation and test.

        >>> [len(split.images) for split in load("digits").splits]
        [1439, 179, 179]
        """
        return self.train, self.validation, self.test

    @property
    def pictures(self) -> bool:
        """Whether the data are pictures, bytes `(C, H, W)`, and not data of any other kind.

        >>> load("digits").pictures
        True
        """
        return self.train.images.dtype == torch.uint8

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(C, H, W)` of every image, or the shape of one datum of any other kind.

        >>> load("digits").image_shape
        (1, 28, 28)
        """
        return tuple(self.train.images.shape[1:])

    @property
    def mean_image(self) -> Tensor:
        """The mean of the training images, float32 `(C, H, W)` in [0, 1], or of other data `event`.

        >>> load("digits").mean_image.shape
        torch.Size([1, 28, 28])
        """
        return _mean(self.train.images)

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label in any split, or None without labels.

        >>> load("digits").num_classes
        10
        """
        labels = [s.labels for s in self.splits]
        return max((1 + int(y.max()) for y in labels if y is not None), default=None)

    def require_same(self, name: str, sha256: str, where: object) -> None:
        """Raise ValueError unless `sha256`, of the run in `where`, is the SHA-256 of these data.

        >>> digits = load("digits")
        >>> digits.require_same("digits", digits.sha256, "runs/1")
        """
        if sha256 != self.sha256:
            raise ValueError(
                f"the run in {where} was started on {name} (SHA-256 {sha256[:12]}...), but the "
                f"data found now is {self.name} ({self.sha256[:12]}...): name the same data by "
                "--dataset and --data-root"
            )


def load(
    name: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    download: bool = True,
    stream: bool = False,
    workers: int | None = None,
    split: Sequence[float] | None = None,
    as_is: bool = False,
) -> Dataset:
    """Load a data set of `NAMES`, or the images or data at a path, in three splits.

    - None: MNIST, found or downloaded as below; offline the digits, and `note` says so.
    - "mnist", "fashion-mnist", "kmnist", "cifar10": searched for, in torchvision's layout, in
      `root`, `$PVAE_DATA`, `./data` and the user's cache folder, in this order; IDX files may be
      packed by gzip. If none of these folders has the data set, it is downloaded into the cache
      (never with `download=False`). The last sixth of the training images (of CIFAR-10: the last
      tenth) is for validation.
    - "digits": scikit-learn's 1,797 digits, 8x8, scaled to 28x28; needs no network.
    - "patches": 64x64 RGB patches, one every 8 pixels, of scikit-learn's two photographs (a temple
      and a flower: the two labels); needs no network. Patches overlap, but each split has its own
      strips of the photographs, so no pixel is in two splits.
    - a `.npy` or `.npz` file: uint8, bool, or float in [0, 1] (rounded to 255ths), of shape
      `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)` with C 1 or 3; if the shape can be read in both
      ways, axis 1 is the channels. In a `.npz` the key of the images is "images" or "x", or they
      are the only array; the key of the labels, which are optional, is "labels" or "y".
    - such a file of any other data, `(N, D)` or `(N, *event)`: integers, bool or floats, whose
      values stay unchanged. With `as_is=True`, arrays of the shape and type of pictures are read in
      this way too.
    - a `.npz` file of splits: the keys "train" and "test", and optionally "validation" (or "val"),
      with "train_labels" and so on for all splits or for none. The keys of MedMNIST
      ("train_images") and Keras ("x_train", "y_train") work too.
    - a folder of png, jpg, jpeg, bmp or webp images of one size, at any depth. Its subfolders, if
      any, are the labels, in sorted order, and name them. Hidden files are ignored.
    - a folder of splits, with subfolders `train` and `test`, and optionally `validation` (or
      `val`); all have the same subfolders (the labels), or all have none.

    If a file or folder of splits has no validation split, a tenth of the training images, drawn by
    `seed`, is for validation, and `note` says so. `note` also says how many data are, byte for
    byte, in two splits. The digits and all other files and folders are split 80/10/10, or by the
    fractions in `split`, at random by `seed`; the global random state stays unchanged. A name of
    `NAMES` means the data set even if a file or folder has that name too: write `./digits` for the
    folder.

    With `stream`, the bytes of a `.npy` file, or the images of a folder, are not kept in memory,
    but read when they are needed (`pvae.streaming`). Data that would take more than a quarter of
    the machine's memory are streamed even without `stream`; `note` says if data are streamed.
    `workers` processes read ahead (None: 2 for a folder, none for a file).

    Raises:
        FileNotFoundError: a named data set is neither on the disk nor can be downloaded.
        ValueError: the name is unknown, the files cannot be used, `split` is not three fractions,
            `split` is given for data with their own splits, or `workers` for data in memory.

    >>> load("digits").test.images.shape
    torch.Size([179, 1, 28, 28])
    >>> [len(part.images) for part in load("digits", split=(0.5, 0.25, 0.25)).splits]
    [899, 449, 449]
    """
    if split is not None:
        _check_fractions(split)
    found = reading.read(name, root, download=download, as_is=as_is, stream=stream, workers=workers)
    splits = [Split(*part) for part in found.parts]
    if workers and not isinstance(splits[0].images, streaming.Streamed):
        raise ValueError(
            f"workers must be 0 or left out, not {workers}: they read data that is streamed, and "
            f"{found.name} is in memory"
        )
    return replace(_in_three(found, splits, seed, split), class_names=found.class_names)


def _in_three(
    found: reading.Found, splits: Sequence[Split], seed: int, split: Sequence[float] | None
) -> Dataset:
    if len(splits) == 1:
        return _split_at_random(found.name, splits[0], seed, split or _TENTHS, found.note)
    if split is not None:
        raise ValueError(f"split must be None, not {split}: {found.name} has splits of its own")
    if len(splits) == 3:
        return _dataset(found.name, splits, found.note)
    images, labels, _ = _shuffled(splits[0], seed)
    parts = reading.hold_out((images, labels), 10, found.name)
    what = "no validation split, so a tenth of the training data is for validation"
    note = "; ".join(filter(None, (f"{found.name}: {what}", found.note)))
    return _dataset(found.name, [*(Split(*part) for part in parts), splits[1]], note)


def pixels(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1] by a division by 255; floats stay unchanged.

    Streamed images are read into memory. Raises ValueError for any other dtype.

    >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    images = streaming.in_memory(images)
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 or floating point, not {images.dtype}")
    return images.to(torch.float32) / 255


def chunks(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Walk through a split in order, at most `size` images at a time.

    Gives float32 images `(B, C, H, W)` or data `(B, *event)`, and their part of `split.y`. Raises
    ValueError unless `size` is at least 1.

    >>> [len(x) for x, y in chunks(load("digits").test, 100)]
    [100, 79]
    """
    _check_at_least(1, size=size)
    rows = streaming.consecutive(len(split.images), size, split.images.device)
    ys = repeat(None) if split.y is None else split.y.split(size)
    return zip(map(pixels, streaming.gathered(split.images, rows)), ys, strict=False)


# ----- how the model observes the data ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Observed:
    """A data set as the model observes it; `how` is a name of `OBSERVATIONS`.

    The splits stay fixed. `redraw`, if not None, draws the pixels of each uint8 training batch
    anew, from a generator. `scaling`, if not None, has standardised the data.

    >>> binary = observe(load("digits"), "dynamic")
    >>> x, y = next(binary.batches(100, seed=0, epoch=0))
    >>> x.shape, x.unique()
    (torch.Size([100, 1, 28, 28]), tensor([0., 1.]))
    """

    how: str
    train: Split
    validation: Split
    test: Split
    redraw: _Draw | None
    scaling: Scaling | None = None

    @property
    def label(self) -> str:
        """How the data are observed, in words.

        >>> observe(load("digits"), "static").label
        'statically binarised'
        """
        return OBSERVATIONS[self.how].label + STANDARDIZED * (self.scaling is not None)

    @property
    def unit(self) -> str:
        """The word for one of the data: "image" or "datum".

        >>> observe(load("digits"), "grey").unit
        'image'
        """
        shape = self.train.images.shape[1:]
        return "image" if len(shape) == 3 and shape[0] in (1, 3) else "datum"

    @property
    def units(self) -> str:
        """The plural of `unit`: "images" or "data".

        >>> observe(load("digits"), "grey").units
        'images'
        """
        return "images" if self.unit == "image" else "data"

    @property
    def mean_image(self) -> Tensor:
        """The mean of the training images as the model observes them, float32 `(C, H, W)` or
        `event`; for redrawn pixels, the mean of the grey images.

        >>> observe(load("digits"), "as_is").mean_image.max() > 1
        tensor(True)
        """
        return _mean(self.train.images)

    def to(self, device: torch.device | str) -> Observed:
        """Move the three splits to a device; `batches` then gives batches on this device.

        >>> observe(load("digits"), "grey").to("cpu").train.images.device
        device(type='cpu')
        """
        parts = (self.train, self.validation, self.test)
        train, validation, test = (_each(part, lambda t: t.to(device)) for part in parts)
        return replace(self, train=train, validation=validation, test=test)

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches of one epoch, in random order: float32 `(B, C, H, W)`, and their `train.y`.

        Every training image is in one batch; the last batch may be smaller. The first `skip`
        batches are left out. Data that are not pictures come as `(B, *event)`.

        Each of several processes gets its part of each batch, with the pixels that a single process
        would get. If the last batch has fewer images than there are processes, some get none.

        Order and redrawn pixels depend only on `seed`, `epoch`, the batch size and the device, so
        a resumed run gets the batches of an uninterrupted run. The global random state stays
        unchanged. Raises ValueError unless `batch_size` is at least 1 and `seed`, `epoch` and
        `skip` are at least 0.

        >>> grey = observe(load("digits"), "grey")
        >>> sum(len(x) for x, y in grey.batches(100, seed=0, epoch=7))
        1439
        """
        _check_at_least(1, batch_size=batch_size)
        _check_at_least(0, skip=skip)
        device = self.train.images.device
        generator = _generator(device, seed=seed, stream=_EPOCHS, epoch=epoch)
        order = torch.randperm(len(self.train.images), generator=generator, device=device)
        return self._gathered(order.split(batch_size), skip, generator)

    def _gathered(
        self, batches: Sequence[Tensor], skip: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's part of each batch of indices."""
        images, y, redraw = self.train.images, self.train.y, self.redraw
        blank = torch.zeros((), dtype=images.dtype, device=images.device)
        mine = (batch[processes.part(len(batch))] for batch in batches[skip:])
        if redraw is not None:
            for batch in batches[:skip]:  # move the generator past the skipped batches
                redraw(blank.expand(len(batch), *images.shape[1:]), generator)
        for batch, x in zip(batches[skip:], streaming.gathered(images, mine), strict=True):
            part = processes.part(len(batch))
            if redraw is not None:  # the whole batch: the draws do not depend on the processes
                whole = blank.repeat(len(batch), *images.shape[1:])
                whole[part] = x
                x = redraw(whole, generator)[part]
            yield pixels(x), None if y is None else y.index_select(0, batch[part])


def _mean(images: Tensor) -> Tensor:
    if images.is_floating_point():
        return images.mean(0, dtype=torch.float64).to(torch.float32)
    # summed as integers, without a float copy of the data set
    return (images.sum(0, dtype=torch.int64) / (255.0 * len(images))).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Mean and standard deviation of each element over the training data, both `(*event)`.

    The standard deviation of an element that never changes is set to 1. The density of the
    standardised data `(x - mean) / sd` exceeds that of the data `x` by `sum log sd` nats per datum.

    >>> scaling = Scaling.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> scaling.apply(torch.tensor([[3.0, 6.0]]))
    tensor([[1., 1.]])
    """

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaling:
        """The scaling of data `(N, *event)`."""
        sd, mean = torch.std_mean(x.double(), 0, correction=0)
        # a constant element has a deviation of 0, up to rounding
        constant = sd <= 1e-6 * mean.abs()
        return cls(mean.float(), sd.masked_fill(constant, 1.0).float())

    def apply(self, x: Tensor) -> Tensor:
        """`(x - mean) / sd`."""
        return (x - self.mean.to(x)) / self.sd.to(x)

    def undo(self, x: Tensor) -> Tensor:
        """`mean + sd x`: back to the units of the data."""
        return self.mean.to(x) + self.sd.to(x) * x

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `mean` and `sd` to a `.npz` file."""
        mean, sd = self.mean.cpu().numpy(), self.sd.cpu().numpy()
        write_atomically(path, lambda file: np.savez(file, mean=mean, sd=sd))


def observe(
    dataset: Dataset,
    how: str,
    seed: int = 0,
    *,
    standardize: bool = False,
    numpy_seed: int | None = None,
) -> Observed:
    """Choose how the model observes a uint8 image with pixel values k in 0..255, or other data.

    - "grey": k / 255.
    - "threshold": 1 where k >= 128, else 0.
    - "static": 1 with probability k / 255, drawn once.
    - "dynamic": the same, but training images are drawn anew for every batch.
    - "dequantized": (k + u) / 256 with u uniform in (0, 1), anew for every training batch.
    - "as_is": k itself, a count; the unchanged numbers of data that are not pictures.

    Float data that are not pictures can be observed as "grey" or "as_is", both of which leave them
    unchanged. Pixels that are drawn once are drawn by `seed`, each split from its own random
    stream. With `numpy_seed`, NumPy's legacy generator of that seed draws instead the binary pixels
    of the validation images, and then those of the test images: with 777 they are those of the
    published tables (VAE with a VampPrior, 2017, arXiv:1705.07120). Masks and labels stay
    unchanged. With `standardize`, each element gets mean 0 and standard deviation 1 over the
    training data; `Observed.scaling` holds the mean and standard deviation before.

    Raises:
        ValueError: `how` is not a name of `OBSERVATIONS`, or is only for pictures; `standardize`
            with pixels that are redrawn; or `numpy_seed` without binary pixels that are drawn.

    >>> observe(load("digits"), "threshold").test.images.unique()
    tensor([  0, 255], dtype=torch.uint8)
    """
    if how not in OBSERVATIONS:
        raise ValueError(f"how must be one of {', '.join(OBSERVATIONS)}, not {how!r}")
    _, fix, redraw, _, only_pictures = OBSERVATIONS[how]
    if only_pictures and not dataset.pictures:
        names = ", ".join(name for name, found in OBSERVATIONS.items() if not found.only_pictures)
        raise ValueError(f"how must be {names}, not {how!r}: {dataset.name} holds no pictures")
    if standardize and redraw is not None:
        raise ValueError(f"standardize must be False, not True: {how!r} draws its pixels anew")
    if numpy_seed is not None and fix is not _binarize:
        raise ValueError(
            f"numpy_seed must be None, not {numpy_seed}, where no binary pixels are drawn: the "
            f"data is observed as {how}"
        )
    published = None if numpy_seed is None else np.random.RandomState(numpy_seed)

    def fixed(stream: int, split: Split) -> Split:
        if published is not None and stream > 0:
            return _binarize_by(published, split)
        generator = _generator(split.images.device, seed=seed, stream=stream)
        return split._replace(images=streaming.changed(split.images, fix, generator))

    parts = (
        fixed(0, dataset.train) if redraw is None else dataset.train,
        fixed(1, dataset.validation),
        fixed(2, dataset.test),
    )
    if not standardize:
        return Observed(how, *parts, redraw)
    scaling = Scaling.of(pixels(parts[0].images))
    train, validation, test = (
        part._replace(images=scaling.apply(pixels(part.images))) for part in parts
    )
    return Observed(how, train, validation, test, None, scaling)


def _as_they_are(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _numbers(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.to(torch.float32)


def _threshold(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images >= 128).to(torch.uint8) * 255


def _binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    # P(U < k) = k / 255 exactly for U uniform on 0..254, without a float copy of the data set
    uniform = torch.randint(
        255, images.shape, dtype=torch.uint8, generator=generator, device=images.device
    )
    return (uniform < images).to(torch.uint8) * 255


def _binarize_by(draw: np.random.RandomState, split: Split) -> Split:
    """Draws binary pixels as the published tables do: by NumPy, with float32 probabilities."""
    grey = split.images.cpu().numpy().astype(np.float32) / np.float32(255)
    drawn = torch.from_numpy(draw.binomial(1, grey).astype(np.uint8) * np.uint8(255))
    return split._replace(images=drawn.to(split.images.device))


def _dequantize(images: Tensor, generator: torch.Generator) -> Tensor:
    # The float32 sum 255 + u, with u near 1, rounds up to 256, out of its bin. So u is an odd
    # multiple of 2**-16: these have mean 1/2, are strictly between 0 and 1, and their sum with a
    # byte is exact in 24 bits.
    odd = 1 + 2 * torch.randint(
        2**15, images.shape, dtype=torch.int32, generator=generator, device=images.device
    )
    return (images + odd.to(torch.float32) / 2**16) / 256


_Draw = Callable[[Tensor, torch.Generator], Tensor]
STANDARDIZED = ", standardised"  # added to the label of standardised data
_PIXELS = ("binary", "levels", "continuous")
KINDS = (*_PIXELS, "counts")


class Observation(NamedTuple):
    """One way to observe uint8 images, or other data.

    Args:
        label: its name in words.
        fix: makes the fixed images of a split, from a generator.
        redraw: draws the pixels of a training batch anew; None if they stay fixed too.
        suits: the kinds of likelihood that it is for: "binary" (0 and 1), "levels" (256 grey levels
            k / 255), "continuous" (any number; in [0, 1] for pictures), "counts" (whole numbers of
            at least 0).
        only_pictures: whether it is only for uint8 images.

    >>> OBSERVATIONS["dequantized"].suits
    ('continuous',)
    """

    label: str
    fix: _Draw
    redraw: _Draw | None
    suits: tuple[str, ...]
    only_pictures: bool = True


#: The ways to observe images and other data, by name.
#: The usual observation for a kind of likelihood is the first one that suits it.
OBSERVATIONS: Mapping[str, Observation] = {
    # "grey" also leaves floats in [0, 1] unchanged
    "grey": Observation("grey", _as_they_are, None, ("levels", "continuous"), False),
    "dynamic": Observation("dynamically binarised (one fixed draw)", _binarize, _binarize, _PIXELS),
    "static": Observation("statically binarised", _binarize, None, _PIXELS),
    "threshold": Observation("thresholded", _threshold, None, _PIXELS),
    "dequantized": Observation("dequantised", _dequantize, _dequantize, ("continuous",)),
    "as_is": Observation("as they are", _numbers, None, ("continuous", "counts"), False),
}


def usual_observation(kind: str) -> str:
    """The usual observation of pictures for a kind of likelihood, one of `KINDS`.

    Raises ValueError for any other kind.

    >>> usual_observation("binary"), usual_observation("levels")
    ('dynamic', 'grey')
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return next(name for name, found in OBSERVATIONS.items() if kind in found.suits)


def _generator(
    device: torch.device | str, *, seed: int, stream: int, epoch: int = 0
) -> torch.Generator:
    _check_at_least(0, seed=seed, epoch=epoch)
    # SeedSequence mixes its words; a sum of them would give (0, 1) and (1, 0) the same stream
    mixed = np.random.SeedSequence((seed, stream, epoch)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def _each(split: Split, change: Callable[[Tensor], Tensor]) -> Split:
    images, *rest = split
    return Split(change(images), *(None if tensor is None else change(tensor) for tensor in rest))


def _cut(split: Split, sizes: int | list[int]) -> Iterator[Split]:
    return map(Split, *(repeat(None) if t is None else t.split(sizes) for t in split))


def _check_at_least(least: int, **arguments: int) -> None:
    for argument, value in arguments.items():
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, not {value}")


# ----- putting a data set together ----------------------------------------------------------------


def _dataset(name: str, splits: Iterable[Split], note: str = "") -> Dataset:
    train, validation, test = splits
    digest = hashlib.sha256()
    for tensor in (t for split in (train, validation, test) for t in (split.images, split.labels)):
        if tensor is None:
            digest.update(b"no labels")
        else:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            for piece in streaming.pieces(tensor):
                digest.update(piece.contiguous().numpy().data)
    note = "; ".join(filter(None, (note, streaming.note(name, train.images))))
    return Dataset(name, train, validation, test, digest.hexdigest(), note)


def from_torch(
    name: str,
    *parts: torch.utils.data.Dataset[Any] | torch.utils.data.DataLoader[Any],
    seed: int = 0,
    workers: int | None = None,
    stream: bool = False,
) -> Dataset:
    """Data sets or loaders of torch as a `Dataset`: three (training, validation, test) or one.

    A single one is split 80/10/10 at random by `seed`. Each is map-style, as torchvision's are. An
    item is an image `(C, H, W)`, uint8 or float32 in [0, 1], or data of any other shape, float32;
    or a pair of such a tensor and an integer label. It must be the same whenever it is read.

    All items are read here, for the labels and the SHA-256. They are then kept in memory; with
    `stream`, or if they would take more than a quarter of the machine's memory, they are instead
    read again when they are needed. `workers` processes read ahead (None: as many as a loader has,
    none for a data set). Only the data set of a loader is used: the Trainer chooses the order and
    the size of the batches.

    Raises:
        ValueError: there are neither one nor three parts, an item is of another kind, the parts
            differ in dtype, shape or labels, or a loader has its own sampler, batch_sampler,
            collate_fn or worker_init_fn.

    >>> items = [(torch.zeros(1, 4, 4, dtype=torch.uint8), i % 3) for i in range(20)]
    >>> from_torch("mine", items).num_classes
    3
    """
    found = [streaming.of_items(part, name, workers) for part in parts]
    keep = not stream and all(images.fits() for images, _ in found)
    splits = [Split(images.read() if keep else images, labels) for images, labels in found]
    if len(splits) == 1:
        return _split_at_random(name, splits[0], seed, _TENTHS)
    if len(splits) != 3:
        raise ValueError(
            f"parts must be one data set, or three (training, validation, test), not {len(splits)}"
        )
    kinds = [
        f"{x.dtype} {tuple(x.shape[1:])} with{'out' * (y is None)} labels" for x, y, _ in splits
    ]
    if len(set(kinds)) > 1:
        raise ValueError(f"parts must be of one dtype and shape, not {', '.join(kinds)}")
    return _dataset(name, splits)


_TENTHS = (0.8, 0.1, 0.1)


def _check_fractions(split: Sequence[float]) -> None:
    if len(split) != 3 or not all(f > 0 for f in split) or abs(sum(split) - 1) > 1e-6:
        raise ValueError(
            "split must be three fractions above 0 that sum to 1, for training, validation and "
            f"test, not {' '.join(map(str, split))}"
        )


def _split_at_random(
    name: str, split: Split, seed: int, fractions: Sequence[float], note: str = ""
) -> Dataset:
    size = len(split.images)
    if size < 10:
        raise ValueError(
            f"{name}: the number of images must be at least 10, for three splits, not {size}"
        )
    validation, test = (int(size * fraction + 1e-6) for fraction in fractions[1:])
    sizes = [size - validation - test, validation, test]
    if min(sizes) < 1:
        listed = " ".join(map(str, fractions))
        raise ValueError(f"split must leave no part empty, not {listed}: of {size} data, {sizes}")
    return _dataset(name, _cut(_shuffled(split, seed), sizes), note)


def _shuffled(split: Split, seed: int) -> Split:
    generator = _generator("cpu", seed=seed, stream=_SPLITTING)
    order = torch.randperm(len(split.images), generator=generator)
    return _each(split, lambda tensor: tensor[order])
