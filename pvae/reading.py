"""Reads data sets from files: the published ones, and the user's own arrays and folders.

Pictures become bytes, data of any other kind floats. This module neither chooses what a model
observes, nor splits the data: `read` returns the parts that the files have, and `pvae.data.load`
makes a data set from them.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pvae import streaming
from pvae.untrusted import Named, check_pickle, check_unpacked

#: The data sets that have a name.
NAMES = ("mnist", "fashion-mnist", "kmnist", "cifar10", "digits", "patches")

# images `(N, C, H, W)`, uint8, or data `(N, *event)`, float32; and their labels `(N,)` or None
Part = tuple[Tensor, Tensor | None]


class Found(NamedTuple):
    """The data that were read.

    `parts` holds one part (all images), two (training and test) or three (training, validation and
    test). `note` and `class_names` become those of `pvae.data.Dataset`.

    >>> len(read("digits").parts)
    1
    """

    name: str
    parts: tuple[Part, ...]
    note: str = ""
    class_names: tuple[str, ...] | None = None


def read(
    name: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    stream: bool = False,
    workers: int | None = None,
    as_is: bool = False,
) -> Found:
    """Read the data that `pvae.data.load` loads; it shares the arguments and errors of `load`.

    >>> images, labels = read("digits").parts[0]
    >>> images.shape, labels.shape
    (torch.Size([1797, 1, 28, 28]), torch.Size([1797]))
    """
    if name is None:
        if stream:
            raise ValueError("stream must be for a .npy file or an image folder: name one")
        return _mnist_or_digits(root, download)
    name = os.fspath(name)
    if stream and name in NAMES:
        raise ValueError(f"stream must be for a .npy file or an image folder, not for {name}")
    if name in PUBLISHED:
        return _read_published(name, _obtain(name, root, download))
    if name == "digits":
        return _digits()
    if name == "patches":
        return _patches()
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if not name or not path.exists():
        raise ValueError(_unknown(name))
    if path.is_dir():
        return _read_folder(path, stream, workers)
    if stream and (as_is or path.suffix.lower() != ".npy"):
        what = "its numbers as they are" if as_is else f"{path}"
        raise ValueError(f"stream must be for a .npy file or an image folder, not for {what}")
    large = path.suffix.lower() == ".npy" and path.stat().st_size > streaming.bound()
    if stream or (large and not as_is):
        try:
            return _map_array(path, workers or 0)
        except ValueError:
            if stream:  # without it, the array is read into memory
                raise
    return _read_arrays(path, as_is)


def is_found(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load(name, root)` would find a published data set without downloading it.

    >>> is_found("kmnist", root="/nowhere") in (True, False)
    True
    """
    return any(not _missing(name, folder) for folder in _folders(root))


def hold_out(train: Part, one_in: int, source: object) -> tuple[Part, Part]:
    """Splits off the last `1 / one_in` of the training images for validation.

    Returns the part for training and the part for validation.

    Raises:
        ValueError: there are fewer than `one_in` images.

    >>> [len(images) for images, labels in hold_out(read("digits").parts[0], 10, "digits")]
    [1618, 179]
    """
    images, labels = train
    size, held = len(images), len(images) // one_in
    if not held:
        raise ValueError(
            f"{source}: the number of training images must be at least {one_in}, so that one can "
            f"be held out for validation, not {size}"
        )
    kept = slice(size - held), slice(size - held, size)
    first, last = ((images[k], None if labels is None else labels[k]) for k in kept)
    return first, last


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return (
        f"name must be one of {', '.join(NAMES)}, or the path of an existing .npz or .npy file or "
        f"image folder, not {name!r}" + "".join(f". Did you mean {match!r}?" for match in close)
    )


def _digits(note: str = "") -> Found:
    from sklearn.datasets import load_digits  # imported here: it takes 1.5 s, and few runs need it

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # Pillow resizes bytes in integer arithmetic: the same pixels, and hash, on every machine.
    large = [Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC) for x in small]
    images = torch.from_numpy(np.stack([np.asarray(x) for x in large])).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return Found("digits", ((images, labels),), note)


