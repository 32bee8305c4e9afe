"""Images that stay where they are until they are needed: data larger than memory.

A `Streamed` tensor has the shape and dtype of all images, but holds none of them. What is asked of
it in the course of training (a batch, a slice, a split, a shuffle) keeps it so; anything else reads
it. Its images come from a source: a mapped file (`Mapped`), the items of a torch `Dataset`
(`Items`), or any object with a `shape`, a `dtype` and a `read`.
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

_MAPPED = 128  # rows that are read before their pages are dropped: the system maps 64 KiB for each
_AT_ONCE = 256  # items that are read for their labels
_PIECE = 2**18  # bytes that a walk through all images has in memory at once

Draw = Callable[[Tensor, torch.Generator], Tensor]


class Source(Protocol):
    """Where images are: `shape` is `(N, *event)`, and `read` gives the rows of these numbers, in
    this order, `(B, *event)`. With workers it is pickled, or forked with the process."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, rows: Tensor) -> Tensor: ...


class Streamed(Tensor):
    """A tensor of images that are read from a `source` when they are needed.

    Indices, slices, `split` and `to(device)` give another one. `index_select` and `batches` give
    the images themselves; any other operation of torch reads all of them first, and is refused
    where that would take more than a quarter of the machine's memory.

    Raises:
        ValueError: the images are more than can be read at once.
        OSError: they cannot be read, or a worker has ended.

    >>> stream(Items([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))[1:].mean()
    tensor(1.)
    """

    source: Source
    rows: Tensor  # (N,): those of the source; int32 where that is enough
    workers: int  # processes that read ahead
    change: Callable[[Tensor], Tensor]  # of the images, one by one, after they are read
    total: Tensor | None  # the sum over all images, once they have been walked through

    def read(self) -> Tensor:
        """All images."""
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
        """All images, a few at a time."""
        count = max(1, _PIECE // (self[:1].numel() * self.element_size()))
        total = torch.zeros((), dtype=torch.float64 if self.is_floating_point() else torch.int64)
        indices = consecutive(len(self), count)
        # workers are not started for a few images
        found = map(self.batch, indices) if len(self) <= count else self.batches(indices)
        for piece in found:
            total = total + piece.sum(0, dtype=total.dtype).cpu()
            yield piece
        self.total = total

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each index; workers read the next ones ahead."""
        rows = (self.rows[index.cpu()] for index in indices)
        found = _loaded(partial(_read, self.source), rows, self.workers)
        return (self.change(images).to(self.device) for images in found)

    def batch(self, index: Tensor) -> Tensor:
        """The images of one index `(B,)`."""
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
    """The images of a data set or loader of torch, streamed, and its labels, which are read at
    once; `workers` None means those of the loader."""
    if isinstance(given, DataLoader):
        workers, given = given.num_workers if workers is None else workers, _items_of(given, name)
    source, workers = Items(given, name), workers or 0
    if not source.labelled:
        return stream(source, workers), None
    labels = _loaded(source.read_labels, consecutive(len(given), _AT_ONCE), workers)
    return stream(source, workers), torch.cat(list(labels))


def consecutive(count: int, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """The indices `0, ..., count - 1`, at most `size` at a time; never all of them at once.

    >>> [index.tolist() for index in consecutive(5, 3)]
    [[0, 1, 2], [3, 4]]
    """
    for first in range(0, count, size):
        yield torch.arange(first, min(first + size, count), device=device)


def gathered(images: Tensor, indices: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images of each index `(B,)`, one after another, streamed or not.

    >>> [len(x) for x in gathered(torch.zeros(5, 1), torch.arange(5).split(3))]
    [3, 2]
    """
    if isinstance(images, Streamed):
        return images.batches(indices)
    return (images.index_select(0, index) for index in indices)


def pieces(images: Tensor) -> Iterator[Tensor]:
    """All images at once where they are in memory, else a few at a time, in order."""
    return images.pieces() if isinstance(images, Streamed) else iter([images])


def in_memory(value: Any) -> Any:
    """A tensor as it is, or what is streamed read; so too in a list or tuple.

    >>> in_memory(stream(Items([torch.ones(1, 1, 2)])))
    tensor([[[[1., 1.]]]])
    """
    if isinstance(value, Streamed):
        return value.read()
    return type(value)(map(in_memory, value)) if type(value) in (list, tuple) else value


def changed(images: Tensor, change: Draw, generator: torch.Generator) -> Tensor:
    """`change(images, generator)`, where `change` treats each pixel by itself.

    Of streamed images, what draws nothing is done whenever they are read. What draws is done once,
    in order, into a file in the folder for temporary files (`$TMPDIR`), which is gone when the
    program ends: the draws are those of the images in memory.

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
    """Bytes of images that are held in memory at most: a quarter of the machine's.

    >>> bound() > 2**20
    True
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**31


def note(name: str, images: Tensor) -> str:
    """What a person should know of how images are read, or ""."""
    if not isinstance(images, Streamed):
        return ""
    by = f", by {images.workers} workers" if images.workers else ""
    return f"{name}: its images are not kept in memory, but read when they are needed{by}"


# ----- sources ------------------------------------------------------------------------------------


class Mapped:
    """The rows of a NumPy array in a file, which is mapped into memory, not read.

    Args:
        file: its path, or the open file.
        offset: bytes before the array, whose elements are in C order.
        arrange: what it makes of the rows that are asked for.
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
            # the pages stay in the system's cache, but count no longer as this process's memory
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return self._arrange(found)


class Items:
    """The images of a map-style `torch.utils.data.Dataset`, whose items are an image `(*event)`,
    uint8 or float, or a pair of one and a label; the same at each reading.

    Raises:
        ValueError: an item of another kind, or of another shape than the first; a label that is no
            whole number of at least 0.

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
    """The data set of a loader that has nothing of its own which would be lost."""
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
    if not len(rows):  # of a last batch, a process may have none
        return torch.empty((0, *source.shape[1:]), dtype=source.dtype)
    return source.read(rows)


class _Reader(TorchDataset):
    """What a worker does: it reads a batch; an error of reading is its answer."""

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
    """`read(rows)` of each batch of rows, in order; workers read the next ones ahead."""
    if not workers:
        yield from map(read, batches)
        return
    same: Any = _same
    loader: Any = DataLoader(
        _Reader(read),
        batch_sampler=(rows.tolist() for rows in batches),
        num_workers=workers,
        collate_fn=same,
        generator=torch.Generator(),  # else it draws from the global one
    )
    try:
        for found in loader:
            if isinstance(found, Exception):
                raise found
            yield found
    except RuntimeError as error:
        raise OSError(f"a worker that reads images has ended: {error}") from error


# ----- what stays lazy ----------------------------------------------------------------------------


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
