"""Programs that try to break the package, and count how often they succeed.

    python benchmarks/reliability.py fuzz
    python benchmarks/reliability.py kill
    python benchmarks/reliability.py memory
    python benchmarks/reliability.py processes

`fuzz` gives every reader of files wrong inputs: headers that claim too much, and small real files
with bytes flipped, cut off, inserted or copied. A reader must read the file correctly, or raise a
`ValueError` or an `OSError` that names the file. Anything else is wrong, and so is more than 1 GiB
of memory above that of the imports. A fixed seed draws all inputs. `fuzz` and `memory` need Linux,
which measures the memory. `kill` is in `kill.py`. `memory` trains on streamed files of more and
more images, and prints the peak memory of each training. `processes` compares the time of training
in one process of two threads with that in two processes of one thread, in turn.
"""

import argparse
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kill import kills  # beside this file
from PIL import Image
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import checkpoint, cli, data, processes, reading, results, run, tables
from pvae.memory import keep_freed_memory
from pvae.train import Trainer

# ---- fuzz: wrong files for every reader ----

MEMORY = 2**30  # bytes above the memory of the imports
Draw = np.random.Generator


class Format(NamedTuple):
    """A kind of file.

    Args:
        valid: makes the bytes of a real file.
        made: makes the bytes of a file that may claim wrong things.
        file: the path of the file in its folder.
        read: reads the file; raises if the result is not as it must be.
        header: whether the first bytes of a file are those of the format. The count of such files
            shows that the fuzz reaches the code behind the header.
    """

    valid: Callable[[Draw], bytes]
    made: Callable[[Draw], bytes]
    file: str
    read: Callable[[Path], object]
    header: Callable[[bytes], bool]


class Counts(NamedTuple):
    """For one format, the numbers of clean errors, of files that were read and of files that passed
    the header, and the wrong answers."""

    errors: int = 0
    read: int = 0
    passed: int = 0
    wrong: tuple[str, ...] = ()


