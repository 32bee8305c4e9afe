"""Image data sets held in memory as bytes, and the ways in which a model may observe them.

A split of a data set is one uint8 tensor `(N, C, H, W)`; a batch is an `index_select` and a
division by 255. `load` finds or reads the data, `observe` chooses what the model sees of it (grey,
binary or dequantised pixels), and `Observed.batches` gives the batches of one epoch.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import math
import os
import pickle
import reprlib
import socket
import struct
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pvae import processes
from pvae.untrusted import Named, check_pickle, check_unpacked

NAMES = ("mnist", "fashion-mnist", "kmnist", "cifar10", "digits", "patches")

_CLASS_NAMES: Mapping[str, Sequence[str]] = {
    "fashion-mnist": (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "boot"),
    ),
}

# Each use of a seed draws from its own random stream; 0, 1 and 2 are for the pixels of the splits.
_EPOCHS, _SPLITTING = 3, 4


class Split(NamedTuple):
    """One part of a data set; its size is `len(split.images)`.

    images: `(N, C, H, W)`, uint8, or float32 in [0, 1] where dequantised.
    labels: `(N,)` int64, or None.
    mask: `(N, 1 or C, H, W)` bool, True where a pixel is seen; None where all pixels are.

    >>> Split(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), None).images.shape
    torch.Size([5, 1, 8, 8])
    """

    images: Tensor
    labels: Tensor | None
    mask: Tensor | None = None

    @property
    def y(self) -> Tensor | None:
        """What a model may be conditional on: the mask where there is one, else the labels.

        >>> split = load("digits").test
        >>> split.y is split.labels
        True
        """
        return self.labels if self.mask is None else self.mask

    def first(self, n: int) -> Split:
        """The first `n` images with their labels and masks, or all images if there are fewer;
        raises ValueError unless `n` is at least 1.

        >>> load("digits").test.first(3).images.shape
        torch.Size([3, 1, 28, 28])
        """
        _check_at_least(1, n=n)
        return _each(self, lambda tensor: tensor[:n])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three splits, with their SHA-256 (over pixels, labels and shapes) and a `note`:
    one line that people should read, or "".

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

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The splits for training, validation and test.

        >>> [len(split.images) for split in load("digits").splits]
        [1439, 179, 179]
        """
        return self.train, self.validation, self.test

    @property
    def class_names(self) -> Sequence[str] | None:
        """What the labels stand for, where they are no digits.

        >>> load("digits").class_names is None
        True
        """
        return _CLASS_NAMES.get(self.name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every image.

        >>> load("digits").image_shape
        (1, 28, 28)
        """
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def mean_image(self) -> Tensor:
        """The mean of the training images, float32 `(C, H, W)` in [0, 1].

        >>> load("digits").mean_image.shape
        torch.Size([1, 28, 28])
        """
        images = self.train.images  # summed as integers, without a float copy of the data set
        return (images.sum(0, dtype=torch.int64) / (255.0 * len(images))).to(torch.float32)

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label in any split, or None where there are no labels.

        >>> load("digits").num_classes
        10
        """
        labels = [s.labels for s in self.splits]
        return max((1 + int(y.max()) for y in labels if y is not None), default=None)

    def require_same(self, name: str, sha256: str, where: object) -> None:
        """Raise ValueError unless this is the data, by its SHA-256, of the run in `where`.

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
) -> Dataset:
    """Load a data set of `NAMES`, or the images at a path, in three splits.

    - None: MNIST, found or downloaded as below; offline the digits, and `note` says so.
    - "mnist", "fashion-mnist", "kmnist", "cifar10": looked for, in torchvision's layout, in
      `root`, `$PVAE_DATA`, `./data` and the user's cache folder, in this order; IDX files may be
      packed by gzip. If none of them has it, it is downloaded into the cache (never with
      `download=False`). The last sixth of the training images (of CIFAR-10: the last tenth) is for
      validation.
    - "digits": scikit-learn's 1,797 digits, 8x8, scaled to 28x28; needs no network.
    - "patches": 64x64 RGB patches, one every 8 pixels, of scikit-learn's two photographs (a temple
      and a flower: the two labels); needs no network. Patches overlap, but each split has its own
      strips of the photographs, so no pixel is in two splits.
    - a `.npy` or `.npz` file: uint8, bool, or float in [0, 1] (rounded to 255ths), of shape
      `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)` with C 1 or 3; if the shape can be read in both
      ways, axis 1 is the channels. In a `.npz` the images are "images", "x" or the only array;
      labels, optional, are "labels" or "y".
    - a folder of png, jpg, jpeg, bmp or webp images of one size, at any depth. Its subfolders, if
      any, are the labels, in sorted order. Hidden files are left out.
    - a folder with subfolders `train` and `test`, and `validation` (or `val`) or not: the splits as
      they are, each with the same subfolders (the labels) or none. Without `validation`, a tenth of
      the training images, drawn by `seed`, is for validation, and `note` says so.

    Digits, files and other folders are split 80/10/10 at random by `seed`; the global random state
    stays as it is. A name of `NAMES` means the data set even if a file or folder has that name
    too: write `./digits` for the folder.

    Raises FileNotFoundError where a named data set is neither on disk nor to be downloaded, and
    ValueError for an unknown name and for files that cannot be used.

    >>> load("digits").test.images.shape
    torch.Size([179, 1, 28, 28])
    """
    if name is None:
        return _mnist_or_digits(root, seed, download)
    name = os.fspath(name)
    if name in _PUBLISHED:
        return _read_published(name, _obtain(name, root, download))
    if name == "digits":
        return _digits(seed)
    if name == "patches":
        return _patches()
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if not name or not path.exists():
        raise ValueError(_unknown(name))
    return _read_folder(path, seed) if path.is_dir() else _read_array(path, seed)


def is_found(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load(name, root)` would find a published data set without downloading it.

    >>> is_found("kmnist", root="/nowhere") in (True, False)
    True
    """
    return any(not _missing(name, folder) for folder in _folders(root))