_PATCH, _STRIDE = 64, 8  # pixels
# strips of columns, not of rows, as the upper rows are sky
_STRIPS = (
    ((0, 192), (256, 384), (448, 640)),  # training
    ((192, 256),),  # validation
    ((384, 448),),  # test
)


def _patches() -> Found:
    from sklearn.datasets import load_sample_images  # imported here: it takes 1.5 s

    # copies: torch warns of Pillow's arrays, which are read-only
    photographs = [torch.tensor(x).permute(2, 0, 1) for x in load_sample_images().images]

    def part(strips: Sequence[tuple[int, int]]) -> Part:
        parts, labels = [], []
        for label, photograph in enumerate(photographs):
            for left, right in strips:
                parts.append(_patches_of(photograph[..., left:right]))
                labels.append(torch.full((len(parts[-1]),), label))
        return torch.cat(parts), torch.cat(labels)

    return Found("patches", tuple(map(part, _STRIPS)))


def _patches_of(photograph: Tensor) -> Tensor:
    """`(C, H, W)` cut into `(N, C, 64, 64)`, row by row."""
    rows = photograph.unfold(1, _PATCH, _STRIDE)  # (C, rows, W, 64)
    patches = rows.unfold(2, _PATCH, _STRIDE)  # (C, rows, columns, 64, 64)
    return patches.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


# ----- published data sets, in torchvision's layout -----------------------------------------------


class _Published(NamedTuple):
    reader: str  # the name of torchvision's data set
    files: tuple[str, ...]  # the files that it needs under its root
    held_out: int  # the last 1 / held_out of the training images are for validation
    class_names: tuple[str, ...] | None = None


def _idx(reader: str, class_names: tuple[str, ...] | None = None) -> _Published:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = tuple(f"{reader}/raw/{part}-ubyte" for part in parts)
    return _Published(reader, files, 6, class_names)


_CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
PUBLISHED = {
    "mnist": _idx("MNIST"),
    "fashion-mnist": _idx("FashionMNIST", _CLOTHES),
    "kmnist": _idx("KMNIST", _KANA),
    "cifar10": _Published(
        "CIFAR10", tuple(f"cifar-10-batches-py/{file}" for file in _CIFAR_FILES), 10, _OBJECTS
    ),
}


def _mnist_or_digits(root: str | os.PathLike[str] | None, download: bool) -> Found:
    try:
        folder = _obtain("mnist", root, download)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        note = (
            f"{reason}; using scikit-learn's 1,797 digits, scaled to 28x28, instead. For MNIST, "
            "go online once or put its four files into ./data/MNIST/raw"
        )
        return _digits(note)
    return _read_published("mnist", folder)


def _obtain(name: str, root: str | os.PathLike[str] | None, download: bool) -> Path:
    """The first folder that holds all files of `name`; downloads them if there is none."""
    folders = _folders(root)
    for folder in folders:
        if not _missing(name, folder):
            return folder
    if not download:
        raise FileNotFoundError(_not_found(name, folders, "downloading is switched off"))
    try:
        return _download(name)
    except (OSError, RuntimeError, HTTPException) as error:
        # the last line only: torchvision's message lists the errors of all mirrors
        why = (str(error).strip() or repr(error)).splitlines()[-1]
        reason = f"it cannot be downloaded ({why})"
        raise FileNotFoundError(_not_found(name, folders, reason)) from error


def _missing(name: str, folder: Path) -> list[str]:
    return [file for file in PUBLISHED[name].files if not _found(folder / file).is_file()]


