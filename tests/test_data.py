"""Laws of `pvae.data`; these tests need no network and no published data set."""

import hashlib
import io
import math
import pickle
import re
import socket
import struct
import sys
import urllib.error
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from pvae import reading
from pvae.data import (
    KINDS,
    NAMES,
    OBSERVATIONS,
    Dataset,
    Split,
    chunks,
    load,
    observe,
    pixels,
    usual_observation,
)

IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


# ----- small files in every layout ----------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Hides all data folders except those that a test makes, and the network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PVAE_DATA", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)


@pytest.fixture
def network(monkeypatch):
    """Imitates a server that answers; the test itself decides what a download gives."""
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO())


def images_of(count: int, *shape: int) -> np.ndarray:
    """Returns random images; the first pixel of image i is i."""
    array = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    array.reshape(count, math.prod(shape))[:, 0] = np.arange(count)
    return array


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(root: Path, name: str = "mnist", train: int = 12, test: int = 4, mark: int = 0):
    """Writes MNIST's four files with images of 6x5 pixels; every label is `mark`."""
    raw = root / IDX_FOLDERS[name] / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images_of(count, 6, 5)))
        labels = np.full(count, mark, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return raw


def write_cifar(root: Path, monkeypatch) -> np.ndarray:
    """Writes CIFAR-10's files with 4 images each, and gives torchvision their checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(file: str, content: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(content, protocol=4))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    flat = images_of(24, 3 * 32 * 32)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    sums = [
        [file, write(file, {"data": part, "labels": [i, i, i, i]})]
        for i, (file, part) in enumerate(zip(files, np.split(flat, 6), strict=True))
    ]
    meta = write("batches.meta", {"label_names": list("abcdef")})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": meta})
    return flat.reshape(24, 3, 32, 32)


def in_memory(images: torch.Tensor, labels: torch.Tensor | None = None) -> Dataset:
    return Dataset("made", *(Split(images.clone(), labels) for _ in range(3)), sha256="")


def ramp(copies: int = 1) -> Dataset:
    """Returns copies of a 16x16 image with every byte value once; labels number the copies."""
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    return in_memory(image.repeat(copies, 1, 1, 1), torch.arange(copies))


def everything(dataset: Dataset) -> list[torch.Tensor]:
    splits = (dataset.train, dataset.validation, dataset.test)
    return [torch.cat([split.images for split in splits])] + (
        []
        if dataset.train.labels is None
        else [torch.cat([split.labels for split in splits if split.labels is not None])]
    )


PARTS = ("train", "validation", "test")


def sizes(dataset: Dataset) -> tuple[int, ...]:
    return tuple(len(s.images) for s in (dataset.train, dataset.validation, dataset.test))


def works(dataset: Dataset, how: str) -> None:
    """Asserts that each image of the data set, and nothing else, reaches the model once."""
    observed = observe(dataset, how, seed=1)
    for part, size in zip(PARTS, sizes(dataset), strict=True):
        split = getattr(observed, part)
        batches = observed.batches(3, seed=0, epoch=0) if part == "train" else chunks(split, 3)
        parts = [(len(x), x.shape[1:], None if y is None else len(y)) for x, y in batches]
        assert sum(n for n, *_ in parts) == len(split.first(100).images) == size
        assert all(shape == dataset.image_shape and y in (None, n) for n, shape, y in parts)
    assert dataset.mean_image.shape == dataset.image_shape


def epoch(observed, *, seed: int = 0, epoch: int = 0, batch_size: int = 64) -> torch.Tensor:
    return torch.cat([x for x, _ in observed.batches(batch_size, seed=seed, epoch=epoch)])


# ----- observations -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_every_observation_is_float32_in_the_unit_interval_or_counts(how):
    observed = observe(ramp(70), how)
    for x, y in (
        *observed.batches(32, seed=0, epoch=0),
        *chunks(observed.validation, 32),
        *chunks(observed.test, 32),
    ):
        assert x.dtype == torch.float32
        assert x.shape == (len(y), 1, 16, 16)
        assert x.min() >= 0
        assert x.max() <= (255 if how == "as_is" else 1)
        assert observed.how == how


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_an_observation_suits_the_likelihoods_whose_values_it_makes(how):
    """Binary pixels are also levels, and levels are also numbers."""
    observed = observe(ramp(3), how)
    x = torch.cat([epoch(observed), pixels(observed.test.images)])
    levels = torch.equal((x * 255).round() / 255, x) and x.max() <= 1
    holds = {"binary": ((x == 0) | (x == 1)).all(), "levels": levels, "continuous": True}
    holds["counts"] = torch.equal(x.round(), x) and x.max() > 1
    assert OBSERVATIONS[how].suits == tuple(kind for kind, true in holds.items() if true)
    assert observed.label == OBSERVATIONS[how].label


def test_the_usual_observation_of_each_kind_of_likelihood():
    usual = {kind: usual_observation(kind) for kind in KINDS}
    grey = {"levels": "grey", "continuous": "grey"}
    assert usual == {"binary": "dynamic", "counts": "as_is", **grey}
    with pytest.raises(
        ValueError, match="kind must be one of binary, levels, continuous, counts, not 'grey'"
    ):
        usual_observation("grey")


def test_grey_is_the_byte_over_255_exactly():
    x = epoch(observe(ramp(), "grey"))
    assert torch.equal(x.flatten().double(), (torch.arange(256).float() / 255).double())


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_threshold_cuts_at_one_half_and_is_idempotent(part):
    once = getattr(observe(ramp(), "threshold"), part)
    assert torch.equal(once.images.flatten() == 255, torch.arange(256) >= 128)
    assert torch.equal(once.images.flatten() == 0, torch.arange(256) < 128)
    twice = getattr(observe(in_memory(once.images), "threshold"), part)
    assert torch.equal(twice.images, once.images)


@pytest.mark.parametrize("how", ["static", "dynamic"])
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_binary_pixels_have_the_grey_value_as_mean(how, part):
    copies, epochs = 400, 3
    observed = observe(ramp(copies), how)
    if part == "train":
        draws = torch.cat([epoch(observed, epoch=i) for i in range(epochs)])
    else:
        draws = pixels(getattr(observed, part).images)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # static draws are the same in every epoch, so only `copies` draws are independent
    independent = copies * epochs if (how, part) == ("dynamic", "train") else copies
    grey = pixels(ramp().train.images).double()
    error = (grey * (1 - grey) / independent).sqrt()  # exactly 0 for black and white
    assert ((draws.double().mean(0, keepdim=True) - grey).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_dequantized_pixels_lie_strictly_inside_their_bin_and_fill_it(part):
    copies = 2000  # 0.5 M pixels: a float32 sum 255 + u leaves its bin once in about 100,000
    observed = observe(ramp(copies), "dequantized")
    x = epoch(observed) if part == "train" else getattr(observed, part).images
    u = x.double() * 256 - torch.arange(256).reshape(1, 1, 16, 16)
    assert u.min() > 0
    assert u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_validation_and_test_stay_fixed_and_follow_the_seed(how):
    data = ramp(3)
    first, again, other = observe(data, how), observe(data, how), observe(data, how, seed=1)
    drawn = how not in ("grey", "threshold", "as_is")
    for part in ("validation", "test"):
        fixed = getattr(first, part).images
        assert torch.equal(fixed, getattr(again, part).images)
        assert torch.equal(fixed, getattr(other, part).images) != drawn
    assert torch.equal(first.validation.images, first.test.images) != drawn


def test_the_three_splits_are_drawn_from_different_streams():
    static = observe(ramp(3), "static")
    splits = [static.train.images, static.validation.images, static.test.images]
    assert not any(torch.equal(splits[i], splits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_only_dynamic_and_dequantized_training_pixels_change_between_epochs(how):
    observed = observe(ramp(), how)  # one image: the order cannot differ
    same = torch.equal(epoch(observed, epoch=0), epoch(observed, epoch=1))
    assert same == (how not in ("dynamic", "dequantized"))


def test_fixed_binary_splits_are_bytes():
    for how in ("threshold", "static"):
        assert observe(ramp(), how).train.images.dtype == torch.uint8
    for how in ("threshold", "static", "dynamic"):
        assert observe(ramp(), how).test.images.dtype == torch.uint8


def test_observe_refuses_an_unknown_observation():
    with pytest.raises(ValueError, match=r"how must be one of grey, .*, not 'binary'"):
        observe(ramp(), "binary")
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        observe(ramp(), "static", seed=-1)


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_observe_leaves_its_data_set_as_it_was(how):
    data = ramp(2)
    observed = observe(data, how)
    epoch(observed)
    assert all(torch.equal(x, ramp(2).train.images) for x in (data.train.images, data.test.images))


# ----- batches and chunks -------------------------------------------------------------------------


def numbered(count: int) -> Dataset:
    """Returns up to 65,536 images whose two pixels encode their label."""
    labels = torch.arange(count)
    high_low = torch.stack([labels // 256, labels % 256], dim=1).to(torch.uint8)
    return in_memory(high_low.reshape(count, 1, 1, 2), labels)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 300, 1000])
def test_an_epoch_holds_every_image_once_with_its_own_label(batch_size):
    batches = list(observe(numbered(300), "grey").batches(batch_size, seed=0, epoch=0))
    assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    value = (x * 255).round().long().reshape(300, 2)
    assert torch.equal(value[:, 0] * 256 + value[:, 1], y)
    assert torch.equal(y.sort().values, torch.arange(300))
    assert not torch.equal(y, torch.arange(300))


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_same_seed_and_epoch_give_the_same_batches(how):
    observed = observe(load("digits"), how)
    straight = [epoch(observed, epoch=i) for i in range(3)]
    assert torch.equal(epoch(observe(load("digits"), how), epoch=2), straight[2])  # a resumed run
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(epoch(observed, seed=1), straight[0])
    # (seed, epoch) are two numbers, not their sum
    assert not torch.equal(epoch(observed, seed=1), straight[1])


def test_interleaved_epochs_do_not_disturb_each_other():
    observed = observe(ramp(8), "dynamic")
    pair = zip(
        observed.batches(3, seed=0, epoch=0), observed.batches(3, seed=0, epoch=1), strict=True
    )
    first = torch.cat([a for (a, _), (b, _) in pair])
    assert torch.equal(first, epoch(observed, batch_size=3))


def test_batches_without_labels():
    observed = observe(in_memory(ramp(5).train.images), "dynamic")
    assert all(y is None for _, y in observed.batches(2, seed=0, epoch=0))
    assert [(len(x), y) for x, y in chunks(observed.test, 2)] == [(2, None), (2, None), (1, None)]


def test_chunks_keep_the_order():
    split = numbered(300).train
    parts = list(chunks(split, 128))
    assert [len(x) for x, _ in parts] == [128, 128, 44]
    assert torch.equal(torch.cat([x for x, _ in parts]), pixels(split.images))
    assert torch.equal(torch.cat([y for _, y in parts]), torch.arange(300))


def masked(count: int, channels: int = 1) -> Dataset:
    """Returns `numbered` with masks that encode the label too: only pixel `label` is True."""
    data = numbered(count)
    mask = torch.eye(count, dtype=torch.bool)[:, None, None].expand(-1, channels, -1, -1)
    return replace(data, **{part: getattr(data, part)._replace(mask=mask) for part in PARTS})


@pytest.mark.parametrize("how", OBSERVATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_go_with_their_images_before_the_labels(how, channels):
    observed = observe(masked(20, channels), how).to("cpu")
    for x, y in observed.batches(7, seed=0, epoch=0):
        assert y.shape == (len(x), channels, 1, 20)
    grey = observe(masked(20, channels), "grey")
    for x, y in (*grey.batches(7, seed=0, epoch=0), *chunks(grey.test, 7)):
        assert torch.equal(y[:, 0, 0].int().argmax(1), (x[:, 0, 0, 1] * 255).round().long())
    for part in PARTS:
        split = getattr(observed, part)
        assert split.y is split.mask
        assert torch.equal(split.labels, torch.arange(20))
        assert split._replace(mask=None).y is split.labels
    assert observed.to("meta").test.mask.device.type == "meta"


@pytest.mark.parametrize("n", [1, 13, 20, 21])
def test_the_first_images_keep_labels_and_masks(n):
    split = masked(20).test
    for tensor, whole in zip(split.first(n), split, strict=True):
        assert torch.equal(tensor, whole[:n])
    assert Split(split.images, None).first(n).y is None
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        split.first(0)


def test_sizes_are_refused_at_the_call():
    observed = observe(ramp(), "grey")
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        observed.batches(0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="epoch must be at least 0, not -1"):
        observed.batches(1, seed=0, epoch=-1)
    with pytest.raises(ValueError, match="size must be at least 1, not -3"):
        chunks(observed.test, -3)


def test_pixels_takes_bytes_and_floats_only():
    floats = torch.rand(3, dtype=torch.float64)
    assert pixels(floats) is floats
    assert pixels(torch.tensor([255], dtype=torch.uint8)).item() == 1
    with pytest.raises(ValueError, match=r"uint8 or floating point, not torch\.int64"):
        pixels(torch.tensor([255]))


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_the_global_random_state_is_untouched(how):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - the test reads the global state
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    epoch(observe(load("digits", seed=3), how, seed=4), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_to_moves_every_split_and_keeps_the_rest(how):
    observed = observe(ramp(2), how)
    moved = observed.to("meta")
    for part in ("train", "validation", "test"):
        split = getattr(moved, part)
        assert split.images.device.type == split.labels.device.type == "meta"
    assert (moved.how, moved.redraw) == (observed.how, observed.redraw)
    assert observed.train.images.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", OBSERVATIONS)
def test_batches_on_a_cuda_device(how):
    observed = observe(numbered(300), how).to("cuda")
    before = torch.cuda.get_rng_state()
    batches = list(observed.batches(64, seed=0, epoch=0))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(x.device.type == y.device.type == "cuda" for x, y in batches)
    assert torch.equal(torch.cat([y for _, y in batches]).sort().values.cpu(), torch.arange(300))
    assert torch.equal(epoch(observed), torch.cat([x for x, _ in batches]))


# ----- the embedded digits ------------------------------------------------------------------------


def test_digits_are_split_80_10_10_by_the_seed_and_none_is_lost():
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert sizes(first) == (1439, 179, 179)
    assert first.image_shape == (1, 28, 28)
    assert first.num_classes == 10
    assert first.note == ""
    assert first.sha256 == again.sha256 != other.sha256
    for x, y in zip(everything(first), everything(other), strict=True):
        # the same images and labels, in another order
        flat = [t.reshape(len(t), -1).double() for t in (x, y)]
        assert torch.equal(*(rows.sum(1).sort().values for rows in flat))
        assert not torch.equal(*flat)


def test_digits_use_the_whole_range_of_bytes():
    (x, _) = everything(load("digits"))
    assert x.dtype == torch.uint8
    assert x.min() == 0
    assert x.max() == 255


# ----- patches of photographs ---------------------------------------------------------------------


def test_patches_are_rgb_and_the_same_every_time():
    first, again = load("patches"), load("patches", seed=1)
    assert first.image_shape == (3, 64, 64)
    assert sizes(first) == (2 * 46 * (17 + 9 + 17), 2 * 46, 2 * 46)
    assert first.train.images.dtype == torch.uint8
    assert first.sha256 == again.sha256
    assert first.num_classes == 2
    for split in (first.train, first.validation, first.test):
        assert torch.equal(split.labels.bincount(), torch.full((2,), len(split.images) // 2))
    # the patches are in colour, so channels differ
    assert (first.test.images[:, 0] != first.test.images[:, 2]).float().mean() > 0.5


def test_no_pixel_of_a_photograph_is_in_two_splits(monkeypatch):
    """The photographs here are low, and a pixel encodes its row, its column and its photograph."""
    height, width = 104, 640
    row, column = np.mgrid[:height, :width]
    made = [np.stack([row, column % 256, number * 4 + column // 256], axis=-1) for number in (0, 1)]
    fake = type("Bunch", (), {"images": [x.astype(np.uint8) for x in made]})
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: fake)
    data = load("patches")
    held_by = torch.zeros(2 * height * width, 3, dtype=torch.bool)
    for i, split in enumerate((data.train, data.validation, data.test)):
        rows, low_column, rest = split.images.long().unbind(1)
        columns = low_column + rest % 4 * 256
        # each image is a patch of 64 rows and columns of the photograph that its label names
        assert torch.equal(rows - rows[:, :1, :1], torch.arange(64)[:, None].expand(rows.shape))
        assert torch.equal(columns - columns[:, :1, :1], torch.arange(64).expand(rows.shape))
        assert torch.equal(rest[:, 0, 0] // 4, split.labels)
        held_by[((rest // 4 * height + rows) * width + columns).flatten(), i] = True
    assert held_by.sum(1).max() == 1
    assert held_by.any(1).double().mean() > 0.97  # nearly all pixels are used


# ----- published data sets ------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDX_FOLDERS)
def test_idx_files_are_read_whole_and_the_last_sixth_validates(tmp_path, name):
    write_idx(tmp_path / "here", name, train=26, test=7, mark=3)
    data = load(name, tmp_path / "here", download=False)
    assert (data.name, data.note) == (name, "")
    assert sizes(data) == (22, 4, 7)
    expected = np.concatenate([images_of(26, 6, 5), images_of(7, 6, 5)])
    assert torch.equal(everything(data)[0], torch.from_numpy(expected)[:, None])
    assert everything(data)[1].dtype == torch.int64
    assert everything(data)[1].unique().tolist() == [3]
    assert data.image_shape == (1, 6, 5)


@pytest.mark.parametrize("how", OBSERVATIONS)
def test_a_published_set_may_hold_few_images(tmp_path, how):
    write_idx(tmp_path, train=6, test=1)
    data = load("mnist", tmp_path, download=False)
    assert sizes(data) == (5, 1, 1)
    works(data, how)


def test_cifar_batches_are_read_whole_and_the_last_tenth_validates(tmp_path, monkeypatch):
    images = write_cifar(tmp_path, monkeypatch)
    data = load("cifar10", tmp_path, download=False)
    assert sizes(data) == (18, 2, 4)
    x, y = everything(data)
    assert torch.equal(x, torch.from_numpy(images))
    assert y.tolist() == [i // 4 for i in range(24)]


def as_python_2_wrote_it(images: np.ndarray, labels: list[int]) -> bytes:
    """Returns a batch in the published format, a pickle with the byte strings of Python 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        + b"(K\x01"
        + pickle.dumps(images.shape, protocol=2)[2:-1]
        + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        + b"J\xff\xff\xff\xffK\x00tb"
        + b"\x89T"
        + struct.pack("<I", images.size)
        + images.tobytes()
        + b"tb"
    )
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + pickle.dumps(labels, 2)[2:-1] + b"u."


