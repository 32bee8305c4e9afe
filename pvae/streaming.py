"""Images that are read only when they are needed: data larger than memory.

A `Streamed` tensor has the shape and dtype of all images, but holds none of them. The operations of
training (to take a batch, a slice, a split or a shuffle) do not read all images; any other
operation of torch does. The images come from a source: a mapped file (`Mapped`), the items of a
torch `Dataset` (`Items`), or any object with a `shape`, a `dtype` and a `read`.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset as TorchDataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

_MAPPED = 128  # rows read before their pages are dropped: the system maps 64 KiB for each row
_AT_ONCE = 256  # items read at once for their labels
_PIECE = 2**18  # bytes of images in memory at once while all of them are read

Draw = Callable[[Tensor, torch.Generator], Tensor]


class Source(Protocol):
    """A place that images are read from.

    `shape` is `(N, *event)`. `read(rows)` returns the images of the row numbers `(B,)`, in their
    order, as `(B, *event)`. For workers the source is pickled, or forked with the process.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, rows: Tensor) -> Tensor: ...


class Streamed(Tensor):
    """A tensor of images that are read from a `source` when they are needed.

    An index tensor, a slice, `split` and `to(device)` give another `Streamed` tensor.
    `index_select` and `batches` give the images themselves. Any other operation of torch reads all
    images first, and is refused if they would take more than a quarter of the machine's memory.

    Raises:
        ValueError: there are too many images to read them all into memory.
        OSError: the images cannot be read, or a worker has ended.

    >>> stream(Items([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))[1:].mean()
    tensor(1.)
    """

    source: Source
    rows: Tensor  # (N,): row numbers of the source; int32 if it is large enough
    workers: int  # processes that read ahead
    change: Callable[[Tensor], Tensor]  # applied to images after they are read
    total: Tensor | None  # the sum over all images, once all of them have been read

    def read(self) -> Tensor:
        """Reads all images into memory.

        Raises:
            ValueError: the images take more than a quarter of the machine's memory.
        """
        if not self.fits():
            size = self.numel() * self.element_size() / 1e9
            raise ValueError(
                f"this needs {len(self):,} images in memory ({size:.1f} GB), more than a "
                "quarter of the machine's, and they are streamed: take fewer of them"
            )
        return torch.cat(list(self.pieces()))

    def fits(self) -> bool:
        """Whether all images take at most a quarter of the machine's memory."""
        return self.numel() * self.element_size() <= bound()

    def pieces(self) -> Iterator[Tensor]:
        """Reads all images in order, a few at a time; then keeps their sum in `total`."""
        count = max(1, _PIECE // (self[:1].numel() * self.element_size()))
        total = torch.zeros((), dtype=torch.float64 if self.is_floating_point() else torch.int64)
        indices = consecutive(len(self), count)
        # for a few images no workers are started
        found = map(self.batch, indices) if len(self) <= count else self.batches(indices)
        for piece in found:
            total = total + piece.sum(0, dtype=total.dtype).cpu()
            yield piece
        self.total = total

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Reads the images of each index `(B,)`; workers read those of the next ones ahead."""
        rows = (self.rows[index.cpu()] for index in indices)
        found = _loaded(partial(_read, self.source), rows, self.workers)
        return (self.change(images).to(self.device) for images in found)

    def batch(self, index: Tensor) -> Tensor:
        """Reads the images of one index `(B,)`."""
        return self.change(_read(self.source, self.rows[index.cpu()])).to(self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Streamed({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _LAZY and type(args[0]) is cls:
            found = _LAZY[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*in_memory(args), **{name: in_memory(value) for name, value in kwargs.items()})


def stream(source: Source, workers: int = 0) -> Streamed:
    """All images of a source, in its order.

    >>> stream(Items([torch.zeros(1, 2, 2)]))
    Streamed((1, 1, 2, 2), torch.float32)
    """
    count = source.shape[0]
    rows = torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64)
    return _streamed(source, rows, workers, source.dtype, torch.device("cpu"), _same)


def of_items(given: Any, name: str, workers: int | None) -> tuple[Streamed, Tensor | None]:
    """The images of a data set or loader of torch, streamed, and its labels `(N,)` or None.

    The labels are read here. `workers=None` takes the loader's workers, and none for a data set.
    """
    if isinstance(given, DataLoader):
        workers, given = given.num_workers if workers is None else workers, _items_of(given, name)
    source, workers = Items(given, name), workers or 0
    if not source.labelled:
        return stream(source, workers), None
    labels = _loaded(source.read_labels, consecutive(len(given), _AT_ONCE), workers)
    return stream(source, workers), torch.cat(list(labels))


def consecutive(count: int, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """The indices `0, ..., count - 1`, at most `size` at a time.

    >>> [index.tolist() for index in consecutive(5, 3)]
    [[0, 1, 2], [3, 4]]
    """
    for first in range(0, count, size):
        yield torch.arange(first, min(first + size, count), device=device)


def gathered(images: Tensor, indices: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images of each index `(B,)`, one batch after another; `images` may be streamed or not.

    >>> [len(x) for x in gathered(torch.zeros(5, 1), torch.arange(5).split(3))]
    [3, 2]
    """
    if isinstance(images, Streamed):
        return images.batches(indices)
    return (images.index_select(0, index) for index in indices)


def pieces(images: Tensor) -> Iterator[Tensor]:
    """All images in order: at once if they are in memory, a few at a time if they are streamed."""
    return images.pieces() if isinstance(images, Streamed) else iter([images])


def in_memory(value: Any) -> Any:
    """Reads streamed tensors into memory, also in lists and tuples; returns all else unchanged.

    >>> in_memory(stream(Items([torch.ones(1, 1, 2)])))
    tensor([[[[1., 1.]]]])
    """
    if isinstance(value, Streamed):
        return value.read()
    return type(value)(map(in_memory, value)) if type(value) in (list, tuple) else value


def changed(images: Tensor, change: Draw, generator: torch.Generator) -> Tensor:
    """`change(images, generator)`, for a `change` that treats each pixel by itself.

    If the images are streamed and `change` draws no random numbers, it is applied whenever images
    are read. If it draws, it is applied once to all images, in order, and the result is kept in a
    file in the folder for temporary files (`$TMPDIR`), which is deleted when the program ends. The
    draws are the same as for images in memory.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(images, Streamed):
        return change(images, generator)
    before = generator.get_state()
    dtype = change(in_memory(images[:1]), generator).dtype
    if torch.equal(before, generator.get_state()):
        earlier = images.change
        return _streamed(
            images.source,
            images.rows,
            images.workers,
            dtype,
            images.device,
            lambda x: change(earlier(x), generator),
        )
    generator.set_state(before)
    with tempfile.TemporaryFile(prefix="pvae-") as file:
        for piece in images.pieces():
            file.write(change(piece, generator).numpy().data)
        file.flush()
        kept = Mapped(file, 0, tuple(images.shape), torch.zeros((), dtype=dtype).numpy().dtype)
    return stream(kept).to(images.device)


def bound() -> int:
    """The most bytes of images that are held in memory: a quarter of the machine's memory.

    >>> bound() > 2**20
    True
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**31


def note(name: str, images: Tensor) -> str:
    """One line that tells the user that the images are streamed; "" for images in memory."""
    if not isinstance(images, Streamed):
        return ""
    by = f", by {images.workers} workers" if images.workers else ""
    return f"{name}: its images are not kept in memory, but read when they are needed{by}"


# ----- sources ------------------------------------------------------------------------------------


class Mapped:
    """The rows of a NumPy array in a file that is mapped into memory.

    Args:
        file: the path of the file, or the open file.
        offset: the number of bytes before the array, whose elements are in C order.
        shape: of the array, `(N, ...)`.
        dtype: of the array.
        arrange: turns the rows that are read into images.
    """

    def __init__(
        self,
        file: Any,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        arrange: Callable[[np.ndarray], Tensor] = torch.from_numpy,
    ) -> None:
        self._made_of = file, offset, shape, dtype, arrange
        with open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(shape))
        self._array = np.frombuffer(self._map, dtype, count, offset).reshape(shape)
        self._arrange = arrange
        first = arrange(self._array[:1].copy())
        self.shape, self.dtype = (shape[0], *first.shape[1:]), first.dtype

    def __reduce__(self) -> Any:
        return Mapped, self._made_of

    def read(self, rows: Tensor) -> Tensor:
        found = np.empty((len(rows), *self._array.shape[1:]), self._array.dtype)
        for few in range(0, len(rows), _MAPPED):
            found[few : few + _MAPPED] = self._array[rows[few : few + _MAPPED].numpy()]
            # the pages stay in the system's cache, but no longer count as this process's memory
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return self._arrange(found)