def mutated(content: bytes, draw: Draw) -> bytes:
    """The content after one to four random changes: a bit is flipped, a byte or number replaced,
    the end cut off, or a run of bytes inserted, copied or removed."""
    out = bytearray(content)
    for _ in range(draw.integers(1, 5)):
        at, length = int(draw.integers(len(out) + 1)), int(draw.geometric(0.1))
        kind = draw.integers(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(draw.integers(8))
        elif kind == 1 and at < len(out):
            out[at] = int(draw.choice([0, 1, 0x7F, 0x80, 0xFF, *b"()[]{}.,-9"]))
        elif kind == 2:
            size, order = int(draw.choice([2, 4, 8])), str(draw.choice(["<", ">"]))
            form = order + {2: "H", 4: "I", 8: "Q"}[size]
            out[at : at + size] = struct.pack(form, number(draw) % 256**size)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = draw.bytes(length)
        elif kind == 5:
            out[at:at] = out[at : at + length]
        else:
            del out[at : at + length]
    return bytes(out)


def number(draw: Draw) -> int:
    """A size that a header might claim: often small, else near a power of 2, or far too large."""
    edges = [0, 1, 2**7, 2**8, 2**15, 2**16, 2**31, 2**32, 2**48, 2**63, 2**64, 10**30]
    near = int(draw.choice(edges[:-3])) if draw.random() < 0.9 else edges[draw.integers(9, 12)]
    return int(draw.integers(12)) if draw.random() < 0.5 else max(0, near - int(draw.integers(2)))


def pixels(draw: Draw, *shape: int) -> np.ndarray:
    return draw.integers(0, 256, shape, dtype=np.uint8)


# -- IDX, plain and packed

_MNIST = reading.PUBLISHED["mnist"].files[0]


def idx(draw: Draw) -> bytes:
    return struct.pack(">4I", 0x803, 12, 6, 5) + pixels(draw, 12, 6, 5).tobytes()


def idx_claim(draw: Draw) -> bytes:
    sizes = [number(draw) % 2**32 for _ in range(3)]
    if draw.random() < 0.5:
        sizes = [int(n) for n in draw.integers(0, 20, 3)]
    held = math.prod(sizes) if draw.random() < 0.7 else int(draw.integers(5000))
    return struct.pack(">4I", 0x803, *sizes) + bytes(min(held, 8000))


def packed(make: Callable[[Draw], bytes]) -> Callable[[Draw], bytes]:
    return lambda draw: gzip.compress(make(draw), mtime=0)


def gzip_bomb(draw: Draw) -> bytes:
    """A packed header, followed by few zeros or by 32 MiB of zeros, whatever it claims."""
    if draw.random() < 0.7:
        return packed(idx_claim)(draw)
    count = int(draw.choice([1, 2**10, 2**15, 2**31]))
    return gzip.compress(struct.pack(">4I", 0x803, count, 32, 32) + bytes(2**25), 1, mtime=0)


def read_idx(path: Path) -> None:
    dataset = data.load("mnist", path.parents[2], download=False)
    require(dataset.train.images.shape[0] + dataset.validation.images.shape[0] == 12)
    right(dataset)


# -- arrays


def npy(draw: Draw) -> bytes:
    return saved(pixels(draw, 20, 4, 4))


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


_DTYPES = ("|u1", "|b1", "<f4", ">f8", "<i8", "|O", "<U3", "|V8", "<M8[s]", "<c8", "junk", "<f2")


def npy_claim(draw: Draw) -> bytes:
    """A file with any version, number of axes, sizes (also negative) and dtype in its header."""
    if draw.random() < 0.4:
        kind = draw.choice(["u1", "?", "f2", "f4", ">f8"])
        sizes = [int(n) for n in draw.integers(0, 14, draw.integers(2, 6))]
        return saved((pixels(draw, *sizes) / 255).astype(kind))
    sizes = [number(draw) for _ in range(draw.integers(0, 6))]
    if draw.random() < 0.1:
        sizes.append(-number(draw))
    shape = tuple(sizes) if draw.random() < 0.95 else "(" * int(draw.integers(1, 3000))
    dtype, fortran = draw.choice(_DTYPES), bool(draw.random() < 0.3)
    text = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    version = int(draw.choice([1, 2, 3, 9], p=[0.7, 0.1, 0.1, 0.1]))
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + draw.bytes(int(draw.integers(900)))


def npz(draw: Draw) -> bytes:
    labels = draw.integers(0, 10, 20)
    return archive({"images.npy": npy(draw), "labels.npy": saved(labels)}, zipfile.ZIP_DEFLATED)


def archive(entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as made:
        for name, content in entries.items():
            made.writestr(zipfile.ZipInfo(name), content, how)
    return file.getvalue()


def npz_claim(draw: Draw) -> bytes:
    """Arrays under any names, sometimes with an array of objects or of 160 MiB of zeros."""
    names = ["images.npy", "labels.npy", "x.npy", "y", "../../x.npy", "other.npy"]
    chosen = draw.choice(names, draw.integers(0, 4), replace=False)
    entries = {str(name): npy_claim(draw) for name in chosen}
    chance = draw.random()
    if chance < 0.2:
        entries["images.npy"] = saved(np.array([print, None], dtype=object))
    elif chance < 0.5:
        entries["images.npy"] = npy(draw)
    elif chance < 0.52:
        entries["images.npy"] = saved(np.zeros((40, 2048, 2048), np.uint8))
    how = zipfile.ZIP_STORED if draw.random() < 0.3 else zipfile.ZIP_DEFLATED
    return archive(entries, how)


def npz_of_splits(draw: Draw) -> bytes:
    parts = {f"{name}.npy": npy(draw) for name in ("train", "validation", "test")}
    labels = {name.replace(".", "_labels."): saved(draw.integers(0, 10, 20)) for name in parts}
    return archive(parts | labels, zipfile.ZIP_DEFLATED)


def npz_of_splits_claim(draw: Draw) -> bytes:
    """Some splits, with labels or without, some of them of other shapes and kinds."""
    names = ["train", "test", *draw.choice(["validation", "val", "x_train", "other"], 1)]
    names = [name for name in names if draw.random() < 0.9]
    names += [f"{name}_labels" for name in names if draw.random() < 0.3]
    made = (npy, npy_claim, lambda draw: saved(draw.integers(-1, 9, 20)))
    return archive({f"{name}.npy": made[draw.choice(3, p=(0.7, 0.1, 0.2))](draw) for name in names})


def read_array(path: Path) -> None:
    right(data.load(path))


def read_streamed(path: Path) -> None:
    dataset = data.load(path, stream=True)
    right(dataset)
    require(all(bool((split.images[:1] >= 0).all()) for split in dataset.splits))


# -- pictures


def picture(draw: Draw) -> bytes:
    kind = str(draw.choice(["PNG", "JPEG", "BMP", "WEBP"]))
    mode = str(draw.choice(["L", "RGB", "P", "RGBA", "LA", "1"]))
    mode = mode if kind == "PNG" else "RGB"
    file = io.BytesIO()
    Image.fromarray(pixels(draw, 8, 8, 3)).convert(mode).save(file, kind)
    return file.getvalue()


def png_claim(draw: Draw) -> bytes:
    """A PNG of any size and depth, with all its pixels or with too few."""
    small = draw.random() < 0.6
    width, height = (int(draw.integers(1, 12)) if small else number(draw) % 2**31 for _ in range(2))
    depth, kind = int(draw.choice([1, 2, 4, 8, 16])), int(draw.choice([0, 2, 3, 4, 6]))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = 1 + (width * depth * channels + 7) // 8
    rows = bytes(min(row * height, 2**24) if draw.random() < 0.8 else 100)
    palette = [(b"PLTE", bytes(768))] if kind == 3 else []
    header = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *palette, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def read_pictures(path: Path) -> None:
    """Reads ten pictures, the file and copies of it, as a data set needs ten."""
    for i in range(9):
        shutil.copy(path, path.with_name(f"{i}.png"))
    dataset = data.load(path.parent)
    require(sum(len(split.images) for split in dataset.splits) == 10)
    right(dataset)


def read_split_pictures(path: Path) -> None:
    """Reads ten pictures for training, of which one validates, and two for the test."""
    (test := path.parents[1] / "test").mkdir()
    for i in range(11):
        shutil.copy(path, (test if i > 8 else path.parent) / f"{i}.png")
    dataset = data.load(path.parents[1])
    require([len(split.images) for split in dataset.splits] == [9, 1, 2])
    right(dataset)


def is_picture(content: bytes) -> bool:
    return content[:4] in (b"\x89PNG", b"RIFF") or content[:2] in (b"\xff\xd8", b"BM")


# -- CIFAR-10's batches


def batch(draw: Draw) -> bytes:
    return pickled({"data": pixels(draw, 4, 3072), "labels": [0, 1, 2, 3]})


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=4)


def batch_claim(draw: Draw) -> bytes:
    """A pickle with arrays of other shapes and kinds, functions, or memo numbers out of bounds."""
    junk = [None, 3, -(10**40), "x", [], {}, {"a": []}, math.nan, np.float64(3), print, Runs()]
    values = [*junk, pixels(draw, 3, 3072), pixels(draw, 5), np.array([print], dtype=object)]
    pick = lambda: values[draw.integers(len(values))]  # noqa: E731
    if draw.random() < 0.3:
        put = b"r" + struct.pack("<I", number(draw) % 2**32)
        return b"\x80\x02]" + put + pickle.dumps(pick(), 2)[2:]
    shape = tuple(int(n) for n in draw.integers(0, 5, 1)), 3072
    images = pixels(draw, shape[0][0], 3072)
    labels = [int(n) for n in draw.integers(-1, 12, draw.integers(6))]
    content = {"data": images, "labels": labels}
    if draw.random() < 0.5:
        content[str(draw.choice(["data", "labels"]))] = pick()
    return pickled(content)


def read_batch(path: Path) -> None:
    images, labels = reading._read_batch(path, hashlib.md5(path.read_bytes()).hexdigest())
    require(images.dtype == np.uint8 and images.shape == (len(labels), 3, 32, 32))


# -- checkpoints


def pair() -> pvae.VAE:
    return pvae.build((1, 4, 4), 2, "mlp", hidden=3)


def kept(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


_STATE: dict[str, Any] = {"format": checkpoint.FORMAT, **checkpoint.pair_state(pair())}
_STATE["model"] = dict(_STATE["model"])
_KEPT = kept(_STATE)


def junk(draw: Draw, depth: int = 0) -> Any:
    """Any plain value."""
    plain = (None, True, -1, 0, 2.5, math.nan, math.inf, "mlp", "", "x" * 999, (), number(draw))
    chance = draw.random()
    if chance < 0.7 or depth > 3:
        return plain[draw.integers(len(plain))]
    values = [junk(draw, depth + 1) for _ in range(draw.integers(4))]
    if chance < 0.8:
        return values
    return tuple(values) if chance < 0.9 else {str(draw.choice([*"abc"])): v for v in values}


def checkpoint_claim(draw: Draw) -> bytes:
    """The real checkpoint with another recipe or model, or as an archive with wrong claims."""
    state = {**_STATE, "model": dict(_STATE["model"]), "recipe": dict(_STATE["recipe"])}
    chance = draw.random()
    if chance < 0.45:
        for _ in range(draw.integers(1, 3)):
            name = str(draw.choice([*state["recipe"], "depth"]))
            value = junk(draw)
            if name.endswith(("shape", "dims")) and draw.random() < 0.7:
                value = tuple(number(draw) for _ in range(draw.integers(4)))
            state["recipe"][name] = value
    elif chance < 0.65:
        tensors = [torch.zeros(1).expand(10**9), torch.zeros(3), torch.zeros(2, dtype=torch.cfloat)]
        value = [*tensors, Runs(), print, junk(draw)][draw.integers(6)]
        state["model"][str(draw.choice([*state["model"], "other"]))] = value
    elif chance < 0.75:
        state[str(draw.choice(["format", "model", "recipe", "history"]))] = junk(draw)
    elif chance < 0.95:
        return repacked(draw)
    return kept(state)


def repacked(draw: Draw) -> bytes:
    """The real checkpoint with some numbers of its pickle replaced; sometimes also compressed, with
    a large entry."""
    with zipfile.ZipFile(io.BytesIO(_KEPT)) as real:
        entries = {name: real.read(name) for name in real.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    content = bytearray(entries[name])
    places = [at for at, code in enumerate(content) if code == ord("K")]
    for at in draw.choice(places, 3):
        content[at : at + 2] = b"J" + struct.pack("<i", number(draw) % 2**31)
    entries[name] = bytes(content)
    if draw.random() < 0.3:
        entries[name.replace("data.pkl", "data/0")] = bytes(int(draw.choice([10, 2**20, 2**27])))
        return archive(entries, zipfile.ZIP_DEFLATED)
    return archive(entries)


class Runs:
    """An object whose unpickling runs a command that leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch let_in",)


def safetensors_file(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The real pair as a safetensors file, after `change(header, content of its key "pvae")`."""
    with tempfile.TemporaryDirectory() as folder:
        pvae.save(pair(), f"{folder}/v.safetensors", data="digits")
        content = Path(folder, "v.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["pvae"])
    change(header, ours)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = {**header["__metadata__"], "pvae": json.dumps(ours)}
    claimed = json.dumps(header).encode()
    return struct.pack("<Q", len(claimed)) + claimed + content[8 + length :]


def safetensors_claim(draw: Draw) -> bytes:
    """The real file with another recipe, other claims of a tensor, or another header length."""

    def change(header: dict[str, Any], ours: dict[str, Any]) -> None:
        chance = draw.random()
        tensor = header[str(draw.choice([name for name in header if name != "__metadata__"]))]
        if chance < 0.4:
            sizes = [number(draw) for _ in range(draw.integers(4))]
            value = [sizes, junk(draw)][draw.integers(2)]
            ours["recipe"][str(draw.choice([*ours["recipe"], "depth"]))] = value
        elif chance < 0.6:
            tensor["shape"] = [number(draw) for _ in range(draw.integers(4))]
        elif chance < 0.8:
            tensor["data_offsets"] = [number(draw), number(draw)]
        else:
            owner = [header, ours, tensor][draw.integers(3)]
            owner[str(draw.choice([*owner]))] = junk(draw)

    content = safetensors_file(change)
    if draw.random() < 0.2:
        return struct.pack("<Q", number(draw) % 2**64) + content[8:]
    return content


_SAFETENSORS = safetensors_file(lambda header, ours: None)


def read_checkpoint(path: Path) -> None:
    vae = pvae.load(path)
    require(all(torch.is_tensor(t) for t in vae.state_dict().values()))
    require(vae.sample(1).shape[1:] == vae.recipe.event_shape)


# -- JSON

_NUMBERS = {"elbo": {"label": "ELBO", "mean": -94.0, "se": None, "images": 10}}
_CONFIG = {
    "arguments": {"dataset": None, "data_root": None, "num_epochs": 3, "latent_dims": [2]},
    "dataset": {"name": "digits", "sha256": "0" * 64, "observed": "dynamic"},
    "seed": 0,
    "data_seed": 0,
}


def json_claim(real: dict[str, Any]) -> Callable[[Draw], bytes]:
    """A maker of the real object with any value in the place of one of its values, or of JSON that
    is too deep or too long."""

    def claim(draw: Draw) -> bytes:
        chance = draw.random()
        if chance < 0.1:
            return b"[" * int(draw.integers(1, 200_000))
        if chance < 0.2:
            return b'{"seed": ' + b"9" * int(draw.integers(1, 9000)) + b"}"
        if chance < 0.22:
            return b"[" + b"[]," * 2**23
        content = json.loads(json.dumps(real))
        inside = content
        while True:
            key = str(draw.choice([*inside, "other"]))
            if isinstance(inside.get(key), dict) and draw.random() < 0.7:
                inside = inside[key]
                continue
            inside[key] = junk(draw)
            return json.dumps(content, indent=2).encode()

    return claim


def read_config(path: Path) -> None:
    config = run.read_config(path.parent)
    require(isinstance(config["arguments"], dict) and isinstance(config["dataset"]["name"], str))


def read_results(path: Path) -> None:
    for value in results.read(path).values():
        require(isinstance(value.mean, float) and isinstance(value.se, float))


# -- all of them

FORMATS = {
    "IDX": Format(idx, idx_claim, _MNIST, read_idx, lambda b: b[:4] == b"\0\0\x08\x03"),
    "IDX, gzip": Format(
        packed(idx), gzip_bomb, f"{_MNIST}.gz", read_idx, lambda b: b[:3] == b"\x1f\x8b\x08"
    ),
    "npy": Format(npy, npy_claim, "a.npy", read_array, lambda b: b[:6] == b"\x93NUMPY"),
    "npy, streamed": Format(
        npy, npy_claim, "a.npy", read_streamed, lambda b: b[:6] == b"\x93NUMPY"
    ),
    "npz": Format(npz, npz_claim, "a.npz", read_array, lambda b: b[:4] == b"PK\3\4"),
    "npz of splits": Format(
        npz_of_splits, npz_of_splits_claim, "a.npz", read_array, lambda b: b[:4] == b"PK\3\4"
    ),
    "pictures": Format(picture, png_claim, "pictures/a.png", read_pictures, is_picture),
    "pictures in splits": Format(
        picture, png_claim, "pictures/train/a.png", read_split_pictures, is_picture
    ),
    "CIFAR-10": Format(batch, batch_claim, "test_batch", read_batch, lambda b: b[:1] == b"\x80"),
    "checkpoint": Format(
        lambda draw: _KEPT, checkpoint_claim, "best.pt", read_checkpoint, lambda b: b[:2] == b"PK"
    ),
    "safetensors": Format(
        lambda draw: _SAFETENSORS,
        safetensors_claim,
        "v.safetensors",
        read_checkpoint,
        lambda b: b[8:9] == b"{",
    ),
    "config.json": Format(
        lambda draw: json.dumps(_CONFIG).encode(),
        json_claim(_CONFIG),
        "config.json",
        read_config,
        lambda b: b[:1] == b"{",
    ),
    "results.json": Format(
        lambda draw: json.dumps({"numbers": _NUMBERS}).encode(),
        json_claim({"numbers": _NUMBERS}),
        "results.json",
        read_results,
        lambda b: b[:1] == b"{",
    ),
}


def require(holds: bool) -> None:
    if not holds:
        raise AssertionError("what was read is not what it must be")


def right(dataset: data.Dataset) -> None:
    """Requires bytes, or other finite data, in three splits of one shape, with one label each."""
    for split in dataset.splits:
        require(split.images.dtype == (torch.uint8 if dataset.pictures else torch.float32))
        require(split.images.ndim == 4 if dataset.pictures else split.images.ndim > 1)
        require(split.images.shape[1:] == dataset.image_shape)
        require(bool(split.images.isfinite().all()))
        require(split.labels is None or split.labels.shape == split.images.shape[:1])


def inputs(kind: Format, count: int, draw: Draw) -> Iterator[bytes]:
    """Real files, most of them mutated, and made files, half of them mutated."""
    for i in range(count):
        content = kind.valid(draw) if i % 2 else kind.made(draw)
        # a long file is not mutated, as its length is what it tests
        as_it_is = i % 4 == 0 or i % 20 == 1 or len(content) > 2**20
        yield content if as_it_is else mutated(content, draw)


def fuzz_one(kind: Format, count: int, seed: int = 0) -> Counts:
    """Reads `count` wrong files of a format, each in an emptied folder, and counts the answers."""
    errors = read = passed = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(inputs(kind, count, np.random.default_rng(seed))):
            path = laid_out(Path(folder) / "run", kind, content)
            passed += kind.header(content)
            try:
                kind.read(path)
                read += 1
            except (ValueError, OSError) as error:
                errors += 1
                # an error of a whole data set or run names its folder
                if folder not in str(error) and path.name not in str(error):
                    wrong.append(f"input {i}: names no file: {error!r:.200}")
            except Exception as error:
                wrong.append(f"input {i}: {error!r:.200}")
            if Path("let_in").exists():
                raise SystemExit(f"input {i} ran code")
    return Counts(errors, read, passed, tuple(wrong))


def laid_out(folder: Path, kind: Format, content: bytes) -> Path:
    """Writes the file into an emptied folder, with the real files that it needs beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / kind.file
    path.parent.mkdir(parents=True)
    if kind.read is read_idx:
        sizes = {"train-labels-idx1": 12, "t10k-labels-idx1": 4}
        for name, size in sizes.items():
            labels = struct.pack(">2I", 0x801, size) + bytes(size)
            (path.parent / f"{name}-ubyte").write_bytes(labels)
        images = struct.pack(">4I", 0x803, 4, 6, 5) + bytes(120)
        (path.parent / "t10k-images-idx3-ubyte").write_bytes(images)
    path.write_bytes(content)
    return path


class Watch(threading.Thread):
    """Ends the process if it takes more memory than `limit`; `over` is the most that it took."""

    def __init__(self, limit: int) -> None:
        super().__init__(daemon=True)
        self.doing, self.before, self.limit = "", peak(), limit

    def over(self) -> int:
        return peak() - self.before

    def run(self) -> None:
        while True:
            if self.over() > self.limit:
                print(f"{self.doing}: more than {self.limit:,} bytes of memory", file=sys.stderr)
                os._exit(3)
            time.sleep(0.002)


def peak() -> int:
    """The peak memory in bytes of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def fuzz(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pair().sample(1)  # imports what is imported at first use
    forget_peak()
    watch = Watch(MEMORY)
    watch.start()
    rows, wrong = [], []
    share = math.ceil(args.inputs / len(FORMATS))
    for name, kind in FORMATS.items():
        forget_peak()
        watch.doing, began = name, time.perf_counter()
        counts = fuzz_one(kind, share, args.seed)
        wrong += [f"{name}, {text}" for text in counts.wrong]
        seconds = f"{time.perf_counter() - began:.0f}"
        found = (share, counts.errors, counts.read, counts.passed, len(counts.wrong))
        rows.append([name, *(f"{n:,}" for n in found), f"{watch.over() / 2**20:,.0f}", seconds])
        print(*rows[-1], sep="  ", flush=True)
    head = ["", "inputs", "clean errors", "read", "passed the header", "wrong", "MiB", "s"]
    title = f"wrong files from seed {args.seed}; at most {MEMORY / 2**20:,.0f} MiB of memory"
    print(tables.columns(title, head, rows))
    if wrong:
        raise ValueError("\n".join([f"{len(wrong)} answers were wrong:", *wrong[:20]]))


# ---- memory: more and more images in a file that is streamed ----


def blank(folder: Path, count: int, pixels: int = 28) -> Path:
    """A `.npy` file of `count` black images, which takes no room on the disk."""
    path = folder / f"{count}.npy"
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, pixels, pixels)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * pixels**2)
    return path


def memory(args: argparse.Namespace) -> None:
    rows = []
    for count in args.images:
        # each in a new process, whose memory earlier trainings have not changed
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib, seconds = pool.apply(streamed_epoch, (count,))
        rate = f"{count / seconds:,.0f}"
        rows.append([f"{count:,}", f"{count * 784 / 2**20:,.0f}", f"{mib:,.0f}", rate])
    head = ["images", "file, MiB", "memory above the imports, MiB", "images a second"]
    print(tables.columns("one epoch on a mapped file of 28x28 images, mlp net", head, rows))


def streamed_epoch(count: int) -> tuple[float, float]:
    """The peak memory of an epoch in MiB, above that of the imports, and its time in seconds."""
    pair().sample(1)  # imports what is imported at first use
    forget_peak()
    before, began = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.load(blank(Path(folder), count), stream=True)
        trainer_of(dataset, "mlp", 1000, epochs=1, hidden=16).fit()
    return (peak() - before) / 2**20, time.perf_counter() - began


def trainer_of(
    dataset: data.Dataset, net: str, batch: int, *, epochs: int, hidden: int | None = None
) -> Trainer:
    vae = pvae.build(dataset.image_shape, 16, net, hidden=hidden)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), fused=True))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    observed = data.observe(dataset, "dynamic")
    return Trainer(vae, svi, observed, epochs=epochs, batch_size=batch, quiet=True)