def test_cifar_as_it_was_published_is_read(tmp_path, monkeypatch):
    """It is read without a warning, although NumPy warns of the dtype in such pickles."""
    images = write_cifar(tmp_path, monkeypatch)
    sums = []
    for i in range(1, 6):
        content = as_python_2_wrote_it(images[4 * i - 4 : 4 * i].reshape(4, 3072), [i, i, i, i])
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{i}").write_bytes(content)
        sums.append([f"data_batch_{i}", hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums)
    data = load("cifar10", tmp_path, download=False)
    assert torch.equal(everything(data)[0], torch.from_numpy(images))


def test_cifar_with_another_checksum_is_damaged(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_2", "ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=r"CIFAR10 in .* are damaged.*checksums"):
        load("cifar10", tmp_path, download=False)


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_classes_have_the_names_that_torchvision_gives_them(tmp_path, name):
    write_idx(tmp_path, name)
    theirs = getattr(datasets, reading.PUBLISHED[name].reader).classes
    names = load(name, tmp_path).class_names
    assert len(names) == len(theirs)
    assert all(ours in other.lower() for ours, other in zip(names, theirs, strict=True))


@pytest.mark.parametrize("name", [None, "mnist"])
def test_folders_are_searched_in_order(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path / "env"))
    order = [tmp_path / "root", tmp_path / "env", Path("data"), tmp_path / "cache" / "pvae"]
    for mark, folder in reversed(list(enumerate(order))):  # each is before those that exist
        write_idx(folder, mark=mark)
        found = load(name, tmp_path / "root", download=False)
        assert found.name == "mnist"
        assert found.test.labels is not None
        assert found.test.labels.unique().tolist() == [mark]