def _found(path: Path) -> Path:
    """The path of the file, or of its gzip version if only that exists."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _not_found(name: str, folders: list[Path], reason: str) -> str:
    files = PUBLISHED[name].files
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
    """Raises the error of `urlopen` if `server` does not answer within a few seconds, so that a run
    without a network does not wait long."""
    try:
        urllib.request.urlopen(server, timeout=_PATIENCE).close()  # the timeout is per address
    except urllib.error.HTTPError as answer:  # "forbidden" and "not found" are answers too
        answer.close()


def _download(name: str) -> Path:
    """Let torchvision download and check `name`, then move its files into the cache.

    An interrupted download leaves no file in the cache.
    """
    cache = _cache()
    print(f"downloading {name} into {cache}", file=sys.stderr)
    reader = _torchvision(PUBLISHED[name].reader)
    _await_answer(reader.mirrors[0] if hasattr(reader, "mirrors") else reader.url)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds per connection; torchvision would wait forever
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as partial:
            reader(partial, download=True)
            for file in PUBLISHED[name].files:
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(partial, file), cache / file)
    finally:
        socket.setdefaulttimeout(timeout)
    return cache


def _read_published(name: str, folder: Path) -> Found:
    reader, files, held_out, class_names = PUBLISHED[name]
    if name == "cifar10":
        published = _torchvision(reader)
        lists = published.train_list, published.test_list
        train, test = (_read_cifar(folder / published.base_folder, batches) for batches in lists)
    else:
        arrays = [_read_idx(_found(folder / file)) for file in files]
        train, test = (_idx_part(arrays[i], arrays[i + 1], folder) for i in (0, 2))
    shapes = [tuple(images.shape[1:]) for images, _ in (train, test)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{folder}: the images of {name} for training and test must have one shape, not "
            f"{shapes[0]} and {shapes[1]}"
        )
    return Found(name, (*hold_out(train, held_out, folder), test), class_names=class_names)


def _torchvision(reader: str) -> Any:
    from torchvision import datasets  # imported here: it takes 4 s, for which --help need not wait

    return getattr(datasets, reader)


def _idx_part(images: np.ndarray, labels: np.ndarray, folder: Path) -> Part:
    return _channels_first(images, folder), _labels(labels, len(images), folder)


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
    """The next `size` bytes of a file, or fewer if it ends; at most 1 MiB is in memory twice.

    `file` is a plain, gzip or zip file, which share no type that has `readinto`.
    """
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
    """Calls nothing that a pickle names; reads NumPy's arrays as the arguments that build them."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return Named
        raise ValueError(f"it names {module}.{name}, and only arrays may be in it")


_CIFAR_BYTES = 2**26  # a published batch has 31 million


def _read_cifar(folder: Path, batches: Sequence[Sequence[str]]) -> Part:
    """Reads the published batches, which are pickles; `batches` are their names and MD5 sums."""
    images, labels = zip(*(_read_batch(folder / name, md5) for name, md5 in batches), strict=True)
    tensor = torch.from_numpy(np.concatenate(images))
    return tensor, _labels(np.concatenate(labels), len(tensor), folder)


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
        if isinstance(pixels, str):  # the bytes that Python 2 wrote
            pixels = pixels.encode("latin1")
        if dtype.arguments[0] != "u1" or fortran:
            raise ValueError("its pixels must be bytes, row by row")
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(batch["labels"])
        if shape != (len(images), 3072) or labels.shape != (len(images),):
            raise ValueError(f"it must have 3072 bytes and one label an image, not {shape}")
    except Exception as error:  # the unpickler and NumPy raise many errors
        raise ValueError(f"{path} is no batch of CIFAR-10: {error!r}") from error
    return images, labels


# ----- the user's own arrays and folders ----------------------------------------------------------

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_GREY = ("1", "L", "LA")  # modes of Pillow
_PIXELS = 2**24  # of one image: 4096 x 4096


def _read_arrays(path: Path, as_is: bool) -> Found:
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"name, where it is a file, must be a .npz or .npy file, not {path}")
    try:
        with warnings.catch_warnings():  # NumPy warns of headers that Python 2 wrote
            warnings.simplefilter("ignore")
            arrays = _load_arrays(path)
    except Exception as error:  # NumPy, zipfile and zlib raise many errors for a damaged file
        raise ValueError(f"{path} cannot be read as NumPy arrays: {error}") from error
    every = [array for array, _ in arrays.values()]
    for what, found in (
        ("events of one shape", [str(array.shape[1:]) for array in every]),
        ("numbers of one kind", [str(array.dtype) for array in every]),
    ):
        if len(set(found)) > 1:
            listed = ", ".join(f"{f} ({key})" for key, f in zip(arrays, found, strict=True))
            raise ValueError(f"{path}: its splits must hold {what}, not {listed}")
    pictures = not as_is and all(map(_is_picture, every))
    parts = []
    for array, labels in arrays.values():
        x = _channels_first(_bytes(array, path), path) if pictures else _numbers(array, path)
        parts.append((x, None if labels is None else _labels(labels, len(x), path)))
    notes = [_overlap(parts, list(arrays), path)]
    if pictures and every[0].dtype.kind == "f":
        notes.append(f"{path.name}: float pixels, rounded to 255ths")
    return Found(path.name, tuple(parts), "; ".join(filter(None, notes)))


