"""Image data sets held in memory as bytes, and the ways in which a model may observe them.

A split of a data set is one uint8 tensor `(N, C, H, W)`; a batch is an `index_select` and a
division by 255. `load` finds or reads the data, `observe` says what the model is shown of it
(grey values, binary or dequantised pixels), `Observed.batches` walks through an epoch.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import socket
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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

NAMES = ("mnist", "fashion-mnist", "kmnist", "cifar10", "digits", "patches")
OBSERVATIONS = ("grey", "threshold", "static", "dynamic", "dequantized")

# Random streams, so that no two uses of one seed share their numbers; 0, 1 and 2 are the pixels
# of the three splits.
_EPOCHS, _SPLITTING = 3, 4


class Split(NamedTuple):
    """One part of a data set: `images` `(N, C, H, W)`, uint8 (or float32 in [0, 1] where
    dequantised), and `labels` `(N,)` int64 or None; its size is `len(split.images)`.

    >>> Split(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), None).images.shape
    torch.Size([5, 1, 8, 8])
    """

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three splits, with their SHA-256 (over pixels, labels and shapes) and a `note`,
    one plain line for the screen where something noteworthy happened.

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
        labels = [s.labels for s in (self.train, self.validation, self.test)]
        return max((1 + int(y.max()) for y in labels if y is not None), default=None)


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
      `root`, `$PVAE_DATA`, `./data` and the user's cache folder, in this order; else downloaded
      into the cache (never with `download=False`). The last sixth of the training images (of
      CIFAR-10: the last tenth) is for validation.
    - "digits": scikit-learn's 1,797 digits, 8x8, scaled to 28x28; needs no network.
    - "patches": 64x64 RGB patches, one every 8 pixels, of scikit-learn's two photographs (a temple
      and a flower, which are the labels); needs no network. The splits are strips of each
      photograph, so that they share no pixel, though the patches of one split do.
    - a `.npy` or `.npz` file: uint8, bool, or float in [0, 1] (rounded to 255ths); shaped
      `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)` with C 1 or 3, and where both readings of four
      axes are possible, axis 1 is the channels. In a `.npz` the images are "images", "x" or the
      only array; labels, optional, are "labels" or "y".
    - a folder of png, jpg, jpeg, bmp or webp images of one size, at any depth; its subfolders, if
      any, are the labels, in sorted order. Hidden files are passed over.

    Digits, files and folders are split 80/10/10 at random by `seed`; the global random state is
    never touched. A name of `NAMES` goes before a path of that name: write `./digits` for it.

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
    images, labels, note = _read_folder(path) if path.is_dir() else _read_array(path)
    return _split_at_random(path.name, images, labels, seed, note)


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
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    return images.to(torch.float32) / 255


def chunks(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Walk through a split in order: float32 images `(B, C, H, W)` and labels `(B,)` or None, at
    most `size` at a time; raises ValueError unless `size` is at least 1.

    >>> [len(x) for x, y in chunks(load("digits").test, 100)]
    [100, 79]
    """
    _check_size("size", size)
    return ((pixels(x), y) for x, y in _cut(split, size))


# ----- what the model sees ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Observed:
    """A data set as the model sees it: splits that stay fixed, and `redraw`, which makes float32
    pixels of each uint8 training batch from a generator (None: plain `pixels`).

    >>> binary = observe(load("digits"), "dynamic")
    >>> x, y = next(binary.batches(100, seed=0, epoch=0))
    >>> x.shape, x.unique()
    (torch.Size([100, 1, 28, 28]), tensor([0., 1.]))
    """

    how: str
    train: Split
    validation: Split
    test: Split
    redraw: Callable[[Tensor, torch.Generator], Tensor] | None

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
        """Shuffle the training images once through: float32 `(B, C, H, W)` and labels `(B,)` or
        None, where the last batch may be short.

        Order and redrawn pixels depend on `seed` and `epoch` alone (and on the batch size and the
        device), so a resumed run sees the batches of an uninterrupted one. The global random
        state is untouched. Raises ValueError unless `batch_size` is at least 1 and `seed` and
        `epoch` at least 0.

        >>> grey = observe(load("digits"), "grey")
        >>> sum(len(x) for x, y in grey.batches(100, seed=0, epoch=7))
        1439
        """
        _check_size("batch_size", batch_size)
        images, labels = self.train
        generator = _generator(images.device, seed=seed, stream=_EPOCHS, epoch=epoch)
        order = torch.randperm(len(images), generator=generator, device=images.device)

        def batch(index: Tensor) -> tuple[Tensor, Tensor | None]:
            x = images.index_select(0, index)
            x = pixels(x) if self.redraw is None else self.redraw(x, generator)
            return x, None if labels is None else labels.index_select(0, index)

        return map(batch, order.split(batch_size))