def test_a_folder_that_lacks_a_file_is_passed_over(tmp_path):
    (write_idx(tmp_path / "root", mark=1) / "t10k-labels-idx1-ubyte").unlink()
    write_idx(Path("data"), mark=2)
    assert load("mnist", tmp_path / "root", download=False).num_classes == 3


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", ".cache/pvae"), ("darwin", "Library/Caches/pvae"), ("win32", "local/pvae")],
)
def test_the_cache_is_where_the_platform_has_it(tmp_path, monkeypatch, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    write_idx(tmp_path / expected)
    assert load(download=False).name == "mnist"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10"])
@pytest.mark.parametrize("download", [True, False])
def test_what_is_asked_for_by_name_has_no_fallback(tmp_path, name, download):
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path / "root", download=download)
    message = str(caught.value)
    for folder in (tmp_path / "root", tmp_path / "cwd" / "data", tmp_path / "cache" / "pvae"):
        assert str(folder) in message
    first_file = "cifar-10-batches-py/data_batch_1"
    if name in IDX_FOLDERS:
        first_file = f"{IDX_FOLDERS[name]}/raw/train-images-idx3-ubyte"
    assert first_file in message
    assert ("no network in tests" if download else "downloading is switched off") in message


@pytest.mark.parametrize("download", [True, False])
def test_where_nothing_is_asked_for_the_digits_stand_in_and_say_so(download):
    data = load(download=download)
    assert data.name == "digits"
    assert data.sha256 == load("digits").sha256
    assert "\n" not in data.note
    assert ("no network in tests" if download else "switched off") in data.note
    assert "scikit-learn's 1,797 digits" in data.note
    assert "./data/MNIST/raw" in data.note