def _map_array(path: Path, workers: int) -> Found:
    """The images of a `.npy` file of bytes, which are read when they are needed."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            shape, fortran, dtype = _npy_header(file, size)
            offset = file.tell()
        if dtype != np.uint8 or fortran:
            order = ", column by column" * fortran
            raise ValueError(f"to be streamed it must hold uint8, row by row, not {dtype}{order}")
        if 0 in shape:
            raise ValueError(f"images must have axes of at least 1, not {shape}")
        arrange = partial(_channels_first, source=path)
        images = streaming.stream(streaming.Mapped(path, offset, shape, dtype, arrange), workers)
    except Exception as error:  # NumPy raises many errors for a damaged file
        raise ValueError(f"{path} cannot be read as a NumPy array: {error}") from error
    return Found(path.name, ((images, None),))


def _load_arrays(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Each array and its labels (or None) by the key of the array, in the order of the splits."""
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            return {"": (_read_npy(file, size, size), None)}
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}

        def read(key: str) -> np.ndarray:
            entry = entries[key]
            check_unpacked(entry.file_size, size)
            with archive.open(entry) as file:
                return _read_npy(file, entry.file_size, size)

        found = _split_keys(list(entries)) or [_only_keys(list(entries))]
        return {key: (read(key), read(label) if label else None) for key, label in found}


def _split_keys(keys: Sequence[str]) -> list[tuple[str, str]]:
    """The keys of the data and of the labels (or "") of each split, in the order of the splits.

    The list is empty for a file without splits. The names are pvae's, MedMNIST's or Keras's.

    Raises:
        ValueError: a split is missing, or only some splits have labels, or there are other keys.
    """
    found, others = [], set(keys)
    for names in (("train",), ("validation", "val"), ("test",)):
        values = [k for n in names for k in (n, f"{n}_images", f"x_{n}") if k in others]
        labels = [k for n in names for k in (f"{n}_labels", f"y_{n}") if k in others]
        found.append((values[0] if values else "", labels[0] if labels and values else ""))
        others -= set(found[-1])
    train, _, test = (bool(key) for key, _ in found)
    found = [(key, label) for key, label in found if key]
    if not found:
        return []
    of_all_or_none = len({bool(label) for _, label in found}) == 1
    if others or not (train and test and of_all_or_none):
        raise ValueError(
            "a file of splits must hold train and test, and validation or not, and for all of them "
            f"or none train_labels and so on, and nothing else, not {_listed(list(keys), 9)}"
        )
    return found


def _only_keys(keys: Sequence[str]) -> tuple[str, str]:
    """The keys of the images and of the labels (or "") of a file without splits."""
    labels = [key for key in ("labels", "y") if key in keys]
    others = [key for key in keys if key not in labels]
    images = [key for key in ("images", "x") if key in others]
    if not images and len(others) != 1:
        raise ValueError(
            "the images must be under 'images' or 'x', or be the only array, not "
            f"{', '.join(map(repr, keys[:9])) or 'missing'}"
        )
    return (images or others)[0], labels[0] if labels else ""


def _overlap(parts: Sequence[Part], names: Sequence[str], source: Path) -> str:
    """A note of how many data are, byte for byte, in two of the user's own splits, or "".

    Raises:
        ValueError: two splits hold the same data.
    """
    seen = [
        np.fromiter(
            (
                hashlib.md5(x.numpy().data, usedforsecurity=False).digest()
                for piece in streaming.pieces(images)
                for x in piece
            ),
            "S16",
        )
        for images, _ in parts
    ]
    notes = []
    for (first, a), (second, b) in combinations(zip(names, seen, strict=True), 2):
        if np.array_equal(np.sort(a), np.sort(b)):
            raise ValueError(
                f"{source}: its splits must differ, but {second} holds the very data of {first}"
            )
        if both := np.isin(b, a).sum():
            notes.append(f"{both:,} of the {len(b):,} data of {second} are in {first} too")
    return f"{source.name}: {', '.join(notes)}" if notes else ""


