"""Streamed data equal the data in memory, bit for bit, and do not fill the memory."""

import contextlib
import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import example, tiny
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import pvae
from pvae import data, processes, streaming
from pvae.train import Trainer

N = 43
pytestmark = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")


def some(*shape: int) -> np.ndarray:
    """Returns random data whose first three rows (or channels) are dark and all others bright."""
    images = np.random.default_rng(0).integers(0, 256, (N, *shape), dtype=np.uint8)
    images[:, :3] //= 2
    images[:, 3:] = images[:, 3:] // 2 + 128
    return images


def mapped(folder: Path, shape: tuple[int, ...] = (6, 5)) -> Path:
    np.save(folder / "images.npy", some(*shape))
    return folder / "images.npy"


def pictured(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    """Writes grey and coloured pictures with labels; `splits` are subfolders."""
    for i, image in enumerate(some(6, 5, 3)):
        label = folder / "pictures" / splits[i % len(splits)] / "ab"[i // len(splits) % 2]
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if i % 3 else image[..., 0]).save(label / f"{i}.png")
    return folder / "pictures"


SOURCES: dict[str, tuple[Callable[[Path], Path], int | None]] = {
    "npy": (mapped, None),
    "npy, channels last": (lambda folder: mapped(folder, (6, 5, 3)), None),
    "npy, by a worker": (mapped, 1),
    "folder": (pictured, 0),
    "folder, by workers": (pictured, None),
    "folder of splits": (lambda folder: pictured(folder, ("train", "test")), 0),
}


FEW = ("npy", "folder")
Both = tuple[data.Dataset, data.Dataset]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Callable[[str], Both]:
    """Returns a function that loads the same data in memory and streamed."""

    @functools.cache
    def load(name: str) -> Both:
        make, workers = SOURCES[name]
        path = make(tmp_path_factory.mktemp("data"))
        return data.load(path, seed=3), data.load(path, seed=3, stream=True, workers=workers)

    return load


slow = [pytest.param(name, marks=pytest.mark.slow) for name in SOURCES if name not in FEW]
few = pytest.mark.parametrize("name", [*FEW, *slow])


def same(ours: Any, theirs: Any) -> bool:
    return (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SOURCES)
def test_streamed_data_is_the_data_in_memory(both, name):
    memory, streamed = both(name)
    assert isinstance(streamed.train.images, streaming.Streamed)
    assert "not kept in memory" in streamed.note
    assert (streamed.sha256, streamed.num_classes) == (memory.sha256, memory.num_classes)
    assert streamed.train.images.rows.element_size() == 4  # bytes of memory for each image
    assert torch.equal(streamed.mean_image, memory.mean_image)
    for ours, theirs in zip(streamed.splits, memory.splits, strict=True):
        assert repr(ours.images).startswith("Streamed")
        assert (ours.images.shape, ours.images.dtype) == (theirs.images.shape, theirs.images.dtype)
        assert same(ours.labels, theirs.labels)
        for size in (3, 100):
            a, b = data.chunks(ours, size), data.chunks(theirs, size)
            for (x, y), (expected, expected_y) in zip(a, b, strict=True):
                assert type(x) is Tensor
                assert torch.equal(x, expected)
                assert same(y, expected_y)
        assert torch.equal(data.pixels(ours.first(2).images), data.pixels(theirs.first(2).images))
        assert torch.equal(ours.images[-1], theirs.images[-1])


@few
@pytest.mark.parametrize("how", data.OBSERVATIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_those_of_data_in_memory(both, name, how, count, monkeypatch):
    """Batches agree in each process and from any batch on; the random state does not change.

    The last batch leaves one process without an image.
    """
    memory, streamed = (data.observe(d, how, seed=5) for d in both(name))
    state = torch.get_rng_state()
    monkeypatch.setattr(processes, "count", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        for skip in (0, 2):
            settings = {"seed": 1, "epoch": 2, "skip": skip}
            ours = list(streamed.batches(17, **settings))
            theirs = list(memory.batches(17, seed=1, epoch=2))[skip:]
            for (x, y), (expected, expected_y) in zip(ours, theirs, strict=True):
                assert type(x) is Tensor
                assert torch.equal(x, expected)
                assert same(y, expected_y)
    for split in ("validation", "test"):
        ours, theirs = (getattr(d, split).images for d in (streamed, memory))
        assert torch.equal(data.pixels(ours), data.pixels(theirs))
    assert torch.equal(torch.get_rng_state(), state)


class Items(torch.utils.data.Dataset):
    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.images[i] if self.labels is None else (self.images[i], self.labels[i])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("stream", [True, False])
def test_a_data_set_of_torch_is_what_its_items_are(workers, labelled, dtype, stream):
    images = torch.from_numpy(some(1, 6, 5))
    images = images if dtype == torch.uint8 else images / 255
    labels = torch.arange(N) % 4 if labelled else None
    parts = [
        data.Split(images[k], None if labels is None else labels[k])
        for k in (slice(30), slice(30, 36), slice(36, N))
    ]
    items = [Items(part.images, part.labels) for part in parts]
    found = data.from_torch("mine", *items, workers=workers, stream=stream)
    assert isinstance(found.test.images, streaming.Streamed) == stream
    assert found.sha256 == data._dataset("mine", parts).sha256
    how = "grey" if dtype == torch.uint8 else "as_is"
    ours, theirs = (
        list(data.observe(d, how).batches(8, seed=0, epoch=0))
        for d in (found, data.Dataset("mine", *parts, sha256=""))
    )
    for (x, y), (expected, expected_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, expected)
        assert same(y, expected_y)


def trained(dataset: data.Dataset, folder: Path | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    vae = tiny(net="mlp", shape=dataset.image_shape)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    settings = {"epochs": 2, "batch_size": 8, "quiet": True, "folder": folder, **settings}
    return Trainer(vae, svi, data.observe(dataset, "dynamic"), **settings)


def test_a_loader_is_its_data_set():
    items = Items(torch.from_numpy(some(1, 6, 5)), torch.arange(N) % 4)
    for loader in (DataLoader(items, 7, shuffle=True, num_workers=1), DataLoader(items)):
        found = data.from_torch("mine", loader, stream=True)
        assert found.sha256 == data.from_torch("mine", items).sha256
        assert found.train.images.workers == loader.num_workers


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"sampler": range(5)}, "sampler"),
        ({"sampler": RandomSampler(range(N), num_samples=5)}, "sampler"),
        ({"sampler": RandomSampler(range(N), replacement=True)}, "sampler"),
        ({"batch_sampler": [[0, 1]]}, "batch_sampler"),
        ({"collate_fn": torch.stack}, "collate_fn"),
        ({"worker_init_fn": print}, "worker_init_fn"),
    ],
)
def test_a_loader_with_something_of_its_own_is_refused(settings, own):
    loader = DataLoader(Items(torch.from_numpy(some(1, 6, 5))), **settings)
    with pytest.raises(ValueError, match=f"mine must be a DataLoader without a {own} of its own"):
        data.from_torch("mine", loader)