def test_download_false_does_not_even_try(monkeypatch):
    def never(*args, **kwargs):
        pytest.fail("download=False went to the network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", never)
    load(download=False)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10"])
def test_a_name_that_is_not_found_ends_the_download_at_once(monkeypatch, name):
    asked = []

    def unknown(url, timeout):
        asked.append((url, timeout))
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    def never(*args, **kwargs):
        pytest.fail("torchvision was asked to download")

    monkeypatch.setattr("urllib.request.urlopen", unknown)
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", never)
    with pytest.raises(FileNotFoundError, match="Name or service not known"):
        load(name)
    ((url, timeout),) = asked
    assert url.startswith("http")
    assert timeout <= 3


def test_a_server_that_refuses_the_question_is_there(tmp_path, monkeypatch):
    """A server that answers 403 for the folder, as Amazon does, may still give the files in it."""

    def forbidden(url, timeout):
        raise urllib.error.HTTPError(url, 403, "Forbidden", {}, io.BytesIO())

    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    with pytest.raises(FileNotFoundError, match="no network in tests"):  # by torchvision
        load("mnist")


@pytest.mark.usefixtures("network")
def test_a_download_arrives_in_the_cache_under_a_bounded_timeout(tmp_path, monkeypatch):
    raw = write_idx(tmp_path / "server", mark=5)
    timeouts = []

    def fetch(url, download_root, filename, md5):
        timeouts.append(socket.getdefaulttimeout())
        file = filename.removesuffix(".gz")
        Path(download_root, file).write_bytes((raw / file).read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    assert load().num_classes == 6
    assert timeouts == [10] * 4
    assert socket.getdefaulttimeout() is None
    assert load(download=False).num_classes == 6  # now from the cache
    assert {p.name for p in (tmp_path / "cache" / "pvae").iterdir()} == {"MNIST"}


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("error", [urllib.error.URLError("cut off"), TimeoutError(), OSError(28)])
def test_a_download_that_is_cut_off_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fetch(url, download_root, filename, md5):
        if "t10k-labels" in filename:
            raise error
        Path(download_root, filename.removesuffix(".gz")).write_bytes(b"complete")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    assert load().name == "digits"
    assert list((tmp_path / "cache" / "pvae").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        load("mnist")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(images_of(12, 6, 5))[:-7], "must be 376 bytes, not 369"),
        ("train-images-idx3-ubyte", idx(images_of(12, 6, 5)) + b"!", "must be 376 bytes, not 377"),
        ("train-images-idx3-ubyte", b"\x1f\x8b\x08\x00gzip", "not with '1f 8b 08 00"),
        ("t10k-images-idx3-ubyte", b"", "a header of 16 bytes"),
        ("t10k-images-idx3-ubyte", idx(images_of(0, 6, 5)), r"must be at least 1, not \(0, 6, 5\)"),
        (
            "t10k-labels-idx1-ubyte",
            idx(images_of(4, 6, 5)),
            "an IDX file of bytes in 1 axes must begin",
        ),
        ("train-labels-idx1-ubyte", idx(images_of(11)), r"labels must be \(12,\).*not \(11,\)"),
        (
            "train-images-idx3-ubyte",
            idx(images_of(5, 6, 5)),
            "training images must be at least 6.* not 5",
        ),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, file, content, message):
    raw = write_idx(tmp_path)
    (raw / file).write_bytes(content)
    if len(content) == len(idx(images_of(5, 6, 5))):  # write five labels for five images
        (raw / "train-labels-idx1-ubyte").write_bytes(idx(images_of(5)))
    with pytest.raises(ValueError, match=message) as caught:
        load(None, tmp_path, download=False)  # found, so digits do not replace it
    assert str(tmp_path) in str(caught.value)