def _npy_header(file: Any, length: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is by columns, and dtype; checked with the bytes that follow."""
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
    return shape, fortran, dtype


def _read_npy(file: Any, length: int, packed: int) -> np.ndarray:
    shape, fortran, dtype = _npy_header(file, length)
    expected = math.prod(shape) * dtype.itemsize
    content = _read_bytes(file, expected)
    if len(content) != expected:
        raise ValueError(f"{expected:,} bytes of data must follow, not {len(content):,}")
    return content.view(dtype).reshape(shape, order="F" if fortran else "C")


def _is_picture(array: np.ndarray) -> bool:
    """Whether an array holds pictures, by shape and type alone.

    Pixels out of range are an error, and do not make the array another kind of data.
    """
    shape, kind = array.shape, array.dtype.kind
    of_pictures = len(shape) == 3 or (
        len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3))
    )
    return of_pictures and (kind in "bf" or array.dtype == np.uint8)


_EXACT = 2**24  # float32 holds every whole number up to this one


def _numbers(array: np.ndarray, source: Path) -> Tensor:
    """Data of any shape `(N, *event)`, float32."""
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(
            f"{source}: data must be (N, D) or (N, *event), with axes of at least 1, not "
            f"{array.shape}"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source}: data must be integers, bool or floats, not {array.dtype}")
    if array.dtype.kind in "iu" and max(-int(array.min()), int(array.max())) > _EXACT:
        raise ValueError(
            f"{source}: integers must be at most {_EXACT:,} in size, which float32 holds exactly, "
            f"not in [{array.min()}, {array.max()}]: save larger numbers as floats"
        )
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, dtype=np.float32)
    if bad := int((~np.isfinite(numbers)).sum()):
        raise ValueError(f"{source}: data must be finite: {bad} of {array.size} numbers are not")
    return torch.from_numpy(numbers)


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
            f"{images.max():g}]: {outside} of {images.size} are outside, NaN or infinite. Numbers "
            "that are no pictures are read by as_is=True (--as-is)"
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
    if labels.shape == (size, 1):  # as MedMNIST has them
        labels = labels[:, 0]
    if labels.shape != (size,):
        raise ValueError(f"{source}: labels must be {(size,)}, one an image, not {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels must be integers, not {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(f"{source}: labels must be at least 0, not {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path, stream: bool, workers: int | None) -> Found:
    found = (f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES)
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(_SUFFIXES)})")
    names = _split_names(path, files)
    read = (
        partial(_stream_images, workers=workers)
        if stream or _is_large(path, files)
        else _read_images
    )
    if not names:
        labels, classes = _folder_labels(path, files)
        return Found(path.name, ((read(path, files), labels),), class_names=classes)
    files.sort(key=lambda file: names.index(file.parts[0]))
    sizes = [sum(file.parts[0] == name for file in files) for name in names]
    images = read(path, files).split(sizes)
    labels, classes = _folder_labels(path, files, depth=1)
    some = [None] * len(sizes) if labels is None else labels.split(sizes)
    parts = tuple(zip(images, some, strict=True))
    return Found(path.name, parts, _overlap(parts, names, path), classes)


def _split_names(path: Path, files: Sequence[Path]) -> list[str]:
    """The names of the subfolders of training, validation (if any) and test images, in this order;
    an empty list if no subfolder has such a name."""
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


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _read_images(path: Path, files: Sequence[Path]) -> Tensor:
    # delay: no bar for short work; disable=None: no bar where the output is not a terminal
    bar = tqdm(files, desc="reading images", unit="image", delay=1, leave=False, disable=None)
    packed = sum((path / file).stat().st_size for file in files)
    images: list[Tensor] = []
    for file in bar:
        image = _read_image(path / file)
        images.append(image)
        _check_size(path, (files[0], images[0].shape), (file, image.shape))
        if len(images) == 1:
            _check_folder(path, 3 * len(files) * image[0].numel(), packed)
    channels = max(len(image) for image in images)  # grey only if all are grey
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _check_size(path: Path, *found: tuple[Path, Sequence[int]]) -> None:
    (first, (_, first_h, first_w)), (file, (_, h, w)) = found
    if (h, w) != (first_h, first_w):
        raise ValueError(
            f"{path}: all images must have one size (height x width), not {first_h}x{first_w} "
            f"({first}) and {h}x{w} ({file})"
        )


def _is_large(path: Path, files: Sequence[Path]) -> bool:
    return len(files) * 3 * math.prod(_shape(path / files[0])[1:]) > streaming.bound()


def _stream_images(path: Path, files: Sequence[Path], workers: int | None) -> Tensor:
    """Reads the headers of all files now, and their pixels when they are needed."""
    bar = tqdm(files, desc="looking at images", unit="image", delay=1, leave=False, disable=None)
    first = _shape(path / files[0])
    channels = first[0]
    for file in bar:
        shape = _shape(path / file)
        _check_size(path, (files[0], first), (file, shape))
        channels = max(channels, shape[0])
    pictures = _Pictures(path, files, (channels, *first[1:]))
    return streaming.stream(pictures, min(2, os.cpu_count() or 1) if workers is None else workers)


class _Pictures:
    """The images in files, as a source of `pvae.streaming`."""

    dtype = torch.uint8

    def __init__(self, path: Path, files: Sequence[Path], shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, (len(files), *shape)
        # one array, which workers share with this process; many objects would be copied
        self.names = np.array([os.fsencode(file) for file in files])

    def read(self, rows: Tensor) -> Tensor:
        return torch.stack([self._image(row) for row in rows.tolist()])

    def _image(self, row: int) -> Tensor:
        path = self.path / os.fsdecode(self.names[row])
        image = _read_image(path)
        if image.shape[1:] != self.shape[2:] or len(image) > self.shape[1]:
            raise ValueError(f"{path} has changed: it must be {self.shape[1:]}, not {image.shape}")
        return image.expand(*self.shape[1:])


def _check_folder(path: Path, unpacked: int, packed: int) -> None:
    try:
        check_unpacked(unpacked, packed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder_labels(
    path: Path, files: Sequence[Path], depth: int = 0
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """The label of each file, `(N,)`, and the names of the labels; None twice without subfolders.

    A label is the number, in sorted order, of the file's folder, `depth` folders below `path`.
    """
    classes = sorted({file.parts[depth] for file in files if len(file.parts) > depth + 1})
    if not classes:
        return None, None
    beside = [str(file) for file in files if len(file.parts) == depth + 1]
    if beside:
        raise ValueError(
            f"{path}: every image must be in a subfolder, which is its label ({_listed(classes)}), "
            f"not beside them, as {_listed(beside)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[file.parts[depth]] for file in files]), tuple(classes)


def _read_image(path: Path) -> Tensor:
    """The image of a file, uint8: `(1, H, W)` if it is grey, else `(3, H, W)`."""
    with _opened(path) as image:
        if image.mode == "P":  # converted to RGB at once, Pillow warns about transparency
            image = image.convert("RGBA")
        array = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _shape(path: Path) -> tuple[int, int, int]:
    """The shape of the image that `_read_image` reads, from the header of the file."""
    with _opened(path) as image:
        return 1 if image.mode in _GREY else 3, image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image and checks its header; an error here or in the context names the file."""
    try:
        # only these formats: for some others, Pillow starts a program of the machine
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            if image.width * image.height > _PIXELS:
                raise ValueError(
                    f"it must have at most {_PIXELS:,} pixels, not {image.width}x{image.height}"
                )
            # ";16B": colours of 16 bits in a PNG, which Pillow would silently cut to 8 bits
            if image.mode.startswith(("I", "F")) or ";16B" in str(image.tile):
                raise ValueError(f"its pixels must have 8 bits, not as in {image.tile}")
            yield image
    except Exception as error:  # Pillow raises many errors, such as SyntaxError for a broken PNG
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