def observe(dataset: Dataset, how: str, seed: int = 0) -> Observed:
    """Choose what the model sees of a uint8 image with value k in 0..255.

    - "grey": k / 255.
    - "threshold": 1 where k >= 128, else 0.
    - "static": 1 with probability k / 255, drawn once.
    - "dynamic": the same, but training images are drawn anew for every batch.
    - "dequantized": (k + u) / 256 with u uniform in (0, 1), anew for every training batch.

    What is drawn once is drawn by `seed`, each split from a stream of its own. Raises ValueError
    where `how` is none of `OBSERVATIONS`.

    >>> observe(load("digits"), "threshold").test.images.unique()
    tensor([  0, 255], dtype=torch.uint8)
    """
    if how not in _LAWS:
        raise ValueError(f"how must be one of {', '.join(OBSERVATIONS)}; got {how!r}")
    fix, redraw = _LAWS[how]

    def fixed(stream: int, split: Split) -> Split:
        generator = _generator(split.images.device, seed=seed, stream=stream)
        return Split(fix(split.images, generator), split.labels)

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


def _on(images: Tensor, generator: torch.Generator) -> Tensor:
    # P(U < k) = k / 255 exactly for U uniform on 0..254, without a float copy of the data set.
    uniform = torch.randint(
        255, images.shape, dtype=torch.uint8, generator=generator, device=images.device
    )
    return uniform < images


def _binarize_bytes(images: Tensor, generator: torch.Generator) -> Tensor:
    return _on(images, generator).to(torch.uint8) * 255


def _binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    return _on(images, generator).to(torch.float32)


def _dequantize(images: Tensor, generator: torch.Generator) -> Tensor:
    # A float32 sum 255 + u rounds up to 256, out of its bin, for u near 1. The odd 2**-16ths have
    # mean 1/2, lie strictly between 0 and 1, and their sum with a byte is exact in 24 bits.
    odd = 1 + 2 * torch.randint(
        2**15, images.shape, dtype=torch.int32, generator=generator, device=images.device
    )
    return (images + odd.to(torch.float32) / 2**16) / 256


_Draw = Callable[[Tensor, torch.Generator], Tensor]
# how: (what a fixed split stores, how a training batch is drawn anew or None)
_LAWS: dict[str, tuple[_Draw, _Draw | None]] = {
    "grey": (_as_they_are, None),
    "threshold": (_threshold, None),
    "static": (_binarize_bytes, None),
    "dynamic": (_binarize_bytes, _binarize),
    "dequantized": (_dequantize, _dequantize),
}