def test_training_and_test_images_have_one_shape(tmp_path):
    raw = write_idx(tmp_path)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(images_of(4, 5, 6)))
    with pytest.raises(ValueError, match=r"one shape, not \(1, 6, 5\) and \(1, 5, 6\)"):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize(
    ("typo", "meant"), [("minst", "mnist"), ("MNIST", "mnist"), ("fashion_mnist", "fashion-mnist")]
)
def test_a_typo_gets_the_names_and_the_closest_one(typo, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'") as caught:
        load(typo)
    assert all(name in str(caught.value) for name in NAMES)
    assert repr(typo) in str(caught.value)
    assert "the path of an existing .npz or .npy file or image folder" in str(caught.value)


def test_an_empty_name_is_no_path():
    with pytest.raises(ValueError, match="''"):
        load("")


# ----- arrays -------------------------------------------------------------------------------------


def sorted_by_first_pixel(data: Dataset) -> torch.Tensor:
    (x, *_) = everything(data)
    return x[x.flatten(1)[:, 0].argsort()]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 4), (0, None, 1, 2)),
        ((1, 5, 4), (0, 1, 2, 3)),
        ((3, 5, 4), (0, 1, 2, 3)),
        ((5, 4, 1), (0, 3, 1, 2)),
        ((5, 4, 3), (0, 3, 1, 2)),
        ((3, 5, 3), (0, 1, 2, 3)),  # ambiguous: axis 1 is taken as the channels
        ((1, 5, 3), (0, 1, 2, 3)),
    ],
)
def test_arrays_of_every_shape(tmp_path, shape, axes):
    array = images_of(40, *shape)
    np.save(tmp_path / "a.npy", array)
    data = load(str(tmp_path / "a.npy"))
    expected = array[:, None] if None in axes else array.transpose(axes)
    assert torch.equal(sorted_by_first_pixel(data), torch.from_numpy(expected.copy()))
    assert data.train.images.is_contiguous()
    assert sizes(data) == (32, 4, 4)
    assert (data.name, data.note, data.num_classes) == ("a.npy", "", None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays_are_rounded_to_255ths_and_say_so(tmp_path, dtype):
    array = images_of(20, 4, 4)
    np.save(tmp_path / "a.npy", (array / 255).astype(dtype))
    data = load(tmp_path / "a.npy")
    assert torch.equal(sorted_by_first_pixel(data)[:, 0], torch.from_numpy(array))
    assert "rounded to 255ths" in data.note


def test_bool_arrays_become_black_and_white(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(12, dtype=bool).reshape(12, 3, 4))
    (x,) = everything(load(tmp_path / "a.npy"))
    assert x.unique().tolist() == [0, 255]
    assert (x == 255).sum() == 12


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("pictures", "y")])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, ">i2"])
def test_labels_of_an_npz_stay_with_their_images(tmp_path, keys, dtype):
    labels = np.arange(30).astype(dtype)
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images_of(30, 4, 4), labels), strict=True)))
    data = load(tmp_path / "a.npz")
    x, y = everything(data)
    assert torch.equal(x.flatten(1)[:, 0].long(), y)  # the first pixel numbers the image
    assert y.sort().values.tolist() == list(range(30))
    assert data.num_classes == 30


