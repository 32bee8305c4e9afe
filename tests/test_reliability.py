"""Nothing let in: wrong and hostile files get an error that names them, and run nothing."""

import copy
import gzip
import hashlib
import io
import json
import pickle
import signal
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reliability
import torch
from conftest import BENCHMARKS, example, tiny
from PIL import Image
from torchvision import datasets

import pvae
from pvae import checkpoint, cli, data, evaluation, reading, results, run, untrusted
from pvae.builder import GUIDES, LIKELIHOODS, PRIORS, Recipe, compose, number_of_parameters

SCRIPT = BENCHMARKS / "reliability.py"

Runs = reliability.Runs  # reading it from a pickle would write the file "let_in"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not Path("let_in").exists()


# ---- many wrong files ----


@pytest.mark.parametrize("name", reliability.FORMATS)
def test_a_wrong_file_is_an_error_that_names_it_or_is_read_right(name):
    found = reliability.fuzz_one(reliability.FORMATS[name], 48, seed=1)
    assert found.wrong == ()
    assert found.errors + found.read == 48
    assert found.read >= 1
    assert found.errors >= 20
    assert found.passed >= 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted on Linux")
def test_the_fuzz_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(reliability, "FORMATS", {"npy": reliability.FORMATS["npy"]})
    monkeypatch.setattr(reliability.Watch, "start", lambda self: None)
    reliability.main(["fuzz", "--inputs", "5"])
    assert "clean errors" in capsys.readouterr().out


def test_the_fuzz_tells_wrong_answers():
    """Wrong are an error that names no file, an error of another kind, and wrong data."""
    npy = reliability.FORMATS["npy"]

    def fails(error):
        def read(path):
            raise error

        return reliability.fuzz_one(npy._replace(read=read), 2).wrong

    assert "names no file" in fails(ValueError("no"))[0]
    assert "KeyError" in fails(KeyError("a.npy"))[1]
    assert "is not what it must be" in fails(AssertionError("is not what it must be"))[0]


# ---- files that try to run code ----


def test_no_checkpoint_runs_code(tmp_path):
    path = tmp_path / "best.pt"
    for state in (Runs(), {**checkpoint.pair_state(tiny()), "recipe": Runs()}):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"best\.pt cannot be read .*names 'posix system'"):
            pvae.load(path)
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match=r"best\.pt cannot be read"):
        pvae.load(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_array_of_objects_is_read(tmp_path, protocol):
    array = np.array([Runs()] * 20, dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=array)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(array, protocol))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as NumPy arrays"):
            data.load(tmp_path / name)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["data", "labels", "extra", None])
def test_no_batch_of_cifar_runs_code(tmp_path, monkeypatch, protocol, where):
    content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4}
    content = Runs() if where is None else {**content, where: Runs()}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    packed = pickle.dumps(content, protocol)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(packed)
    sums = [[name, hashlib.md5(packed).hexdigest()] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:6])
    with pytest.raises(ValueError, match=r"data_batch_1 is no batch of CIFAR-10: .*only arrays"):
        data.load("cifar10", tmp_path)


def test_a_batch_asks_for_no_more_memory_than_its_steps_need(tmp_path):
    content = b"\x80\x02]r\xff\xff\xff\x00."
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch is no batch .*numbers an object 16,777,215"):
        reading._read_batch(tmp_path / "test_batch", hashlib.md5(content).hexdigest())


def test_json_is_never_a_pickle(tmp_path):
    (tmp_path / "config.json").write_bytes(pickle.dumps(Runs(), protocol=0))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json holds no results"):
        results.read(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["eps", "gif", "tiff", "ppm"])
def test_a_picture_by_a_wrong_name_is_not_opened(tmp_path, kind):
    """Pillow would run Ghostscript, a program, for PostScript, and cut 16 bits of a TIFF to 8."""
    Image.new("L", (8, 8)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: cannot identify"):
        data.load(tmp_path)


# ---- files that claim too much ----


def twice(entries: dict[str, bytes], name: str) -> bytes:
    file = io.BytesIO(reliability.archive(entries))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, entries[name])
    return file.getvalue()