# ---- processes: one of two threads compared with two of one ----


def compare_processes(args: argparse.Namespace) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for count, rates in found.items():
            rates.append(rate_of(count, threads=2 // count))
    rows = []
    for count, rates in found.items():
        median = statistics.median(rates)
        ratio = median / statistics.median(found[1])
        rows.append([str(count), str(2 // count), f"{median:,.0f}", f"{ratio:.2f}"])
    head = ["processes", "threads of each", "images a second", "ratio"]
    title = f"conv net, batches of 128; medians of {args.rounds} rounds by turns"
    print(tables.columns(title, head, rows))


def rate_of(count: int, threads: int) -> float:
    """Images per second of `count` processes, started by torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", str(count), __file__, "step-rate"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def step_rate(args: argparse.Namespace) -> None:
    """In one of the processes: trains, and the first process prints images per second.

    The median is over the epochs after the first; few images validate, so validation costs little.
    """
    processes.start(torch.device("cpu"))
    keep_freed_memory()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12_900, 1, 28, 28), dtype=torch.uint8)
    train, validation, test = (data.Split(part, None) for part in images.split([12_800, 50, 50]))
    trainer = trainer_of(data.Dataset("noise", train, validation, test, ""), "conv", 128, epochs=4)
    trainer.fit()
    if processes.is_first():
        print(12_800 / statistics.median(row["seconds"] for row in trainer.history[1:]))


# ---- the command line ----


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Programs that try to break the package.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fuzz", help="wrong files for every reader")
    cli.option(p, "--inputs", "how many, over all formats (default: 10000)", cli.NATURAL, 10_000)
    cli.option(p, "--seed", "of what is wrong with them (default: 0)", cli.COUNT, 0)
    p.set_defaults(call=fuzz)
    p = commands.add_parser("kill", help="runs that are killed and resumed")
    cli.option(p, "--runs", "how many (default: 30)", cli.NATURAL, 30)
    cli.option(p, "--seed", "of the moments (default: 0)", cli.COUNT, 0)
    cli.choice(p, "--engine", ["eager", "captured"], "eager", "how a step runs")
    p.set_defaults(call=kills)
    p = commands.add_parser("memory", help="what training on streamed files takes")
    numbers = "numbers of images (default: 20000 200000 1000000)"
    sizes = [20_000, 200_000, 1_000_000]
    p.add_argument(
        "--images", type=cli.NATURAL, nargs="+", default=sizes, metavar="N", help=numbers
    )
    p.set_defaults(call=memory)
    p = commands.add_parser("processes", help="one process of two threads against two of one")
    cli.option(p, "--rounds", "of both, by turns (default: 4)", cli.NATURAL, 4)
    p.set_defaults(call=compare_processes)
    p = commands.add_parser("step-rate", help="what each process of `processes` does")
    p.set_defaults(call=step_rate)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    cli.run_main(main)