@pytest.mark.parametrize("how", OBSERVATIONS)
@pytest.mark.parametrize("count", [10, 19, 20])
def test_small_files_are_split_too(tmp_path, how, count):
    np.savez(tmp_path / "a.npz", x=images_of(count, 4, 4), y=np.arange(count) % 2)
    data = load(tmp_path / "a.npz")
    assert sizes(data) == (count - 2 * (count // 10), count // 10, count // 10)
    assert data.num_classes == 2
    works(data, how)


def test_files_are_split_by_the_seed(tmp_path):
    np.save(tmp_path / "a.npy", images_of(30, 4, 4))
    first, again, other = (load(tmp_path / "a.npy", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_the_hash_is_over_pixels_labels_and_shapes(tmp_path):
    images, labels = images_of(20, 4, 6), np.arange(20)
    changed, relabelled = images.copy(), labels.copy()
    changed[7, 3, 3] ^= 1
    relabelled[7] += 1
    versions = [
        {"x": images, "y": labels},
        {"x": changed, "y": labels},
        {"x": images, "y": relabelled},
        {"x": images.reshape(20, 6, 4), "y": labels},
        {"x": images},
    ]
    hashes = []
    for i, arrays in enumerate(versions):
        np.savez(tmp_path / f"{i}.npz", **arrays)
        hashes.append(load(tmp_path / f"{i}.npz").sha256)
    assert len(set(hashes)) == len(versions)
    np.savez_compressed(tmp_path / "again.npz", **versions[0])
    assert load(tmp_path / "again.npz").sha256 == hashes[0]


def test_other_data_is_refused_with_both_names(tmp_path):
    np.save(tmp_path / "mine.npy", images_of(12, 4, 4))
    data = load(tmp_path / "mine.npy")
    data.require_same("mine.npy", data.sha256, tmp_path)
    message = (
        f"the run in runs/7 was started on mnist (SHA-256 {'ab' * 6}...), but the data found now "
        f"is mine.npy ({data.sha256[:12]}...): name the same data by --dataset and --data-root"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        data.require_same("mnist", "ab" * 32, "runs/7")


def test_the_hash_is_that_of_the_first_release():
    """Old runs keep this hash, so it must not change."""
    assert load("digits").sha256.startswith("041f8771457f")


def with_pixel(value: float) -> np.ndarray:
    array = np.full((12, 4, 4), 0.5)
    array[3, 1, 2] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (images_of(9, 4, 4), "number of images must be at least 10.* not 9"),
        (images_of(0, 4, 4), r"must have axes of at least 1, not \(0, 4, 4\)"),
        (images_of(12), r"must be \(N, D\) or .*, not \(12,\)"),
        (np.uint8(3), r"not \(\)"),
        (with_pixel(np.nan), r"not in \[nan, nan\]: 1 of 192 are .*NaN"),
        (with_pixel(np.inf), r"not in \[0.5, inf\]: 1 of 192 are .* infinite"),
        (with_pixel(-0.25), r"in \[0, 1\], not in \[-0.25, 0.5\]: 1 of 192"),
        (with_pixel(255.0), r"not in \[0.5, 255\]"),
        (images_of(12, 4, 4).astype(np.int64) + 2**24, "at most 16,777,216 in size"),
        (images_of(12, 4, 4).astype("U3"), "must be integers, bool or floats, not <U3"),
        (np.full((12, 5), 1e39), "must be finite: 60 of 60 numbers are not"),
    ],
)
def test_arrays_that_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a.npy")
    assert "a.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": images_of(12, 4, 4), "b": images_of(12, 4, 4)}, "'images' or 'x'.*, not 'a', 'b'"),
        ({"y": np.arange(12)}, "'images' or 'x'.*, not 'y'"),
        ({}, "only array, not missing"),
        ({"x": images_of(12, 4, 4), "y": np.arange(11)}, r"must be \(12,\).*not \(11,\)"),
        ({"x": images_of(12, 4, 4), "y": np.eye(12, dtype=int)}, r"not \(12, 12\)"),
        ({"x": images_of(12, 4, 4), "y": np.arange(12.0)}, "integers, not float64"),
        ({"x": images_of(12, 4, 4), "y": np.arange(12) - 1}, "labels must be at least 0, not -1"),
        ({"x": images_of(12, 4, 4).astype(object)}, "cannot be read as NumPy arrays"),
    ],
)
def test_npz_files_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "pickle"])
def test_files_that_are_no_arrays(tmp_path, suffix, damage):
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, images_of(12, 4, 4))
    else:
        np.savez(path, images=images_of(12, 4, 4))
    whole = path.read_bytes()
    content = {"text": b"images", "empty": b"", "truncated": whole[:-9], "pickle": pickle.dumps({})}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read as NumPy arrays"):
        load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"\.npz or \.npy file, not .*a\.csv"):
        load(tmp_path / "a.csv")


