"""Averaged weights, weight decay, dropout and patience; the published tables and their pixels."""

import math
import signal
from functools import partial
from pathlib import Path

import likelihood
import numpy as np
import pytest
import torch
from conftest import tiny
from test_resume import same_end, stopping_at
from test_train import DIGITS, new_trainer, tensors
from torch import nn

import pvae
from pvae import build, captured, checkpoint, evaluate
from pvae.averaging import Average
from pvae.data import observe
from pvae.optim import decay_groups
from pvae.stopping import Stopped
from pvae.study import start
from pvae.untrusted import read_json


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_an_average_is_the_sum_over_its_weights(decay):
    """The average is `a_T = sum_t (1 - d_t) prod_{s > t} d_s w_t`, `d_0 = 0`, w_0 at the start."""
    net = nn.Linear(3, 2)
    average = Average(net, decay)
    weights = [net.weight.detach().clone()]
    for step in range(12):
        nn.init.normal_(net.weight)
        average.update(step)
        weights.append(net.weight.detach().clone())
    d = [0.0, *(min(decay, t / (t + 9)) for t in range(1, 13))]
    expected = sum((1 - d[t]) * math.prod(d[t + 1 :]) * weights[t] for t in range(13))
    with average.in_place():
        torch.testing.assert_close(net.weight.detach(), expected)
    assert torch.equal(net.weight, weights[-1])


@pytest.mark.parametrize("prior", ["standard_normal", "vamp", "coupling"])
def test_weights_are_exchanged_and_come_back_bit_for_bit(prior):
    """The VampPrior is a case of its own: its encoder is in the guide and in the prior."""
    vae = build((1, 8, 8), 2, net="mlp", hidden=4, prior=prior)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    average = Average(vae, 0.9)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(1.0)
    after = {name: t.clone() for name, t in vae.state_dict().items()}
    with average.in_place():
        assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())
    assert all(torch.equal(t, after[name]) for name, t in vae.state_dict().items())
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert all(torch.equal(t, after[name]) for name, t in vae.state_dict().items())


def test_a_run_with_averaged_weights_goes_on_bit_for_bit(tmp_path):
    options = {"ema": 0.9, "patience": 3}
    whole = new_trainer(**options)
    whole.fit()
    trainer = stopping_at(
        new_trainer(tmp_path, **options), 4, lambda: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(Stopped):
        trainer.fit()
    resumed = new_trainer(tmp_path, seed=99, **options)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit()
    same_end(resumed, whole)
    for one, other in zip(*(t.average.state().values() for t in (resumed, whole)), strict=True):
        assert torch.equal(one, other)


def test_the_average_is_what_is_validated_kept_and_shown(tmp_path):
    seen = []
    trainer = new_trainer(
        tmp_path, ema=0.9, on_epoch=lambda trainer: seen.append(tensors(trainer)), epochs=1
    )
    trainer.fit()
    raw = tensors(trainer)
    kept = checkpoint.read(tmp_path / "best.pt")["model"]
    assert all(torch.equal(t, kept[name]) for name, t in seen[0].items())
    assert not all(torch.equal(t, kept[name]) for name, t in raw.items())
    trainer.restore_best()
    split = trainer.data.validation
    again = evaluate.over(
        split,
        lambda x, _: evaluate.elbo(trainer.vae.model, trainer.vae.guide, x).elbo,
        batch_size=500,
        seed=trainer.seed,
    )
    assert again.mean().item() == pytest.approx(trainer.history[0]["validation_elbo"], abs=1e-4)


def test_averaging_leaves_training_as_it_is():
    final = []
    for ema in (None, 0.9):
        trainer = new_trainer(ema=ema, epochs=2)
        trainer.fit()
        final.append(tensors(trainer))
    assert all(torch.equal(t, final[0][name]) for name, t in final[1].items())


def test_patience_ends_a_run(monkeypatch, capsys):
    elbos = iter([-3.0, -1.0, -2.0, -1.5, 0.0])
    trainer = new_trainer(epochs=5, patience=2, quiet=False)
    monkeypatch.setattr(trainer, "_validate", lambda: NUMBERS | {"validation_elbo": next(elbos)})
    trainer.fit()
    assert trainer.epoch == 4
    assert trainer.best["epoch"] == 2
    assert "no better validation ELBO for 2 epochs: stopped" in capsys.readouterr().out


NUMBERS = {"validation_reconstruction": 0.0, "validation_kl": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "ema must be a decay of at least 0 and below 1, not 1.0"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(**options)


def test_weights_decay_and_biases_do_not():
    """If the gradient is 0, a step of AdamW is `w <- w - rate decay w`."""
    vae = tiny()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for p in vae.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(decay_groups(vae, 0.5), lr=0.1).step()
    for name, p in vae.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() > 1 else 1.0))