def test_entries_are_neither_packed_nor_counted_twice(tmp_path):
    pvae.save(tiny(), tmp_path / "v.pt")
    for packed in (True, False):
        path = tmp_path / f"{packed}.pt"
        path.write_bytes((tmp_path / "v.pt").read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("v/more", b"1", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            for i in range(0 if packed else 99):  # names for the same content
                entry = copy.copy(largest)
                entry.filename = f"v/{i}"
                archive.filelist.append(entry)
        with pytest.raises(ValueError, match="must be stored as they are"):
            pvae.load(path)


def test_a_checkpoint_holds_what_it_claims(tmp_path):
    path = tmp_path / "v.pt"
    pvae.save(tiny(), path)
    with zipfile.ZipFile(path) as real:
        entries = {name: real.read(name) for name in real.namelist()}
    name = next(name for name in entries if name.endswith("/data/0"))
    path.write_bytes(reliability.archive({**entries, name: bytes(2**20)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match=r"v\.pt cannot be read .*must be stored as they are"):
        pvae.load(path)
    path.write_bytes(reliability.archive(entries) + bytes(30))
    with pytest.raises(ValueError, match="nothing must follow its directory"):
        pvae.load(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        path.write_bytes(twice(entries, name))
    with pytest.raises(ValueError, match="two of its entries have one name"):
        pvae.load(path)
    path.write_bytes(reliability.archive({**entries, name: entries[name] + b"!"}))
    with pytest.raises(ValueError, match="a storage claims"):
        pvae.load(path)
    path.write_bytes(reliability.archive(entries))
    assert pvae.load(path).recipe == tiny().recipe
    large = {"a": torch.zeros(1).expand(10**12)}
    torch.save({"format": checkpoint.FORMAT, "model": large}, path)
    with pytest.raises(ValueError, match="a tensor claims 4,000,000,000,000 bytes of 4"):
        checkpoint.read(path)


def claim(header, tensor, change):
    name = next(name for name in header if name != "__metadata__")
    header[name] = {**header[name], tensor: change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, ours: ours["recipe"].update(event_shape=[1, 10**5, 10**5]), "max_parameters"),
        (lambda h, ours: ours["recipe"].update(hidden=5000), r"parameters, but the file has .* by"),
        (lambda h, ours: ours["recipe"].update(hidden="16"), "checksum"),
        (lambda h, ours: ours["recipe"].update(net=["os"]), "net must be one of"),
        (lambda h, ours: ours["recipe"].update(other=1), "another version of pvae"),
        (lambda h, ours: ours.update(recipe=[1]), "holds no recipe"),
        (lambda h, ours: ours.update(format="1"), "is not a checkpoint of pvae"),
        (lambda h, ours: ours.pop("recipe"), "cannot be read as a checkpoint"),
        (lambda h, ours: h.pop("__metadata__"), "cannot be read as a checkpoint"),
        (lambda h, ours: claim(h, "shape", [10**9, 10**9]), "cannot be read as a checkpoint"),
        (lambda h, ours: claim(h, "data_offsets", [0, 10**12]), "cannot be read as a checkpoint"),
        (lambda h, ours: claim(h, "dtype", "U8"), "cannot be read as a checkpoint"),
    ],
)
def test_safetensors_hold_what_they_claim(tmp_path, monkeypatch, change, message):
    """A stranger can leave out the checksum, so every other check must work without it."""

    def without_checksum(header, ours):
        if message != "checksum":
            del ours["checksum"]
        change(header, ours)

    (tmp_path / "v.safetensors").write_bytes(reliability.safetensors_file(without_checksum))
    monkeypatch.setattr(checkpoint, "compose", None)  # never called
    with pytest.raises(ValueError, match=rf"(?s)v\.safetensors .*{message}"):
        pvae.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("length", [2**24 + 1, 2**63, 2**64 - 1])
def test_the_header_of_safetensors_is_bounded(tmp_path, length):
    content = reliability.safetensors_file(lambda header, ours: None)
    path = tmp_path / "v.safetensors"
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(ValueError, match=r"v\.safetensors .*its header must have at most"):
        pvae.load(path)


def test_the_header_of_a_large_file_is_bounded_too(tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(struct.pack("<Q", 2**25) + b"{" * 2**25)
    with pytest.raises(ValueError, match="its header must have at most 16,777,216 bytes"):
        pvae.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_shape": (1, 10**5, 10**5)}, "max_parameters must be at least"),
        ({"event_shape": (2**62,) * 8}, "no tensor has sizes as large"),
        ({"event_shape": [1, 8, 8]}, r"event_shape must be a tuple of .*, not \[1, 8, 8\]"),
        ({"event_shape": ()}, "event_shape must be a tuple"),
        ({"event_shape": (1, 8, 10**99)}, "event_shape must be a tuple"),
        ({"latent_dims": (3.0,)}, r"latent_dims must be .*, not \(3.0,\)"),
        ({"latent_dims": (float("nan"),)}, "latent_dims must be"),
        ({"latent_dims": (True,)}, "latent_dims must be"),
        ({"latent_dims": (-3,)}, "latent_dims must be"),
        ({"latent_dims": (10**6,), "guide": "iaf"}, "max_parameters must be at least 6,"),
        ({"latent_dims": (3000,), "prior": "flow"}, r"parameters, but the file has .* bytes"),
        ({"hidden": 10**8}, "max_parameters must be at least"),
        ({"hidden": 5000}, r"it makes .* parameters, but the file has .* bytes"),
        ({"hidden": "16"}, "hidden must be a whole number"),
        ({"num_classes": -1}, "num_classes must be a whole number"),
        ({"net": ["conv"]}, "net must be one of"),
        ({"net": "os.system"}, "net must be one of"),
        ({"activation": {"a": 1}}, "activation must be one of"),
        ({"likelihood": None}, "likelihood must be one of"),
        ({"other": 1}, "another version of pvae"),
        ({3: 1}, "another version of pvae"),
    ],
)
def test_a_recipe_is_checked_before_it_is_built(tmp_path, monkeypatch, change, message):
    path = tmp_path / "v.pt"
    state = checkpoint.pair_state(tiny(net="mlp"))
    checkpoint.write(path, {**state, "recipe": {**state["recipe"], **change}})
    monkeypatch.setattr(checkpoint, "compose", None)  # never called
    with pytest.raises(ValueError, match=rf"(?s)v\.pt .*{message}"):
        pvae.load(path)


def test_who_trusts_a_file_raises_the_bound(tmp_path):
    pvae.save(tiny(), tmp_path / "v.pt")
    count = sum(p.numel() for p in tiny().parameters())
    assert pvae.load(tmp_path / "v.pt", max_parameters=count).recipe == tiny().recipe
    with pytest.raises(ValueError, match=f"must be at least {count:,}, .*, not {count - 1:,}"):
        pvae.load(tmp_path / "v.pt", max_parameters=count - 1)


def counted(recipe: Recipe) -> tuple[int, int]:
    """Returns the number of parameters that is counted, and the number that a pair has."""
    return number_of_parameters(recipe), sum(p.numel() for p in compose(recipe).parameters())


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("dims", [(2,), (40,), (3, 2)])
def test_parameters_are_counted_without_making_them(guide, dims):
    for prior in PRIORS:
        num_data = None if GUIDES[guide].amortized else 5
        try:
            recipe = Recipe((1, 4, 4), dims, "mlp", "bernoulli", guide, prior, 8, num_data=num_data)
            count, made = counted(recipe)
        except ValueError:
            continue  # these parts do not fit together
        if GUIDES[guide].flow is None:
            assert count == made
        else:  # the count leaves out what a flow's context adds to the encoder
            assert count == made - 16 * 9 * (1 + (len(dims) > 1))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_parameters_of_every_net_are_counted(likelihood):
    for net in ("conv", "course", "deep"):
        count, made = counted(Recipe((1, 28, 28), (2,), net, likelihood))
        assert count == made


@pytest.mark.parametrize(
    "junk",
    [None, 3, "x", [], [1], {"a": 1}, {"a": None}, {3: torch.zeros(1)}, {"a": torch.zeros(0)}],
)
def test_junk_in_the_place_of_a_model(tmp_path, junk):
    checkpoint.write(tmp_path / "v.pt", {**checkpoint.pair_state(tiny()), "model": junk})
    with pytest.raises(ValueError, match=r"v\.pt "):
        pvae.load(tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"best\.pt "):
        checkpoint.restore(tiny(), junk, "best.pt")


def test_tensors_of_another_kind_are_not_cast(tmp_path):
    vae = tiny()
    state = {name: t.to(torch.cfloat) for name, t in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r"of torch\.complex64 saved"):
        checkpoint.restore(vae, state, "best.pt")


@pytest.mark.parametrize("change", [{"image_shape": 3}, {"net": "cnn"}, {"latent_dim": [1]}])
def test_junk_in_format_1(tmp_path, change):
    old = {
        "image_shape": [1, 2, 2],
        "latent_dim": 2,
        "top_dim": None,
        "net": "mlp",
        "prior": "vamp",
    }
    torch.save({"format": 1, "model": {}, "recipe": {**old, **change}}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"v\.pt "):
        pvae.load(tmp_path / "v.pt")


def bomb(path: Path) -> Path:
    """Writes 200 MiB of zeros, packed to a thousandth of that size."""
    sizes = (200, 1024, 1024)
    if path.suffix == ".gz":
        header = struct.pack(">4I", 0x803, *sizes)
        path.write_bytes(gzip.compress(header + bytes(2**20)) + gzip.compress(bytes(2**20)) * 199)
        return path
    header = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": sizes}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x", "w") as x:
        x.write(header.getvalue())
        for _ in range(sizes[0]):
            x.write(bytes(2**20))
    return path


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path):
    for path in (tmp_path / "a.npz", tmp_path / "train-images-idx3-ubyte.gz"):
        bomb(path)
        with pytest.raises(ValueError, match=rf"{path.name}.* at most 134,217,728 bytes, or 100"):
            reading._read_idx(path) if path.suffix == ".gz" else data.load(path)