class Items:
    """The images of a map-style `torch.utils.data.Dataset`.

    An item is an image `(*event)`, uint8 or float32, or a pair of an image and a label. It must be
    the same whenever it is read.

    Raises:
        ValueError: an item is of another kind, or of another shape than the first; or a label is
            not a whole number of at least 0.

    >>> Items([(torch.zeros(1, 2, 2), 3)]).read_labels(torch.tensor([0]))
    tensor([3])
    """

    def __init__(self, items: Any, name: str = "the data set") -> None:
        self.items, self.name = items, name
        if not hasattr(items, "__getitem__") or not hasattr(items, "__len__") or not len(items):
            raise ValueError(
                f"{name} must be map-style, with __getitem__ and __len__, and hold an item, not "
                f"{items!r:.99}"
            )
        first = items[0]
        self.labelled = isinstance(first, tuple | list)
        image = self._image(0, first)
        self.shape, self.dtype = (len(items), *image.shape), image.dtype

    def read(self, rows: Tensor) -> Tensor:
        images = [self._image(row, self.items[row]) for row in rows.tolist()]
        for row, image in zip(rows.tolist(), images, strict=True):
            if (image.shape, image.dtype) != (self.shape[1:], self.dtype):
                raise ValueError(
                    f"item {row} of {self.name} must be as the first one, {self.dtype} "
                    f"{self.shape[1:]}, not {image.dtype} {tuple(image.shape)}"
                )
        return torch.stack(images)

    def read_labels(self, rows: Tensor) -> Tensor:
        return torch.tensor([self._label(row) for row in rows.tolist()])

    def _label(self, row: int) -> int:
        label = self.items[row][1]
        with contextlib.suppress(TypeError):
            if (number := operator.index(label)) >= 0:
                return number
        raise ValueError(
            f"item {row} of {self.name} must have a label that is a whole number of at least 0, "
            f"not {label!r:.99}"
        )

    def _image(self, row: int, item: Any) -> Tensor:
        if self.labelled and len(item) != 2:
            raise ValueError(f"item {row} of {self.name} must be a pair, not {len(item)} things")
        image = item[0] if self.labelled else item
        if not isinstance(image, Tensor) or image.dtype not in (torch.uint8, torch.float32):
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"item {row} of {self.name} must be an image (C, H, W), a tensor of uint8 or "
                f"float32, or a pair of one and a label, not {kind}: give the data set a "
                "transform, such as torchvision.transforms.v2.PILToTensor()"
            )
        return image