def pixels(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1] by a division by 255; floats pass as they are.

    Raises ValueError for any other dtype.

    >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 or floating point, not {images.dtype}")
    return images.to(torch.float32) / 255


def chunks(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Walk through a split in order, at most `size` images at a time: float32 `(B, C, H, W)`, and
    their part of `split.y`; raises ValueError unless `size` is at least 1.

    >>> [len(x) for x, y in chunks(load("digits").test, 100)]
    [100, 79]
    """
    _check_at_least(1, size=size)
    return ((pixels(part.images), part.y) for part in _cut(split, size))


# ----- what the model sees ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Observed:
    """A data set as the model sees it; `how` is a name of `OBSERVATIONS`.

    The splits stay fixed. `redraw`, if not None, draws the pixels of each uint8 training batch
    anew, from a generator.

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

    @property
    def label(self) -> str:
        """How the data is observed, in words for people.

        >>> observe(load("digits"), "static").label
        'statically binarised'
        """
        return OBSERVATIONS[self.how].label

    def to(self, device: torch.device | str) -> Observed:
        """Move the three splits to a device, where `batches` then works too.

        >>> observe(load("digits"), "grey").to("cpu").train.images.device
        device(type='cpu')
        """
        parts = (self.train, self.validation, self.test)
        train, validation, test = (_each(part, lambda t: t.to(device)) for part in parts)
        return replace(self, train=train, validation=validation, test=test)

    def batches(
        self, batch_size: int, *, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One epoch: every training image once, in random order, as float32 `(B, C, H, W)`, with
        its part of `train.y`; the last batch may be smaller.

        Each of several processes gets its part of each batch, with the pixels that a single one
        would get; of a last batch of fewer images than processes, some get none.

        Order and redrawn pixels depend only on `seed`, `epoch`, the batch size and the device, so
        a resumed run sees the batches of an uninterrupted one. The global random state stays as
        it is. Raises ValueError unless `batch_size` is at least 1 and `seed` and
        `epoch` at least 0.

        >>> grey = observe(load("digits"), "grey")
        >>> sum(len(x) for x, y in grey.batches(100, seed=0, epoch=7))
        1439
        """
        _check_at_least(1, batch_size=batch_size)
        images, y = self.train.images, self.train.y
        generator = _generator(images.device, seed=seed, stream=_EPOCHS, epoch=epoch)
        order = torch.randperm(len(images), generator=generator, device=images.device)

        def batch(index: Tensor) -> tuple[Tensor, Tensor | None]:
            mine = index[processes.part(len(index))]
            if self.redraw is None:
                x = images.index_select(0, mine)
            else:  # all of the batch, so that any number of processes draws the same pixels
                x = self.redraw(images.index_select(0, index), generator)
                x = x[processes.part(len(index))]
            return pixels(x), None if y is None else y.index_select(0, mine)

        return map(batch, order.split(batch_size))


def observe(dataset: Dataset, how: str, seed: int = 0) -> Observed:
    """Choose what the model sees of a uint8 image with value k in 0..255.

    - "grey": k / 255.
    - "threshold": 1 where k >= 128, else 0.
    - "static": 1 with probability k / 255, drawn once.
    - "dynamic": the same, but training images are drawn anew for every batch.
    - "dequantized": (k + u) / 256 with u uniform in (0, 1), anew for every training batch.

    What is drawn once is drawn by `seed`, each split from its own random stream. Masks and labels
    stay. Raises ValueError where `how` is none of `OBSERVATIONS`.

    >>> observe(load("digits"), "threshold").test.images.unique()
    tensor([  0, 255], dtype=torch.uint8)
    """
    if how not in OBSERVATIONS:
        raise ValueError(f"how must be one of {', '.join(OBSERVATIONS)}, not {how!r}")
    _, fix, redraw, _ = OBSERVATIONS[how]

    def fixed(stream: int, split: Split) -> Split:
        generator = _generator(split.images.device, seed=seed, stream=stream)
        return split._replace(images=fix(split.images, generator))

    return Observed(
        how,
        train=fixed(0, dataset.train) if redraw is None else dataset.train,
        validation=fixed(1, dataset.validation),
        test=fixed(2, dataset.test),
        redraw=redraw,
    )


def _as_they_are(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _threshold(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images >= 128).to(torch.uint8) * 255


def _binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    # P(U < k) = k / 255 exactly for U uniform on 0..254, without a float copy of the data set.
    uniform = torch.randint(
        255, images.shape, dtype=torch.uint8, generator=generator, device=images.device
    )
    return (uniform < images).to(torch.uint8) * 255


def _dequantize(images: Tensor, generator: torch.Generator) -> Tensor:
    # A float32 sum 255 + u rounds up to 256, out of its bin, for u near 1. The odd 2**-16ths have
    # mean 1/2, lie strictly between 0 and 1, and their sum with a byte is exact in 24 bits.
    odd = 1 + 2 * torch.randint(
        2**15, images.shape, dtype=torch.int32, generator=generator, device=images.device
    )
    return (images + odd.to(torch.float32) / 2**16) / 256


_Draw = Callable[[Tensor, torch.Generator], Tensor]
_KINDS = ("binary", "levels", "continuous")


class Observation(NamedTuple):
    """One way to observe uint8 images.

    label: its name for people.
    fix: what it makes of a split that stays fixed.
    redraw: how it draws a training batch anew; None where its pixels stay fixed too.
    suits: the kinds of likelihood for which it is right: "binary" (0 and 1), "levels" (256 grey
        levels k / 255), "continuous" (any number in [0, 1]).

    >>> OBSERVATIONS["dequantized"].suits
    ('continuous',)
    """

    label: str
    fix: _Draw
    redraw: _Draw | None
    suits: tuple[str, ...]


# For each kind of likelihood the usual observation is the first that suits it.
OBSERVATIONS: Mapping[str, Observation] = {
    "grey": Observation("grey", _as_they_are, None, ("levels", "continuous")),
    "dynamic": Observation("dynamically binarised (one fixed draw)", _binarize, _binarize, _KINDS),
    "static": Observation("statically binarised", _binarize, None, _KINDS),
    "threshold": Observation("thresholded", _threshold, None, _KINDS),
    "dequantized": Observation("dequantised", _dequantize, _dequantize, ("continuous",)),
}


def usual_observation(kind: str) -> str:
    """The usual observation for a kind of likelihood, "binary", "levels" or "continuous"; raises
    ValueError for any other kind.

    >>> usual_observation("binary"), usual_observation("levels")
    ('dynamic', 'grey')
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
    return next(name for name, found in OBSERVATIONS.items() if kind in found.suits)


def _generator(
    device: torch.device | str, *, seed: int, stream: int, epoch: int = 0
) -> torch.Generator:
    _check_at_least(0, seed=seed, epoch=epoch)
    # SeedSequence mixes its words, where a sum would give (0, 1) and (1, 0) the same stream.
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
            digest.update(tensor.contiguous().numpy().data)
    return Dataset(name, train, validation, test, digest.hexdigest(), note)


def _split_at_random(name: str, split: Split, seed: int, note: str = "") -> Dataset:
    size = len(split.images)
    if size < 10:
        raise ValueError(
            f"{name}: the number of images must be at least 10, for three splits, not {size}"
        )
    held = size // 10
    return _dataset(name, _cut(_shuffled(split, seed), [size - 2 * held, held, held]), note)


def _shuffled(split: Split, seed: int) -> Split:
    generator = _generator("cpu", seed=seed, stream=_SPLITTING)
    order = torch.randperm(len(split.images), generator=generator)
    return _each(split, lambda tensor: tensor[order])


def _hold_out(train: Split, one_in: int, source: Path) -> Iterator[Split]:
    """What is kept for training, and the last images, one in `one_in`, which validate."""
    size = len(train.images)
    if size < one_in:
        raise ValueError(
            f"{source}: the number of training images must be at least {one_in}, so that one can "
            f"be held out for validation, not {size}"
        )
    return _cut(train, [size - size // one_in, size // one_in])


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return (
        f"name must be one of {', '.join(NAMES)}, or the path of an existing .npz or .npy file or "
        f"image folder, not {name!r}" + "".join(f". Did you mean {match!r}?" for match in close)
    )


def _digits(seed: int, note: str = "") -> Dataset:
    from sklearn.datasets import load_digits  # here, as it takes 1.5 s and few runs need it

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # Pillow resizes bytes in integer arithmetic: the same pixels, and hash, on every machine.
    large = [Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC) for x in small]
    images = torch.from_numpy(np.stack([np.asarray(x) for x in large])).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return _split_at_random("digits", Split(images, labels), seed, note)


_PATCH, _STRIDE = 64, 8  # pixels
# Columns of the photographs, not rows: the upper rows are sky.
_STRIPS = (
    ((0, 192), (256, 384), (448, 640)),  # training
    ((192, 256),),  # validation
    ((384, 448),),  # test
)


def _patches() -> Dataset:
    from sklearn.datasets import load_sample_images  # here, as it takes 1.5 s

    # a copy of each: Pillow's arrays cannot be written to, of which torch warns
    photographs = [torch.tensor(x).permute(2, 0, 1) for x in load_sample_images().images]

    def split(strips: Sequence[tuple[int, int]]) -> Split:
        parts, labels = [], []
        for label, photograph in enumerate(photographs):
            for left, right in strips:
                parts.append(_patches_of(photograph[..., left:right]))
                labels.append(torch.full((len(parts[-1]),), label))
        return Split(torch.cat(parts), torch.cat(labels))

    return _dataset("patches", map(split, _STRIPS))


def _patches_of(photograph: Tensor) -> Tensor:
    """`(C, H, W)` cut into `(N, C, 64, 64)`, row by row."""
    rows = photograph.unfold(1, _PATCH, _STRIDE)  # (C, rows, W, 64)
    patches = rows.unfold(2, _PATCH, _STRIDE)  # (C, rows, columns, 64, 64)
    return patches.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


# ----- published data sets, in torchvision's layout -----------------------------------------------


class _Published(NamedTuple):
    reader: str  # the torchvision data set
    files: tuple[str, ...]  # what it needs under its root
    held_out: int  # the last images of the training split, one in so many, are for validation


def _idx(reader: str) -> _Published:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return _Published(reader, tuple(f"{reader}/raw/{part}-ubyte" for part in parts), 6)


_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_PUBLISHED = {
    "mnist": _idx("MNIST"),
    "fashion-mnist": _idx("FashionMNIST"),
    "kmnist": _idx("KMNIST"),
    "cifar10": _Published(
        "CIFAR10", tuple(f"cifar-10-batches-py/{file}" for file in _CIFAR_FILES), 10
    ),
}


def _mnist_or_digits(root: str | os.PathLike[str] | None, seed: int, download: bool) -> Dataset:
    try:
        folder = _obtain("mnist", root, download)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        note = (
            f"{reason}; using scikit-learn's 1,797 digits, scaled to 28x28, instead. For MNIST, "
            "go online once or put its four files into ./data/MNIST/raw"
        )
        return _digits(seed, note)
    return _read_published("mnist", folder)


def _obtain(name: str, root: str | os.PathLike[str] | None, download: bool) -> Path:
    """The first folder that holds all the files of `name`, downloading them if need be."""
    folders = _folders(root)
    for folder in folders:
        if not _missing(name, folder):
            return folder
    if not download:
        raise FileNotFoundError(_not_found(name, folders, "downloading is switched off"))
    try:
        return _download(name)
    except (OSError, RuntimeError, HTTPException) as error:
        # the last line, as torchvision's message lists what went wrong at every mirror
        why = (str(error).strip() or repr(error)).splitlines()[-1]
        reason = f"it cannot be downloaded ({why})"
        raise FileNotFoundError(_not_found(name, folders, reason)) from error


def _missing(name: str, folder: Path) -> list[str]:
    return [file for file in _PUBLISHED[name].files if not _found(folder / file).is_file()]


def _found(path: Path) -> Path:
    """The file, or, where only that is there, the same packed by gzip."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _not_found(name: str, folders: list[Path], reason: str) -> str:
    files = _PUBLISHED[name].files
    missing = [f"{f} ({len(_missing(name, f))} of {len(files)} files missing)" for f in folders]
    return (
        f"{name} is in none of its folders, and {reason}\nFolders looked in:\n  "
        + "\n  ".join(missing)
        + "\nTo put the files there by hand, name them, inside any of these:\n  "
        + "\n  ".join(files)
    )


def _folders(root: str | os.PathLike[str] | None) -> list[Path]:
    given = [root, os.environ.get("PVAE_DATA"), "data", _cache()]
    return list(dict.fromkeys(Path(f).expanduser().absolute() for f in given if f))


def _cache() -> Path:
    homes = {
        "darwin": "~/Library/Caches",
        "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"),
    }
    home = os.environ.get("XDG_CACHE_HOME") or homes.get(sys.platform, "~/.cache")
    return Path(home).expanduser() / "pvae"


_PATIENCE = 3  # seconds


def _await_answer(server: str) -> None:
    """Raises what `urlopen` raises where `server` gives no answer within a few seconds, so that a
    download that cannot be had is given up soon."""
    try:
        urllib.request.urlopen(server, timeout=_PATIENCE).close()  # for each of its addresses
    except urllib.error.HTTPError as answer:  # "forbidden" or "not found" is an answer too
        answer.close()


def _download(name: str) -> Path:
    """Let torchvision fetch and check `name`, then move it into the cache file by file: a download
    that is cut off leaves nothing there."""
    cache = _cache()
    print(f"downloading {name} into {cache}", file=sys.stderr)
    reader = _torchvision(_PUBLISHED[name].reader)
    _await_answer(reader.mirrors[0] if hasattr(reader, "mirrors") else reader.url)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds for each connection: torchvision would wait for ever
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as partial:
            reader(partial, download=True)
            for file in _PUBLISHED[name].files:
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(partial, file), cache / file)
    finally:
        socket.setdefaulttimeout(timeout)
    return cache


def _read_published(name: str, folder: Path) -> Dataset:
    reader, files, held_out = _PUBLISHED[name]
    if name == "cifar10":
        published = _torchvision(reader)
        lists = published.train_list, published.test_list
        train, test = (_read_cifar(folder / published.base_folder, batches) for batches in lists)
    else:
        arrays = [_read_idx(_found(folder / file)) for file in files]
        train, test = (_idx_split(arrays[i], arrays[i + 1], folder) for i in (0, 2))
    shapes = [tuple(split.images.shape[1:]) for split in (train, test)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{folder}: the images of {name} for training and test must have one shape, not "
            f"{shapes[0]} and {shapes[1]}"
        )
    return _dataset(name, (*_hold_out(train, held_out, folder), test))


def _torchvision(reader: str) -> Any:
    from torchvision import datasets  # here, as it takes 4 s, and --help should not

    return getattr(datasets, reader)


def _idx_split(images: np.ndarray, labels: np.ndarray, folder: Path) -> Split:
    return Split(_channels_first(images, folder), _labels(labels, len(images), folder))


def _read_idx(path: Path) -> np.ndarray:
    axes = 3 if "idx3" in path.name else 1
    length, size = 4 + 4 * axes, path.stat().st_size
    magic = bytes([0, 0, 8, axes])
    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else open(path, "rb") as file:
        try:
            header = file.read(length)
            if header[:4] != magic or len(header) < length:
                raise ValueError(
                    f"an IDX file of bytes in {axes} axes must begin with a header of {length} "
                    f"bytes, of which the first are {magic.hex(' ')}, not with {header.hex(' ')!r}"
                )
            sizes = struct.unpack(f">{axes}I", header[4:])
            expected = length + math.prod(sizes)
            if packed:
                check_unpacked(expected, size)
            elif expected != size:
                raise ValueError(_of_length(sizes, expected, size))
            if 0 in sizes:
                raise ValueError(f"its sizes must be at least 1, not {sizes}")
            content = _read_bytes(file, expected - length)
            if (found := length + len(content) + len(file.read(1))) != expected:
                raise ValueError(_of_length(sizes, expected, found))
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return content.reshape(sizes)


def _read_bytes(file: Any, size: int) -> np.ndarray:
    """The next bytes of a file, fewer where it ends, of which at most a MiB is in memory twice;
    plain, gzip and zip files share no type that has `readinto`."""
    content = np.empty(size, np.uint8)
    left = content.data
    while count := file.readinto(left[: 2**20]):
        left = left[count:]
    return content[: size - len(left)]


def _of_length(sizes: Sequence[int], expected: int, found: int) -> str:
    return (
        f"by the sizes in its header, {tuple(sizes)}, its length must be {expected} bytes, not "
        f"{found}"
    )


class _ArraysOnly(pickle.Unpickler):
    """Calls nothing that a pickle names: NumPy's arrays are read as what they are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return Named
        raise ValueError(f"it names {module}.{name}, and only arrays may be in it")


_CIFAR_BYTES = 2**26  # a published batch has 31 million


def _read_cifar(folder: Path, batches: Sequence[Sequence[str]]) -> Split:
    """The published batches, which are pickles, by their names and MD5 sums."""
    images, labels = zip(*(_read_batch(folder / name, md5) for name, md5 in batches), strict=True)
    tensor = torch.from_numpy(np.concatenate(images))
    return Split(tensor, _labels(np.concatenate(labels), len(tensor), folder))


def _read_batch(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    if path.stat().st_size > _CIFAR_BYTES:
        raise ValueError(f"{path} is damaged: it must have at most {_CIFAR_BYTES:,} bytes")
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(
            f"the files of CIFAR10 in {path.parent} are damaged: their checksums are not the "
            f"published ones, as that of {path.name}; delete them to download them again"
        )
    try:
        check_pickle(content)
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        _, shape, dtype, fortran, pixels = batch["data"].state
        if isinstance(pixels, str):  # bytes, to Python 2
            pixels = pixels.encode("latin1")
        if dtype.arguments[0] != "u1" or fortran:
            raise ValueError("its pixels must be bytes, row by row")
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(batch["labels"])
        if shape != (len(images), 3072) or labels.shape != (len(images),):
            raise ValueError(f"it must have 3072 bytes and one label an image, not {shape}")
    except Exception as error:  # whatever the unpickler or NumPy say
        raise ValueError(f"{path} is no batch of CIFAR-10: {error!r}") from error
    return images, labels


# ----- arrays and folders of one's own ------------------------------------------------------------

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_PIXELS = 2**24  # of one image: 4096 x 4096


def _read_array(path: Path, seed: int) -> Dataset:
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"name, where it is a file, must be a .npz or .npy file, not {path}")
    try:
        with warnings.catch_warnings():  # NumPy warns of headers as Python 2 wrote them
            warnings.simplefilter("ignore")
            images, labels = _load_arrays(path)
    except Exception as error:  # whatever NumPy, zipfile or zlib say of a damaged file
        raise ValueError(f"{path} cannot be read as NumPy arrays: {error}") from error
    note = f"{path.name}: float pixels, rounded to 255ths" if images.dtype.kind == "f" else ""
    tensor = _channels_first(_bytes(images, path), path)
    split = Split(tensor, None if labels is None else _labels(labels, len(tensor), path))
    return _split_at_random(path.name, split, seed, note)


def _load_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            return _read_npy(file, size, size), None
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        label_keys = [key for key in ("labels", "y") if key in entries]
        others = [key for key in entries if key not in label_keys]
        image_keys = [key for key in ("images", "x") if key in others]
        if not image_keys and len(others) != 1:
            raise ValueError(
                "the images must be under 'images' or 'x', or be the only array, not "
                f"{', '.join(map(repr, [*entries][:9])) or 'missing'}"
            )

        def read(key: str) -> np.ndarray:
            entry = entries[key]
            check_unpacked(entry.file_size, size)
            with archive.open(entry) as file:
                return _read_npy(file, entry.file_size, size)

        return read((image_keys or others)[0]), read(label_keys[0]) if label_keys else None


def _read_npy(file: Any, length: int, packed: int) -> np.ndarray:
    """An array, after its header is held against the length of what follows."""
    version = np.lib.format.read_magic(file)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in headers:
        raise ValueError(f"its version must be 1.0 or 2.0, not {version}")
    shape, fortran, dtype = headers[version](file)
    if dtype.hasobject:
        raise ValueError(f"its elements must be numbers or bool, not objects ({dtype})")
    if any(size < 0 for size in shape):
        raise ValueError(f"its sizes must be at least 0, not {reprlib.repr(shape)}")
    expected, found = math.prod(shape) * dtype.itemsize, length - file.tell()
    if expected != found:
        raise ValueError(f"its header claims {expected:,} bytes of data, but {found:,} follow")
    content = _read_bytes(file, expected)
    if len(content) != expected:
        raise ValueError(f"{expected:,} bytes of data must follow, not {len(content):,}")
    return content.view(dtype).reshape(shape, order="F" if fortran else "C")


def _bytes(images: np.ndarray, source: Path) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype == np.bool_:
        return (images.view(np.uint8) != 0) * np.uint8(255)  # a damaged file may hold a 2
    if images.dtype.kind != "f":
        raise ValueError(
            f"{source}: images must be uint8, bool or float in [0, 1], not {images.dtype}"
        )
    outside = int((~((images >= 0) & (images <= 1))).sum())  # NaN too
    if outside:
        raise ValueError(
            f"{source}: float pixels must be in [0, 1], not in [{images.min():g}, "
            f"{images.max():g}]: {outside} of {images.size} are outside, NaN or infinite"
        )
    scaled = images.astype(np.float32)
    scaled *= 255
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _channels_first(images: np.ndarray, source: Path) -> Tensor:
    if 0 in images.shape:
        raise ValueError(f"{source}: images must have axes of at least 1, not {images.shape}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = np.moveaxis(images, 3, 1)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{source}: images must be (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3, not "
            f"{images.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(labels: np.ndarray, size: int, source: Path) -> Tensor:
    if labels.shape != (size,):
        raise ValueError(f"{source}: labels must be {(size,)}, one an image, not {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels must be integers, not {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(f"{source}: labels must be at least 0, not {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path, seed: int) -> Dataset:
    found = (f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES)
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(_SUFFIXES)})")
    names = _split_names(path, files)
    if not names:
        split = Split(_read_images(path, files), _folder_labels(path, files))
        return _split_at_random(path.name, split, seed)
    files.sort(key=lambda file: names.index(file.parts[0]))
    together = Split(_read_images(path, files), _folder_labels(path, files, depth=1))
    sizes = [sum(file.parts[0] == name for file in files) for name in names]
    train, *validation, test = _cut(together, sizes)
    if validation:
        return _dataset(path.name, (train, *validation, test))
    note = f"{path.name}: no validation folder, so a tenth of the training images is for validation"
    return _dataset(path.name, (*_hold_out(_shuffled(train, seed), 10, path), test), note)


def _split_names(path: Path, files: Sequence[Path]) -> list[str]:
    """The subfolders of training, validation (if any) and test images; none without such names."""
    order = {"train": 0, "val": 1, "validation": 1, "test": 2}
    top = {file.parts[0] for file in files}  # subfolders, and images beside them
    numbers, names = zip(*sorted((order.get(name.lower(), -1), name) for name in top), strict=True)
    if max(numbers) < 0:
        return []
    if numbers not in ((0, 2), (0, 1, 2)):
        raise ValueError(
            f"{path}: subfolders named train, validation (or val) and test are splits; they must "
            f"be train and test, or all three, and nothing else, not {_listed(names)}"
        )
    labels = {file.parts[1] for file in files if len(file.parts) > 2}
    missing = {(name, label) for name in names for label in labels} - {f.parts[:2] for f in files}
    if missing:
        raise ValueError(
            f"{path}: the splits must all have the same subfolders, which are the labels, not lack "
            f"{_listed(sorted('/'.join(pair) for pair in missing))}"
        )
    return list(names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


def _read_images(path: Path, files: Sequence[Path]) -> Tensor:
    # delay: no bar where it would be gone at once; disable=None: none where nobody watches
    bar = tqdm(files, desc="reading images", unit="image", delay=1, leave=False, disable=None)
    packed = sum((path / file).stat().st_size for file in files)
    images: list[Tensor] = []
    for file in bar:
        image = _read_image(path / file)
        images.append(image)
        if image.shape[1:] != images[0].shape[1:]:
            (h, w), (first_h, first_w) = image.shape[1:], images[0].shape[1:]
            raise ValueError(
                f"{path}: all images must have one size (height x width), not {first_h}x{first_w} "
                f"({files[0]}) and {h}x{w} ({file})"
            )
        if len(images) == 1:
            _check_folder(path, 3 * len(files) * image[0].numel(), packed)
    channels = max(len(image) for image in images)  # grey only where all are grey
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _check_folder(path: Path, unpacked: int, packed: int) -> None:
    try:
        check_unpacked(unpacked, packed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder_labels(path: Path, files: Sequence[Path], depth: int = 0) -> Tensor | None:
    """The number of each file's folder, `depth` folders below `path`."""
    classes = sorted({file.parts[depth] for file in files if len(file.parts) > depth + 1})
    if not classes:
        return None
    beside = [str(file) for file in files if len(file.parts) == depth + 1]
    if beside:
        raise ValueError(
            f"{path}: every image must be in a subfolder, which is its label ({_listed(classes)}), "
            f"not beside them, as {_listed(beside)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[file.parts[depth]] for file in files])


def _read_image(path: Path) -> Tensor:
    """`(1, H, W)` uint8 where the file is grey, else `(3, H, W)`."""
    try:
        # no other formats by these names: of some Pillow starts a program of the machine
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            if image.width * image.height > _PIXELS:
                raise ValueError(
                    f"it must have at most {_PIXELS:,} pixels, not {image.width}x{image.height}"
                )
            # ";16B": colours of 16 bits in a PNG, which Pillow would cut to 8 without a word
            if image.mode.startswith(("I", "F")) or ";16B" in str(image.tile):
                raise ValueError(f"its pixels must have 8 bits, not as in {image.tile}")
            if image.mode == "P":  # straight to RGB, Pillow warns where it has transparency
                image = image.convert("RGBA")
            array = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # whatever Pillow says: of a broken PNG it is a SyntaxError
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