# ----- folders of images --------------------------------------------------------------------------


def write_images(folder: Path, arrays: np.ndarray, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:03}.{suffix}")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
@pytest.mark.parametrize("suffix", ["png", "bmp", "PNG"])
def test_a_flat_folder_is_read_whole_without_labels(tmp_path, shape, suffix):
    array = images_of(20, *shape)
    write_images(tmp_path / "mine", array, suffix)
    (tmp_path / "mine" / "readme.txt").write_text("no image")
    (tmp_path / "mine" / "._000.png").write_bytes(b"what macOS leaves behind")
    data = load(tmp_path / "mine")
    expected = array[:, None] if len(shape) == 2 else array.transpose(0, 3, 1, 2)
    assert torch.equal(sorted_by_first_pixel(data), torch.from_numpy(expected.copy()))
    assert (data.name, data.num_classes, sizes(data)) == ("mine", None, (16, 2, 2))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_formats_are_read_to_within_their_loss(tmp_path, suffix):
    write_images(tmp_path / "mine", np.full((12, 8, 8, 3), 200, dtype=np.uint8), suffix)
    (x,) = everything(load(tmp_path / "mine"))
    assert x.shape == (12, 3, 8, 8)
    assert (x.int() - 200).abs().max() < 5


def test_subfolders_are_labels_as_in_torchvision(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        write_images(tmp_path / "mine" / name, np.full((6, 4, 4), 100 + i, dtype=np.uint8))
    write_images(tmp_path / "mine" / "c" / "deeper", np.full((2, 4, 4), 102, dtype=np.uint8))
    dataset = load(tmp_path / "mine")
    x, y = everything(dataset)
    theirs = datasets.ImageFolder(str(tmp_path / "mine"))
    assert list(dataset.class_names) == theirs.classes
    shade = {
        label: np.asarray(theirs[theirs.targets.index(label)][0])[0, 0, 0] for label in (0, 1, 2)
    }
    assert [int(v) for v in x[:, 0, 0, 0]] == [shade[int(label)] for label in y]
    assert y.bincount().tolist() == [6, 6, 8]


def write_splits(folder: Path, names: tuple[str, ...], classes: tuple[str, ...] = ("",)) -> None:
    """Writes 20 images for each class of each split; the first pixel numbers all images."""
    array = images_of(20 * len(names) * len(classes), 4, 4)
    parts = iter(np.split(array, len(names) * len(classes)))
    for name in names:
        for label in classes:
            write_images(folder / name / label, next(parts))


@pytest.mark.parametrize("validation", ["validation", "val", "Val"])
@pytest.mark.parametrize("classes", [("",), ("b", "a")])
def test_folders_named_as_splits_are_read_as_they_are(tmp_path, validation, classes):
    write_splits(tmp_path / "mine", ("train", validation, "test"), classes)
    data = load(tmp_path / "mine")
    each = 20 * len(classes)
    assert (sizes(data), data.name, data.note) == ((each,) * 3, "mine", "")
    assert data.class_names == (None if classes == ("",) else ("a", "b"))
    assert data.sha256 == load(tmp_path / "mine", seed=1).sha256
    for i, part in enumerate(PARTS):
        first = getattr(data, part).images.flatten(1)[:, 0].long()
        assert torch.equal(first.sort().values, torch.arange(each * i, each * (i + 1)))
        labels = getattr(data, part).labels
        # the classes were written as b, a; the labels follow the alphabet
        assert labels is None if classes == ("",) else torch.equal(labels, 1 - first // 20 % 2)


def test_without_validation_a_tenth_of_the_training_images_is_held_out(tmp_path):
    write_splits(tmp_path / "mine", ("train", "test"), ("a", "b", "c"))
    data, other = load(tmp_path / "mine"), load(tmp_path / "mine", seed=1)
    assert sizes(data) == (54, 6, 60)
    assert data.note == (
        "mine: no validation split, so a tenth of the training data is for validation"
    )
    assert torch.equal(data.test.images, other.test.images)
    assert not torch.equal(data.validation.images, other.validation.images)
    kept = torch.cat([data.train.images, data.validation.images]).flatten(1)[:, 0].long()
    assert torch.equal(kept.sort().values, torch.arange(60))  # no test images, which are 60 to 119
    assert torch.equal(torch.cat([data.train.labels, data.validation.labels]), kept // 20)
    assert len(data.validation.labels.unique()) > 1  # drawn at random, not the last class


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test", "other"), "nothing else, not other, train, test"),
        (("train", "bus"), "nothing else, not bus, train"),
        (("train", "val"), "must be train and test, .*, not train, val"),
        (("test",), "must be train and test, .*, not test"),
        (("train", "val", "validation", "test"), "not train, val, validation, test"),
        (("train", "Train", "test"), "not Train, train, test"),
        (("train", "test", "."), "nothing else, not 000.png, 001.png, 002.png, 003.png, ...$"),
        (("train/a", "train/b", "test/a"), "same subfolders.*not lack test/b$"),
        (("train/a", "test/b", "val/a"), "not lack test/a, train/b, val/b$"),
        (("train/a", "test"), "not lack test/a$"),
        (("train/a", "train", "test/a"), r"must be in a subfolder.*\(a\), not .*train.000\.png"),
    ],
)
def test_folders_that_mix_splits_with_labels_are_refused(tmp_path, folders, message):
    for folder in folders:
        write_images(tmp_path / "mine" / folder, images_of(12, 4, 4))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "mine")
    assert str(tmp_path / "mine") in str(caught.value)