def test_a_picture_of_too_many_pixels_is_not_unpacked(tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png .*at most 16,777,216 pixels, not 5000x5000"):
        data.load(tmp_path)


def test_pictures_together_are_bounded_too(tmp_path):
    Image.new("1", (2000, 2000)).save(tmp_path / "0.png")
    for i in range(1, 20):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(ValueError, match=rf"{tmp_path}: its data must take at most"):
        data.load(tmp_path)


def test_a_pickle_is_walked_through_before_it_is_read():
    with pytest.raises(ValueError, match="numbers an object 4,294,967,295"):
        untrusted.check_pickle(b"\x80\x02]r\xff\xff\xff\xff.")
    with pytest.raises(ValueError, match="at most 1,048,576 steps"):
        untrusted.check_pickle(b"\x80\x02" + b"]" * 2**21 + b".")
    with pytest.raises(ValueError, match="protocol 2 or earlier, not 4"):
        untrusted.check_pickle(pickle.dumps({"a"}, 4), protocol=2)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"a": ' * 100_000, "[1]", "3", "", "nul", '{"seed": ' + "9" * 5000 + "}"),
        *('{"arguments": {}, "dataset": {}}', "\udcff", '{"numbers": []}', '{"numbers": {"a": 1}}'),
        *('{"numbers": {"a": {"mean": "1", "se": null}}}', '{"test_elbo": true}'),
        '{"numbers": {"a": {"mean": 1' + "0" * 400 + ', "se": 0}}}',
    ],
)
def test_json_that_is_none_of_a_run(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json holds no results of a run"):
        results.read(tmp_path / "config.json")


def test_long_json_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**24 + 1)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ValueError, match=r"config\.json is damaged: its size must be at most"):
        run.read_config(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("seed", value) for value in (-1, None, "0", 0.0, True)),
        *(("data_seed", value) for value in (-1, None, [])),
        *((("dataset", name), 3) for name in ("name", "sha256", "observed")),
        *((("arguments", name), 3) for name in ("dataset", "data_root", "split")),
        *((("arguments", "split"), value) for value in ("abc", [0.5, "a", 0.1])),
        *(("dataset", "digits"), ("arguments", None), ("versions", [])),
    ],
)
def test_a_configuration_of_wrong_types_is_damaged(tmp_path, place, value):
    config = json.loads(json.dumps(reliability._CONFIG))
    run.write_json(tmp_path / "config.json", config)
    assert run.read_config(tmp_path) == config
    if isinstance(place, tuple):
        config[place[0]][place[1]] = value
    else:
        config[place] = value
    run.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run.read_config(tmp_path)