def _items_of(loader: Any, name: str) -> Any:
    """The data set of a loader; raises ValueError if the loader has a part that would be lost."""
    sampler, every = loader.sampler, isinstance(loader.dataset, IterableDataset)
    in_some_order = type(sampler) in (SequentialSampler, RandomSampler)
    each_once = in_some_order and not getattr(sampler, "replacement", False)
    for what, own in (
        ("sampler", not every and not (each_once and len(sampler) == len(loader.dataset))),
        ("batch_sampler", loader.batch_size is None),
        ("collate_fn", loader.collate_fn is not default_collate),
        ("worker_init_fn", loader.worker_init_fn is not None),
    ):
        if own:
            raise ValueError(
                f"{name} must be a DataLoader without a {what} of its own, which would be lost: "
                "the batches are made anew from its data set. Give loader.dataset, whose items "
                "are as they should be"
            )
    return loader.dataset


def _read(source: Source, rows: Tensor) -> Tensor:
    if not len(rows):  # a process may get no image of a last batch
        return torch.empty((0, *source.shape[1:]), dtype=source.dtype)
    return source.read(rows)


class _Reader(TorchDataset):
    """Reads batches in a worker; returns an error instead of raising it, to pass it on."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self.read = read

    def __getitems__(self, rows: list[int]) -> Tensor | Exception:
        try:
            return self.read(torch.tensor(rows, dtype=torch.int64))
        except (ValueError, OSError) as error:
            return error


def _loaded(
    read: Callable[[Tensor], Tensor], batches: Iterable[Tensor], workers: int
) -> Iterator[Tensor]:
    """`read(rows)` of each batch of rows, in order; workers read the next batches ahead."""
    if not workers:
        yield from map(read, batches)
        return
    same: Any = _same
    loader: Any = DataLoader(
        _Reader(read),
        batch_sampler=(rows.tolist() for rows in batches),
        num_workers=workers,
        collate_fn=same,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    try:
        for found in loader:
            if isinstance(found, Exception):
                raise found
            yield found
    except RuntimeError as error:
        raise OSError(f"a worker that reads images has ended: {error}") from error


# ----- operations that do not read all images -----------------------------------------------------


def _same(images: Tensor) -> Tensor:
    return images


def _streamed(
    source: Source,
    rows: Tensor,
    workers: int,
    dtype: torch.dtype,
    device: torch.device,
    change: Callable[[Tensor], Tensor],
) -> Streamed:
    shape = (len(rows), *source.shape[1:])
    images = torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(Streamed)
    images.source, images.rows, images.workers = source, rows, workers
    images.change, images.total = change, None
    return images


def _at(images: Streamed, rows: Tensor, device: torch.device | None = None) -> Streamed:
    return _streamed(
        images.source, rows, images.workers, images.dtype, device or images.device, images.change
    )


def _getitem(images: Streamed, key: Any) -> Any:
    if isinstance(key, slice):
        return _at(images, images.rows[key])
    if isinstance(key, Tensor) and key.dim() == 1:
        return _at(images, images.rows[key.cpu()])
    if type(key) is int:
        return _select(images, 0, torch.arange(len(images))[key].reshape(1))[0]
    return NotImplemented


def _select(images: Streamed, dim: int, index: Tensor) -> Any:
    return images.batch(index) if dim == 0 else NotImplemented


def _split(images: Streamed, sizes: int | list[int], dim: int = 0) -> Any:
    if dim != 0:
        return NotImplemented
    return tuple(_at(images, rows) for rows in images.rows.split(sizes))


def _to(images: Streamed, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not isinstance(args[0], str | torch.device):
        return NotImplemented
    moved = _at(images, images.rows, torch.device(args[0]))
    moved.total = images.total
    return moved


def _sum(images: Streamed, dim: Any = None, dtype: torch.dtype | None = None) -> Any:
    if dim != 0 or dtype is None:
        return NotImplemented
    if images.total is None:
        for _ in images.pieces():
            pass
    assert images.total is not None
    return images.total.to(images.device, dtype)


def _mean(images: Streamed, dim: Any = None, dtype: torch.dtype | None = None) -> Any:
    if dim != 0 or dtype is None:
        return NotImplemented
    return (_sum(images, 0, torch.float64) / len(images)).to(dtype)


_LAZY: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.index_select: _select,
    Tensor.split: _split,
    Tensor.to: _to,
    Tensor.sum: _sum,
    Tensor.mean: _mean,
}
_OF_THE_SHAPE = {
    *(Tensor.__len__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, torch.numel),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
}