def test_dropout_is_of_what_the_encoder_takes(tmp_path):
    """Each call in train mode leaves out other pixels; eval mode equals a pair without dropout."""
    x, pairs = torch.rand(5, 1, 8, 8), []
    for dropout in (None, 0.5):
        torch.manual_seed(0)
        pairs.append(build((1, 8, 8), 2, net="conv", hidden=4, dropout=dropout))
    plain, pair = pairs
    codes = [pair.encode(x).mean for _ in range(2)]
    assert not torch.equal(*codes)
    pair.eval()
    assert torch.equal(pair.encode(x).mean, plain.encode(x).mean)
    pvae.save(pair, tmp_path / "pair.pt")
    again = pvae.load(tmp_path / "pair.pt")
    assert again.recipe.dropout == 0.5
    assert torch.equal(again.eval().encode(x).mean, plain.encode(x).mean)


@pytest.mark.parametrize("dropout", [1.0, -0.1, True, "a"])
def test_dropout_out_of_its_range(dropout):
    with pytest.raises(ValueError, match="dropout must be a share of at least 0 and below 1, not"):
        build((1, 8, 8), 2, dropout=dropout)


# ---- the published tables ----


def test_the_published_draw_is_numpys_of_validation_then_test():
    observed = observe(DIGITS, "dynamic", numpy_seed=777)
    np.random.seed(777)  # noqa: NPY002 (what the papers' code does)
    for name in ("validation", "test"):
        grey = getattr(DIGITS, name).images.numpy() / np.float32(255)
        drawn = np.random.binomial(1, grey)  # noqa: NPY002
        assert np.array_equal(getattr(observed, name).images.numpy(), drawn * 255)
    assert observed.train is DIGITS.train
    assert observed.redraw is not None


@pytest.mark.parametrize("how", ["grey", "threshold", "dequantized"])
def test_the_published_draw_is_of_binary_pixels(how):
    with pytest.raises(ValueError, match=f"numpy_seed must be None, not 777.* observed as {how}"):
        observe(DIGITS, how, numpy_seed=777)


def test_every_row_of_the_tables_builds_its_pair():
    for row in likelihood.ROWS.values():
        vae = row.pair(torch.full((1, 28, 28), 0.1))
        assert vae.sample(2).shape == (2, 1, 28, 28)
        assert row.number in ("log_evidence", "elbo")