def _generator(
    device: torch.device | str, *, seed: int, stream: int, epoch: int = 0
) -> torch.Generator:
    for argument, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{argument} must be at least 0, got {value}")
    # SeedSequence mixes its words, where a sum would give (0, 1) and (1, 0) the same stream.
    mixed = np.random.SeedSequence((seed, stream, epoch)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def _each(split: Split, change: Callable[[Tensor], Tensor]) -> Split:
    return Split(change(split.images), None if split.labels is None else change(split.labels))


def _cut(split: Split, sizes: int | list[int]) -> Iterator[Split]:
    labels = repeat(None) if split.labels is None else split.labels.split(sizes)
    return map(Split, split.images.split(sizes), labels)


def _check_size(argument: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


# ----- putting a data set together ----------------------------------------------------------------


def _dataset(name: str, splits: Iterable[Split], note: str = "") -> Dataset:
    train, validation, test = splits
    digest = hashlib.sha256()
    for tensor in (tensor for split in (train, validation, test) for tensor in split):
        if tensor is None:
            digest.update(b"no labels")
        else:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return Dataset(name, train, validation, test, digest.hexdigest(), note)


def _split_at_random(
    name: str, images: Tensor, labels: Tensor | None, seed: int, note: str = ""
) -> Dataset:
    if len(images) < 10:
        raise ValueError(
            f"{name}: at least 10 images are needed for three splits, {len(images)} found"
        )
    held = len(images) // 10
    order = torch.randperm(len(images), generator=_generator("cpu", seed=seed, stream=_SPLITTING))
    shuffled = _each(Split(images, labels), lambda tensor: tensor[order])
    return _dataset(name, _cut(shuffled, [len(images) - 2 * held, held, held]), note)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return (
        f"name must be one of {', '.join(NAMES)}, or the path of a .npz or .npy file or an image "
        f"folder; {name!r} is none of these and does not exist as a path"
        + "".join(f". Did you mean {match!r}?" for match in close)
    )


def _digits(seed: int, note: str = "") -> Dataset:
    from sklearn.datasets import load_digits  # here, as it takes 1.5 s and few runs need it

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # Pillow resizes bytes in integer arithmetic: the same pixels, and hash, on every machine.
    large = [Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC) for x in small]
    images = torch.from_numpy(np.stack([np.asarray(x) for x in large])).unsqueeze(1)
    return _split_at_random("digits", images, torch.from_numpy(digits.target).long(), seed, note)


_PATCH, _STRIDE = 64, 8  # pixels
# columns of the photographs; not rows, of which the upper ones are sky
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
    held_out: int  # one training image in so many, the last ones, is for validation


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
    return [file for file in _PUBLISHED[name].files if not (folder / file).is_file()]


def _not_found(name: str, folders: list[Path], reason: str) -> str:
    files = _PUBLISHED[name].files
    missing = [f"{f} ({len(_missing(name, f))} of {len(files)} files missing)" for f in folders]
    return (
        f"{name} is in none of its folders, and {reason}\nFolders looked in:\n  "
        + "\n  ".join(missing)
        + "\nTo put the files there by hand, unpacked, name them, inside any of these:\n  "
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


def _download(name: str) -> Path:
    """Have torchvision fetch `name` and check it, then move it into the cache file by file, so
    that a download that is cut off leaves nothing there."""
    cache = _cache()
    print(f"downloading {name} into {cache}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds for each connection: torchvision would wait for ever
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as partial:
            _torchvision(_PUBLISHED[name].reader)(partial, download=True)
            for file in _PUBLISHED[name].files:
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(partial, file), cache / file)
    finally:
        socket.setdefaulttimeout(timeout)
    return cache


def _read_published(name: str, folder: Path) -> Dataset:
    reader, files, held_out = _PUBLISHED[name]
    for file in files:
        if file.endswith("-ubyte"):
            _check_idx(folder / file)
    train = _read_part(reader, folder, train=True)
    test = _read_part(reader, folder, train=False)
    held = len(train.images) // held_out
    if not held:
        raise ValueError(
            f"{folder}: at least {held_out} training images are needed to hold one out for "
            f"validation, {len(train.images)} found"
        )
    kept, validation = _cut(train, [len(train.images) - held, held])
    return _dataset(name, (kept, validation, test))


def _torchvision(reader: str) -> Callable[..., Any]:
    from torchvision import datasets  # here, as it takes 4 s, and --help should not

    return getattr(datasets, reader)


def _read_part(reader: str, folder: Path, train: bool) -> Split:
    with warnings.catch_warnings():
        # NumPy 2.4.0 to 2.4.4 warn of the way in which CIFAR-10's old pickles name a dtype.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align")
        try:
            part = _torchvision(reader)(folder, train=train, download=False)
        except RuntimeError as error:
            raise ValueError(
                f"the files of {reader} in {folder} are damaged: their checksums are not "
                "the published ones; delete them to download them again"
            ) from error
    images = _channels_first(np.asarray(part.data), folder)
    return Split(images, _labels(np.asarray(part.targets), len(images), folder))


def _check_idx(path: Path) -> None:
    axes = 3 if "idx3" in path.name else 1
    length = 4 + 4 * axes
    with open(path, "rb") as file:
        header = file.read(length)
    magic = bytes([0, 0, 8, axes])
    if header[:4] != magic or len(header) < length:
        raise ValueError(
            f"{path} is no unpacked IDX file of bytes in {axes} axes: it must begin with "
            f"{magic.hex(' ')} and a header of {length} bytes; it begins with {header.hex(' ')}"
        )
    sizes = struct.unpack(f">{axes}I", header[4:])
    expected, found = length + math.prod(sizes), path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} is damaged: its header ({sizes}) promises {expected} bytes, {found} found"
        )
    if 0 in sizes:
        raise ValueError(f"{path} is empty: its sizes are {sizes}")