def test_splits_share_one_size_and_the_number_of_channels(tmp_path):
    write_images(tmp_path / "mine" / "train", images_of(12, 4, 4))
    write_images(tmp_path / "mine" / "test", images_of(2, 4, 4, 3))
    data = load(tmp_path / "mine")
    assert (data.train.images.shape[1:], data.test.images.shape[1:]) == ((3, 4, 4), (3, 4, 4))
    write_images(tmp_path / "mine" / "test", images_of(1, 4, 5))
    with pytest.raises(ValueError, match=r"not 4x4 \(train.000\.png\) and 4x5 \(test.000\.png\)"):
        load(tmp_path / "mine")


def test_nine_training_images_leave_none_for_validation(tmp_path):
    write_images(tmp_path / "mine" / "train", images_of(9, 4, 4))
    write_images(tmp_path / "mine" / "test", images_of(1, 4, 4))
    with pytest.raises(ValueError, match=r"training images must be at least 10, .* not 9"):
        load(tmp_path / "mine")


def test_one_colour_image_makes_all_of_them_rgb(tmp_path):
    grey = images_of(11, 4, 4)
    write_images(tmp_path / "mine", grey)
    Image.fromarray(np.full((4, 4, 3), (255, 0, 9), dtype=np.uint8)).save(tmp_path / "mine/z.png")
    x = sorted_by_first_pixel(load(tmp_path / "mine"))
    assert torch.equal(x[:11], torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
    assert x[11, :, 0, 0].tolist() == [255, 0, 9]


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("RGB", 3)]
)
def test_every_mode_of_8_bits(tmp_path, mode, channels):
    (tmp_path / "mine").mkdir()
    for i in range(12):
        image = Image.new("L", (4, 5), 255).convert(mode)
        # Pillow warns if the transparency of a palette is dropped
        extra = {"transparency": bytes([0, 128])} if mode == "P" else {}
        image.save(tmp_path / "mine" / f"{i}.png", **extra)
    (x,) = everything(load(tmp_path / "mine"))
    assert x.shape == (12, channels, 5, 4)
    assert (x == 255).all()


def test_the_first_image_of_another_size_is_named(tmp_path):
    write_images(tmp_path / "mine", images_of(12, 5, 4))
    for name in ("007.png", "009.png"):
        Image.fromarray(np.zeros((6, 4), dtype=np.uint8)).save(tmp_path / "mine" / name)
    with pytest.raises(ValueError, match=r"not 5x4 \(000\.png\) and 6x4 \(007\.png\)"):
        load(tmp_path / "mine")


def test_folders_that_are_refused(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load(mine)
    write_images(mine, images_of(9, 4, 4))
    with pytest.raises(ValueError, match=r"number of images must be at least 10.* not 9"):
        load(mine)
    write_images(mine / "a", images_of(9, 4, 4))
    with pytest.raises(ValueError, match=r"must be in a subfolder.*\(a\), not .*000\.png"):
        load(mine)


@pytest.mark.parametrize("keep", [0, 8, 30, 60])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_an_unreadable_image_is_named(tmp_path, suffix, keep):
    write_images(tmp_path / "mine", images_of(12, 8, 8), suffix)
    broken = tmp_path / "mine" / f"005.{suffix}"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"005\.{suffix} cannot be read as an image"):
        load(tmp_path / "mine")


def png_of_16_bits(channels: int) -> bytes:
    """Returns a PNG of 4x4 pixels of 16 bits, grey or RGB; Pillow cannot write the RGB one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + crc(kind + content)

    def crc(data: bytes) -> bytes:
        return struct.pack(">I", zlib.crc32(data))

    rows = (b"\0" + struct.pack(">H", 40_000) * 4 * channels) * 4
    header = struct.pack(">2I5B", 4, 4, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_images_are_refused_not_clipped(tmp_path, channels):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_bytes(png_of_16_bits(channels))
    with pytest.raises(ValueError, match=r"0\.png .*must have 8 bits"):
        load(tmp_path / "mine")


def test_an_image_too_large_for_pillow_is_named(tmp_path, monkeypatch):
    write_images(tmp_path / "mine", images_of(12, 8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(ValueError, match=r"000\.png cannot be read as an image: .*bomb"):
        load(tmp_path / "mine")


def test_the_mean_image_is_that_of_the_training_pixels():
    digits = load("digits")
    mean = pixels(digits.train.images).mean(0)
    torch.testing.assert_close(digits.mean_image, mean, rtol=0, atol=1e-6)