def test_stages_follow_one_another_and_are_taken_over(tmp_path, monkeypatch, capsys):
    def pair(mean_image):
        made = pvae.build(tuple(mean_image.shape), likelihood.LATENT, "mlp", hidden=8)
        return pvae.VAE(made.model, made.guide)  # no recipe: a stage replaces the prior

    first = likelihood.Stage(1, 1e-3)
    row = likelihood.ROWS["1"]._replace(
        pair=pair,
        stages={
            "pair": first,
            "flow": first._replace(change=likelihood.with_flow),
            "guide": first._replace(
                objective="dreg", particles=2, trains=lambda vae: vae.guide, chosen=False
            ),
        },
    )
    monkeypatch.setitem(likelihood.ROWS, "1", row)

    def start_of(folder, *more):
        args = likelihood.arguments(
            ["1", "--dataset", "digits", "--quiet", "--out", str(folder), *more]
        )
        args.engine = "eager"
        return start(args, "row", row.observe)

    def trained(folder, *more):
        study = start_of(folder, *more)
        args = study.args
        if args.start_from:
            study = likelihood.with_stages_of(Path(args.start_from), row, study)
        vae, states = row.pair(study.dataset.mean_image), []
        for name, stage in row.stages.items():
            likelihood.train(stage, vae, likelihood.part(study, name, stage))
            states.append({name: t.clone() for name, t in vae.state_dict().items()})
        return states

    plain, flow, guide = trained(tmp_path / "a")
    assert not any("model.prior" in name for name in plain)
    assert any("model.prior" in name for name in flow)
    for name, tensor in guide.items():
        assert torch.equal(tensor, flow[name]) == name.startswith("model."), name
    again = trained(tmp_path / "b", "--start-from", str(tmp_path / "a"))
    assert all(torch.equal(t, guide[name]) for name, t in again[-1].items())
    metrics = [(tmp_path / run / "guide" / "metrics.csv").read_text() for run in "ab"]
    assert metrics[0] == metrics[1]  # also the column of time: no epoch ran again
    (tmp_path / "a" / "flow").rename(tmp_path / "a" / "layer")
    study = start_of(tmp_path / "d")
    likelihood.with_stages_of(tmp_path / "a", row, study)
    assert {p.name for p in study.folder.iterdir() if p.is_dir()} == {"pair"}
    with pytest.raises(SystemExit):
        trained(tmp_path / "c", "--start-from", str(tmp_path / "nowhere"))
    assert "--start-from" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_page_shows_the_table_of_the_runs():
    root = Path(pvae.__file__).parent.parent
    files = sorted((root / "benchmarks" / "tables").glob("*.json"))
    assert (
        likelihood.table([read_json(path) for path in files])
        in (root / "docs" / "tables.md").read_text()
    )


def test_a_second_layer_starts_at_the_prior_of_before():
    vae, x = likelihood.ROWS["5"].pair(torch.full((1, 28, 28), 0.1)), torch.ones(3, 1, 28, 28)
    z = {"z1": torch.randn(3, likelihood.LATENT), "z2": torch.randn(3, likelihood.UPPER)}
    before, own = vae.model.densities(x, {"z": z["z1"]}), set(vae.parameters())
    likelihood.with_layer(vae)
    assert set(likelihood.upper_layer(vae).parameters()) == set(vae.parameters()) - own
    after = vae.model.densities(x, z)
    torch.testing.assert_close([after["z1"], after["x"]], [before["z"], before["x"]])


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(likelihood.ROWS))
def test_a_row_goes_from_data_to_its_line(tmp_path, row, capsys, monkeypatch):
    monkeypatch.setattr(likelihood, "PART", 100)
    monkeypatch.setattr(likelihood, "CHECKED", 20)
    few = {"annealed_images": 2, "temperatures": 3}
    monkeypatch.setattr(likelihood, "ANNEALED", likelihood.ANNEALED | few)
    monkeypatch.setattr(likelihood, "PROPOSALS", {"num_samples": 5, "proposal_steps": 2})
    if row != "2":  # to compile every stage of every row would take minutes
        traced = partial(captured.SVI, compiler=captured.as_traced)
        monkeypatch.setattr(likelihood, "engine", lambda study: traced)
        monkeypatch.setattr(captured, "inductor", captured.as_traced)
    made = likelihood.ROWS[row]
    stages = {  # 50 particles would take minutes
        name: stage._replace(particles=min(stage.particles, 2))
        for name, stage in made.stages.items()
    }
    monkeypatch.setitem(likelihood.ROWS, row, made._replace(stages=stages))
    argv = [row, "--dataset", "digits", "--epochs", "1", "--num-samples", "2", "--quiet"]
    likelihood.main([*argv, "--out", str(tmp_path / "run")])
    assert f"| {row}: " in capsys.readouterr().out
    likelihood.main(["--resume", str(tmp_path / "run")])
    line = capsys.readouterr().out.splitlines()[-2]
    likelihood.main(["table", str(tmp_path / "run" / "results.json")])
    assert capsys.readouterr().out.splitlines()[-1] == line
