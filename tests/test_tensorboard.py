"""The log for TensorBoard: each epoch once, also if resumed; the error without the package."""

import sys

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import report
from pvae.data import Dataset, Split, observe
from pvae.train import Trainer


def trainer(folder, on_epoch):
    pyro.set_rng_seed(0)
    x = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8)
    data = observe(Dataset("made", *[Split(x, None)] * 3, ""), "dynamic")
    vae = pvae.build((1, 8, 8), 2, "mlp", hidden=8)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(torch.optim.Adam(vae.parameters())), elbo)
    log = on_epoch(data, folder, 4)
    return Trainer(vae, svi, data, epochs=4, batch_size=12, folder=folder, on_epoch=log, quiet=True)


elbo = Trace_ELBO()


def test_without_the_package_it_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"--tensorboard needs .* extra \[tensorboard\] brings"):
        report.tensorboard(None, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised in tensorboard and protobuf
def test_a_resumed_run_goes_on_in_the_same_log(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = trainer(tmp_path, report.tensorboard)
    first.fit(until=2)
    at_two = (tmp_path / "checkpoint.pt").read_bytes()
    first.fit(until=3)  # logged, but the resumed run starts before this epoch
    (tmp_path / "checkpoint.pt").write_bytes(at_two)
    second = trainer(tmp_path, report.tensorboard)
    second.resume(tmp_path / "checkpoint.pt")
    second.fit()

    read = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    read.Reload()
    tags = read.Tags()
    assert set(second.history[-1]) == set(tags["scalars"])
    for name in ("validation_elbo", "train_objective", "beta"):
        events = read.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3, 4]
        wanted = [row[name] for row in second.history]
        assert [event.value for event in events] == pytest.approx(wanted, rel=1e-6)
    assert set(tags["images"]) == {"reconstructions", "samples"}
    for name, height in (("reconstructions", 2 * 10 + 2), ("samples", 10 + 2)):
        images = read.Images(name)
        assert [image.step for image in images] == [1, 2, 3, 4]
        assert (images[0].height, images[0].width) == (height, 16 * 10 + 2)