# ----- arrays and folders of one's own ------------------------------------------------------------

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def _read_array(path: Path) -> tuple[Tensor, Tensor | None, str]:
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"name, where it is a file, must be a .npz or .npy file; got {path}")
    try:
        images, labels = _load_arrays(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as NumPy arrays: {error}") from error
    note = ""
    if images.dtype.kind == "f":
        note = f"{path.name}: float pixels, rounded to 255ths"
    tensor = _channels_first(_bytes(images, path), path)
    return tensor, None if labels is None else _labels(labels, len(tensor), path), note


def _load_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with open(path, "rb") as file:  # given the path, np.load leaves a damaged .npz open
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        label_keys = [key for key in ("labels", "y") if key in loaded.files]
        others = [key for key in loaded.files if key not in label_keys]
        image_keys = [key for key in ("images", "x") if key in others]
        if not image_keys and len(others) != 1:
            raise ValueError(
                "the images must be under 'images' or 'x', or be the only array; there are "
                f"{', '.join(map(repr, loaded.files)) or 'no arrays'}"
            )
        labels = loaded[label_keys[0]] if label_keys else None
        return loaded[(image_keys or others)[0]], labels


def _bytes(images: np.ndarray, source: Path) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype == np.bool_:
        return images * np.uint8(255)
    if images.dtype.kind != "f":
        raise ValueError(
            f"{source}: images must be uint8, bool or float in [0, 1], got {images.dtype}"
        )
    not_finite = int((~np.isfinite(images)).sum())
    if not_finite:
        raise ValueError(f"{source}: {not_finite} of {images.size} pixels are NaN or infinite")
    outside = int(((images < 0) | (images > 1)).sum())
    if outside:
        raise ValueError(
            f"{source}: float pixels must lie in [0, 1], {outside} of {images.size} do not: they "
            f"range over [{images.min():g}, {images.max():g}]"
        )
    return np.rint(images.astype(np.float32) * 255).astype(np.uint8)


def _channels_first(images: np.ndarray, source: Path) -> Tensor:
    if 0 in images.shape:
        raise ValueError(f"{source} holds no images: its shape is {images.shape}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = np.moveaxis(images, 3, 1)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{source}: images must be (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3, got "
            f"{images.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(labels: np.ndarray, size: int, source: Path) -> Tensor:
    if labels.shape != (size,):
        raise ValueError(f"{source}: labels must be {(size,)}, one an image, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels must be integers, got {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(f"{source}: labels must be 0 or more, got {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path) -> tuple[Tensor, Tensor | None, str]:
    found = (f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES)
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(_SUFFIXES)})")
    labels = _folder_labels(path, files)
    # delay: no bar where it would be gone at once; disable=None: none where nobody watches
    bar = tqdm(files, desc="reading images", unit="image", delay=1, leave=False, disable=None)
    images = [_read_image(path / file) for file in bar]
    for file, image in zip(files, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            (h, w), (first_h, first_w) = image.shape[1:], images[0].shape[1:]
            raise ValueError(
                f"{path}: all images must have one size (height x width); {files[0]} is "
                f"{first_h}x{first_w}, {file} is {h}x{w}"
            )
    channels = max(len(image) for image in images)  # grey only where all are grey
    return torch.stack([image.expand(channels, -1, -1) for image in images]), labels, ""


def _folder_labels(path: Path, files: Sequence[Path]) -> Tensor | None:
    classes = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    if not classes:
        return None
    for file in files:
        if len(file.parts) == 1:
            raise ValueError(
                f"{path}: its subfolders are the labels ({', '.join(classes[:3])}, ...), so "
                f"{file} beside them has none; move it into one"
            )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[file.parts[0]] for file in files])


def _read_image(path: Path) -> Tensor:
    """`(1, H, W)` uint8 where the file is grey, else `(3, H, W)`."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels must have 8 bits, got Pillow's mode {image.mode!r}")
            if image.mode == "P":  # straight to RGB, Pillow warns where it has transparency
                image = image.convert("RGBA")
            array = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow, of a broken PNG
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