def test_a_loader_of_a_stream_of_items_is_refused():
    with pytest.raises(ValueError, match="mine must be map-style"):
        data.from_torch("mine", DataLoader(Endless()))


@pytest.mark.parametrize("wrap", [lambda items: items, DataLoader])
def test_the_trainer_takes_what_torch_has(wrap):
    """Data of torch are observed as grey: the weights equal those of `from_torch` and `observe`."""
    items = Items(torch.from_numpy(some(6, 5))[:, None] % 2 * 255)
    found = []
    for given in (wrap(items), data.observe(data.from_torch("mine", items), "grey")):
        torch.manual_seed(0)
        vae = tiny(net="mlp", shape=(1, 6, 5))
        adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
        svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
        found.append(Trainer(vae, svi, given, epochs=1, batch_size=8, quiet=True))
        found[-1].fit()
    for ours, theirs in zip(*map(weights, found), strict=True):
        assert torch.equal(ours, theirs)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.vae.parameters()]


@few
def test_training_and_a_resumed_epoch_are_those_of_data_in_memory(both, name, tmp_path):
    memory, streamed = both(name)
    (expected := trained(memory)).fit()
    (found := trained(streamed)).fit()
    assert all(map(torch.equal, weights(found), weights(expected)))
    (folder := tmp_path / "run").mkdir()
    stopped = trained(streamed, folder)
    step = stopped.svi.step

    def until_stopped(*args: Any) -> Any:
        if stopped.step == stopped.steps_per_epoch + 1:  # within the second epoch
            raise KeyboardInterrupt
        return step(*args)

    stopped.checkpoint_minutes = 1e-9  # after each step
    stopped.svi.step = until_stopped
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again = trained(streamed, folder)
    again.resume(folder / "checkpoint.pt")
    assert again._batch
    again.fit()
    assert all(map(torch.equal, weights(again), weights(expected)))