# ---- IDX packed by gzip ----


def test_packed_files_are_read_as_the_plain_ones(tmp_path):
    for part, count in (("train", 12), ("t10k", 4)):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        images = struct.pack(">4I", 0x803, count, 2, 2) + bytes(range(4 * count))
        labels = struct.pack(">2I", 0x801, count) + bytes(range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    plain = data.load("mnist", tmp_path, download=False)
    for path in raw.iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert data.load("mnist", tmp_path, download=False).sha256 == plain.sha256


# ---- at the command line ----


def refused(capsys, main, *argv) -> str:
    """Runs a program that must refuse; returns the one line that a user sees."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.run_main(partial(main, argv))
    signal.signal(signal.SIGTERM, before)
    (line, _), more = str(stop.value.code).splitlines(), capsys.readouterr().err
    assert "Traceback" not in line + more
    return line


@pytest.mark.parametrize("name", ["npy", "npz", "pictures"])
def test_the_command_line_says_what_is_wrong_with_a_data_set(tmp_path, capsys, name):
    kind = reliability.FORMATS[name]
    draw = np.random.default_rng(0)
    path = tmp_path / kind.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(kind.valid(draw)[:-9])
    given = path.parent if name == "pictures" else path
    assert path.name in refused(capsys, example("mnist_svi").main, "--dataset", str(given))


def test_the_command_line_says_what_is_wrong_with_a_run(tmp_path, capsys):
    evaluate = partial(refused, capsys, evaluation.main, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in evaluate()
    digits = data.load("digits")
    of_data = {"name": "digits", "sha256": digits.sha256, "observed": "dynamic"}
    config = {"arguments": {"dataset": "digits"}, "dataset": of_data, "seed": 0}
    run.write_json(tmp_path / "config.json", config)
    assert "no checkpoint at" in evaluate()
    (tmp_path / "best.pt").write_bytes(reliability._KEPT[:-99])
    assert "best.pt cannot be read as a checkpoint" in evaluate()
    state = reliability._STATE
    checkpoint.write(tmp_path / "best.pt", {**state, "recipe": {**state["recipe"], "hidden": 9**9}})
    assert "best.pt holds a recipe that cannot be used" in evaluate()