def test_bf16_trains_on_streamed_data(tmp_path):
    trainer = trained(data.load(mapped(tmp_path), stream=True), precision="bf16", epochs=4)
    trainer.fit()
    objectives = [row["train_objective"] for row in trainer.history]
    assert objectives[-1] > objectives[0]


def test_the_main_run_streams(tmp_path):
    arguments = ["--dataset", str(mapped(tmp_path)), "--stream", "--net", "mlp", "--hidden", "8"]
    arguments += ["-n", "1", "-b", "16", "--device", "cpu", "--out", str(tmp_path / "run")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        example("mnist_svi").main(arguments)
    assert "images.npy: its images are not kept in memory" in said.getvalue()
    assert "images a second" in said.getvalue()
    assert pvae.results.read(tmp_path / "run" / "results.json")


# ---- memory ----


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory by /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    from reliability import blank, forget_peak, peak

    def most(count: int) -> float:
        forget_peak()
        trained(data.load(blank(tmp_path, count, 20), stream=True), batch_size=1000, epochs=1).fit()
        return peak() / 2**20

    most(2_000)  # the first run also allocates what later runs use
    few, many = most(20_000), most(200_000)
    assert many - few < 30  # MiB; the larger file has 69 more


def test_what_is_larger_than_a_quarter_of_the_memory_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "bound", lambda: 500)
    for path in (mapped(tmp_path), pictured(tmp_path)):
        dataset = data.load(path)
        assert isinstance(dataset.train.images, streaming.Streamed)
        assert path.name in dataset.note
        assert len(dataset.train.first(2).images.float()) == 2
        with pytest.raises(ValueError, match=r"needs 35 images in memory .* take fewer of them"):
            dataset.train.images.float()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((20, 4, 4), np.float32), "must hold uint8, row by row, not float32"),
        (np.zeros((20, 4, 4), np.uint8, "F"), "must hold uint8, row by row, not uint8, column by"),
        (np.zeros((20, 4), np.uint8), r"images must be \(N, H, W\)"),
        (np.zeros((), np.uint8), "cannot be read as a NumPy array"),
        (np.zeros((0, 4, 4), np.uint8), "axes of at least 1"),
    ],
)
def test_an_array_that_cannot_be_streamed_is_refused(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as error:
        data.load(tmp_path / "a.npy", stream=True)
    assert str(tmp_path / "a.npy") in str(error.value)


@pytest.mark.parametrize("name", ["digits", "mnist", None])
def test_what_has_no_file_of_its_own_is_not_streamed(name):
    with pytest.raises(ValueError, match=r"stream must be for a \.npy file or an image folder"):
        data.load(name, stream=True)


def test_workers_are_for_what_is_streamed():
    with pytest.raises(ValueError, match=r"workers must be 0 or left out, not 2: they read data"):
        data.load("digits", workers=2)
    assert len(data.load("digits", workers=0).train.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changed_is_named(workers, tmp_path):
    folder = pictured(tmp_path)
    dataset = data.load(folder, stream=True, workers=workers)
    for file in folder.rglob("*.png"):
        Image.new("L", (3, 3)).save(file)
    with pytest.raises(ValueError, match=r"\d+.png has changed"):
        list(data.observe(dataset, "grey").batches(8, seed=0, epoch=0))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([np.zeros((1, 2, 2))], "item 0 of mine must be an image .* not ndarray"),
        ([torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)], r"item 1 of mine must be as the first"),
        ([], "mine must be map-style"),
        (iter([]), "mine must be map-style"),
    ],
)
def test_items_of_another_kind_are_named(items, message):
    with pytest.raises(ValueError, match=message):
        data.from_torch("mine", items, items, items)


@pytest.mark.parametrize(("label", "shown"), [(0.7, "0.7"), (-1, "-1"), (None, "None")])
def test_labels_are_whole_numbers(label, shown):
    items = [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 2), label)]
    with pytest.raises(ValueError, match=f"item 1 of mine must have a label .*, not {shown}"):
        data.from_torch("mine", items * 10)


@pytest.mark.parametrize("other", [torch.zeros(1, 3, 2), (torch.zeros(1, 2, 2), 0)])
def test_parts_of_two_kinds_are_refused(other):
    with pytest.raises(ValueError, match="parts must be of one dtype and shape, not"):
        data.from_torch("mine", [torch.zeros(1, 2, 2)], [other], [torch.zeros(1, 2, 2)])


def test_a_number_of_parts_is_refused():
    with pytest.raises(ValueError, match=r"one data set, or three .*, not 2"):
        data.from_torch("mine", *[[torch.zeros(1, 2, 2)]] * 2)
