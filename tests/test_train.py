"""The Trainer: resuming, the cross-check, the files that it keeps, and errors that stop a run."""

import csv
import math
from dataclasses import replace

import pyro
import pytest
import torch
from conftest import images, tiny
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from torch import nn

from pvae import VAE, Conditional, Guide, Model, SingleOptimizer, build, checkpoint, evaluate, load
from pvae.builder import LIKELIHOODS
from pvae.compatible import check_data
from pvae.crosscheck import DENSITIES, FORMULAS, NOTHING, Check, cross_check
from pvae.data import Observed, Split, load as load_data, observe
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal
from pvae.schedule import Schedule
from pvae.train import Trainer, TrainingFailed

DIGITS = load_data("digits")


def small(how="dynamic"):
    few = replace(
        DIGITS,
        train=DIGITS.train.first(250),
        validation=DIGITS.validation.first(100),
        test=DIGITS.test.first(50),
    )
    return observe(few, how)


def new_trainer(folder=None, *, seed=0, net="mlp", objective="trace_elbo", vae=None, **options):
    torch.manual_seed(seed)
    vae = vae or build((1, 28, 28), 3, net, hidden=16).to(memory_format=torch.channels_last)
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True))
    svi = SVI(vae.model, vae.guide, adam, OBJECTIVES[objective].elbo(1))
    schedule = Schedule(kl_warmup=0.3, lr_warmup=0.1)
    defaults = {"epochs": 4, "batch_size": 100, "schedule": schedule, "quiet": True}
    return Trainer(vae, svi, small(), folder=folder, **(defaults | options))


def tensors(trainer):
    return {name: t.clone() for name, t in trainer.vae.state_dict().items()}


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize(
    ("where", "net"),
    [
        ("between epochs", "mlp"),
        pytest.param("between epochs", "conv", marks=pytest.mark.slow),
        ("within an epoch", "mlp"),
        pytest.param("within an epoch", "conv", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, net, where):
    whole = new_trainer(net=net)
    whole.fit()

    def stop(*_):
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    trainer = new_trainer(tmp_path, net=net, go_on=f"--resume {tmp_path}")
    if where == "between epochs":
        trainer.on_epoch = stop
    else:
        step, trainer.svi.step = trainer.svi.step, lambda *a: (stop(), step(*a))[1]
    with pytest.raises(KeyboardInterrupt, match=rf"after epoch 2.* go on by --resume {tmp_path}"):
        trainer.fit()

    resumed = new_trainer(tmp_path, net=net, seed=99)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.epoch == 2
    resumed.fit()
    assert without_time(resumed.history) == without_time(whole.history)
    final = tensors(whole)
    assert all(torch.equal(t, final[name]) for name, t in tensors(resumed).items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_cross_check_agrees_every_epoch(objective):
    trainer = new_trainer(objective=objective)
    trainer.fit()
    for row in trainer.history:
        assert ("check_relative" in row) == (objective != "info_vae")
        assert row.get("check_relative", 0) < 1e-5
        assert abs(row["check_kl"]) < 5 * row["check_kl_se"]


@pytest.mark.parametrize("fault", ["log_likelihood", "split"])
def test_a_disagreeing_oracle_stops_the_run(fault):
    trainer = new_trainer()
    oracle = trainer.vae.oracle
    wrong = {
        "log_likelihood": lambda x, h: oracle.log_likelihood(x, h) * 1.001,
        "split": lambda h: (oracle.split(h)[0], oracle.split(h)[1] + 0.5),
    }
    trainer.vae.describe(trainer.vae.recipe, replace(oracle, **{fault: wrong[fault]}))
    with pytest.raises(TrainingFailed, match=r"the cross-check failed after epoch 1"):
        trainer.fit()


def test_a_wrong_analytic_kl_is_suspicious():
    """Check (b) finds an error that (a) cannot find: a KL formula that is wrong by 0.5."""
    trainer = new_trainer()
    terms = trainer.vae.terms
    trainer.vae.terms = lambda x, z, y=None: terms(x, z, y)._replace(kl=terms(x, z, y).kl + 0.5)
    check = cross_check(trainer.svi, trainer.vae, *trainer._checked)
    assert check.agrees
    assert check.suspicious


def test_nan_does_not_agree():
    assert not Check(math.nan, None).agrees


def test_pairs_without_an_oracle_are_checked_by_their_own_densities():
    model = Model(StandardNormal(2), Conditional(nn.Linear(2, 784), Bernoulli((784,)), event_dim=1))
    guide = Guide(Conditional(nn.Linear(784, 4), Normal((2,)), event_dim=1))
    vae = VAE(model, guide)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO())
    x = (torch.rand(20, 784) > 0.5).float()
    check = cross_check(svi, vae, x)
    assert check.agrees
    assert check.kl_difference is not None
    assert not check.suspicious


def test_a_stopped_study_says_what_is_kept_and_offers_no_resuming(tmp_path):
    def stop(trainer):
        raise KeyboardInterrupt

    trainer = new_trainer(tmp_path)
    trainer.on_epoch = stop
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.fit()
    assert "checkpoint.pt holds the state after epoch 1" in str(stopped.value)
    assert str(stopped.value).endswith("best.pt the best model so far.")
    assert "--resume" not in str(stopped.value)


def test_what_is_kept(tmp_path):
    seen = []
    trainer = new_trainer(tmp_path, on_epoch=lambda t: seen.append(tensors(t)))
    trainer.fit()
    best = checkpoint.read(tmp_path / "best.pt")
    elbos = [row["validation_elbo"] for row in trainer.history]
    assert best["epoch"] == 1 + elbos.index(max(elbos))
    for name, t in seen[best["epoch"] - 1].items():
        assert torch.equal(best["model"][name], t)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_elbo"]) for row in rows] == elbos
    again = load(tmp_path)
    assert not again.training
    assert all(torch.equal(best["model"][name], t) for name, t in again.state_dict().items())
    kept = ["best.pt", "checkpoint.previous.pt", "checkpoint.pt", "metrics.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_validation_neither_trains_nor_spends_random_numbers():
    trainer = new_trainer()
    before, state = tensors(trainer), torch.get_rng_state()
    first = trainer._validate()
    trainer._cross_check(1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer._validate() == first
    assert all(torch.equal(t, before[name]) for name, t in tensors(trainer).items())


def test_selection_is_on_the_true_elbo(monkeypatch):
    """At beta = 0 the objective is the reconstruction, but the validation ELBO includes the KL."""
    trainer = new_trainer(schedule=Schedule(beta=0.0), epochs=1)
    trainer.fit()
    (row,) = trainer.history
    assert row["beta"] == 0
    elbo = row["validation_reconstruction"] - row["validation_kl"]
    assert row["validation_elbo"] == pytest.approx(elbo, abs=1e-3)
    assert row["validation_kl"] > 1


def test_each_layer_has_its_warmup():
    """The KL of z1 has full weight from the start; that of z2 rises over 5 of the 10 steps."""
    seen = []

    class Watched(Trace_ELBO):
        def _get_trace(self, *args):
            traces = super()._get_trace(*args)
            if torch.is_grad_enabled():  # a training step, not a cross-check
                seen.append([[t.nodes[f"z{n}"]["scale"] for n in (1, 2)] for t in traces])
            return traces

    vae = build((1, 28, 28), (3, 2), "mlp", hidden=16)
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    svi = SVI(vae.model, vae.guide, adam, Watched())
    schedule = Schedule(kl_warmup=[0.0, 0.5])
    trainer = Trainer(vae, svi, small(), epochs=2, batch_size=50, schedule=schedule, quiet=True)
    trainer.fit()
    for step, scales in enumerate(seen):
        assert scales == [pytest.approx([1.0, min(1.0, step / 5)])] * 2
    assert [row["beta"] for row in trainer.history] == pytest.approx([0.8, 1.0])


def test_schedules():
    rising = Schedule(kl_warmup=0.2, lr_warmup=0.1)
    assert rising.kl_weight(0, 100) == 0
    assert rising.kl_weight(20, 100) == rising.kl_weight(99, 100) == 1
    assert Schedule(beta=4.0).kl_weight(0, 100) == 4
    factors = [rising.learning_rate_factor(s, 100) for s in range(100)]
    assert max(factors) == factors[10] == 1
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert Schedule(cosine=False).learning_rate_factor(99, 100) == 1


def test_the_mean_is_over_images_not_batches():
    split = Split(torch.arange(0, 250, 25, dtype=torch.uint8).reshape(10, 1, 1, 1), None)
    means = [
        evaluate.over(split, lambda x, y: x.flatten(1).sum(1), batch_size=b, seed=0).mean()
        for b in (3, 4, 10)
    ]
    torch.testing.assert_close(means[0], means[1])
    torch.testing.assert_close(means[0], means[2])


class Normed(nn.Module):
    """An encoder with batch normalization: its statistics are buffers, not parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        )

    def forward(self, x):
        return self.layers(x)


def test_buffers_are_kept_and_evaluation_leaves_them_alone(tmp_path):
    def vae():
        pair = build((1, 28, 28), 3, "mlp", hidden=8)
        return VAE(pair.model, Guide(Conditional(Normed(), Normal((3,)), event_dim=3)))

    trainer = new_trainer(tmp_path, vae=vae(), epochs=2)
    norm = trainer.vae.guide.posterior.net.layers[2]
    trainer.fit()
    assert norm.running_mean.abs().sum() > 0
    before = norm.running_mean.clone()
    trainer._validate()
    assert torch.equal(norm.running_mean, before)
    resumed = new_trainer(tmp_path, vae=vae(), epochs=2)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert torch.equal(resumed.vae.guide.posterior.net.layers[2].running_mean, before)


# ---- errors that stop a run ----


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro warns before our error
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_what_to_do(tmp_path, broken):
    trainer = new_trainer(tmp_path, epochs=2)

    def spoil(t):
        t.vae.model.likelihood.net.out.bias.data.fill_(broken)

    trainer.on_epoch = spoil
    with pytest.raises(TrainingFailed, match=r"(?s)epoch 2.*checkpoint.pt holds .* epoch 1"):
        trainer.fit()
    assert checkpoint.read(tmp_path / "checkpoint.pt")["model"]


def test_what_is_not_finite_behind_the_last_batch_names_no_batch():
    trainer = new_trainer(epochs=2, batch_size=128)
    for step, where in ((1, "batch 2 of 2"), (2, "behind its last batch")):
        trainer.step = step
        assert trainer._not_finite("z").startswith(f"z, at step {step} (epoch 1, {where}, learning")


class BrokenHead(Bernoulli):
    def forward(self, h):
        return super().forward(h * math.nan)


def test_a_nan_of_a_likelihood_names_its_site_before_the_run():
    likelihood = Conditional(MLP((3,), (1, 28, 28), (8,)), BrokenHead((1, 28, 28)), event_dim=1)
    vae = VAE(Model(StandardNormal(3), likelihood), build((1, 28, 28), 3, "mlp", hidden=8).guide)
    with pytest.raises((TrainingFailed, ValueError), match="site 'x' is not finite"):
        new_trainer(vae=vae)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_huge_learning_rate_ends_in_a_plain_message(tmp_path):
    trainer = new_trainer(tmp_path, schedule=Schedule())
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e30
    trainer._base_rates = [1e30]
    with pytest.raises(TrainingFailed, match=r"not finite|the loss is .*Try a smaller"):
        trainer.fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"precision": "fp16"}, "precision must be one of fp32, tf32, bf16, not 'fp16'"),
        ({"schedule": Schedule(kl_warmup=1.0)}, "kl_warmup must be a fraction .* not 1.0"),
        ({"schedule": Schedule(kl_warmup=(0.1, 0.2))}, "one for each of 1 latent .* not 2"),
        ({"schedule": Schedule(lr_warmup=-0.1)}, "lr_warmup must be a fraction .* not -0.1"),
        ({"schedule": Schedule(kl_cycles=5)}, "kl_cycles must be from 1 to the 4 epochs, not 5"),
        ({"schedule": Schedule(kl_cycles=2)}, "kl_cycles must be 1, not 2, where kl_warmup is 0"),
        ({"folder": "nowhere"}, "folder must be a folder that is there, not 'nowhere'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(**options)


def test_a_pair_that_takes_y_needs_it():
    bare = replace(small(), **{n: small().train._replace(labels=None) for n in ("train", "test")})
    vae = build((1, 28, 28), 2, "mlp", hidden=8, num_classes=10)
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    with pytest.raises(ValueError, match=r"data\.train has neither labels nor masks"):
        Trainer(vae, svi, bare, epochs=1, batch_size=10)


def test_what_does_not_belong_together_is_refused():
    vae, other = (build((1, 28, 28), 2, "mlp", hidden=8) for _ in range(2))

    def trainer(model, guide, parameters):
        adam = SingleOptimizer(torch.optim.Adam(parameters))
        return Trainer(vae, SVI(model, guide, adam, Trace_ELBO()), small(), epochs=1, batch_size=10)

    with pytest.raises(ValueError, match=r"svi\.model must be vae\.model"):
        trainer(other.model, vae.guide, vae.parameters())
    with pytest.raises(ValueError, match=r"svi\.guide must be vae\.guide"):
        trainer(vae.model, other.guide, vae.parameters())
    with pytest.raises(ValueError, match=r"it lacks guide\.posterior"):
        trainer(vae.model, vae.guide, vae.model.parameters())
    with pytest.raises(ValueError, match="it holds foreign ones"):
        trainer(vae.model, vae.guide, [*vae.parameters(), *other.parameters()])


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_every_split_has_an_image_and_the_labels_that_the_pair_takes(name):
    split = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3))
    vae, whole = build((1, 8, 8), 2, num_classes=3), Observed("grey", split, split, split, None)
    unlabelled, empty = split._replace(labels=None), Split(split.images[:0], split.labels[:0])
    for part, message in ((unlabelled, "has neither labels nor masks"), (empty, "must hold an im")):
        with pytest.raises(ValueError, match=rf"data\.{name} {message}"):
            check_data(replace(whole, **{name: part}), vae, 2)


@pytest.mark.parametrize("batch_size", [83, 1])
def test_a_batch_of_one_image_is_refused_under_batchnorm(batch_size):
    vae = build((1, 28, 28), 2, "deep")
    with pytest.raises(ValueError, match=rf"not leave one image over.* 250 .* by {batch_size} "):
        new_trainer(vae=vae, batch_size=batch_size)


class TiltedELBO(Trace_ELBO):
    """A subclass computes another loss, so it must not be compared with its base's formula."""

    def loss(self, *args, **kwargs):
        return 2 * super().loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("elbo", "against"),
    [
        (Trace_ELBO(), FORMULAS),
        (TraceMeanField_ELBO(), FORMULAS),
        (RenyiELBO(0.3, 5, vectorize_particles=True, max_plate_nesting=1), FORMULAS),
        (TiltedELBO(), NOTHING),
        (TraceTailAdaptive_ELBO(2, vectorize_particles=True, max_plate_nesting=1), NOTHING),
    ],
)
def test_the_loss_by_hand_is_that_of_the_elbos_exact_type(elbo, against):
    """Stock ELBOs are checked like the named ones; `against` says what they are compared with."""
    vae = build((1, 28, 28), 2, "mlp", hidden=8).double()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), elbo)
    check = cross_check(svi, vae, (torch.rand(20, 1, 28, 28) > 0.5).double())
    assert check.against == against
    assert (check.relative is None) == (against == NOTHING)
    assert check.relative is None or check.relative < 1e-10


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_each_likelihood_is_checked_by_the_formulas(likelihood, particles):
    """The cross-check of an untrained pair agrees for any number of draws."""
    vae, x = tiny(likelihood, net="mlp").double(), images(likelihood, (1, 8, 8))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), OBJECTIVES["trace_elbo"].elbo(particles))
    check = cross_check(svi, vae, x)
    assert check.against == FORMULAS
    assert check.relative < 1e-10
    assert not check.suspicious


def test_a_check_without_formulas_says_so():
    vae = build((1, 28, 28), 2, "mlp", guide="full_covariance", hidden=8)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO())
    check = cross_check(svi, vae, (torch.rand(20, 1, 28, 28) > 0.5).float())
    assert check.against == DENSITIES


def test_the_screen_shows_25_epochs_of_many_and_what_the_check_was(capsys):
    trainer = new_trainer(epochs=60, batch_size=250, quiet=False)
    trainer.fit()
    out = capsys.readouterr().out.splitlines()
    assert "SVI against the hand-written loss" in out[1]
    numbers = [int(line.split()[0]) for line in out[2:]]
    assert len(numbers) == 25
    assert (numbers[0], numbers[-1], len(trainer.history)) == (1, 60, 60)


def test_the_training_column_is_named_for_what_it_holds():
    assert new_trainer().objective == "ELBO"
    assert new_trainer(objective="info_vae").objective == "InfoVAE"
    assert new_trainer(schedule=Schedule(beta=4.0)).objective == "Trace_ELBO at beta = 4"


def test_stock_optimizers_are_refused_with_the_reason():
    vae = build((1, 28, 28), 2, "mlp", hidden=8)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="SingleOptimizer"):
        Trainer(vae, svi, small(), epochs=1, batch_size=10)


def test_data_outside_the_support_is_refused_before_training():
    vae = build((1, 28, 28), 2, "mlp", hidden=8)
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    with pytest.raises(ValueError, match=r"outside the likelihood's support .* Binarise"):
        Trainer(vae, svi, small("grey"), epochs=1, batch_size=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": "conv"}, r"another architecture:\n  model\.likelihood"),
        ({"ema": 0.9}, "not a checkpoint to go on from: .*average"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, options, message):
    new_trainer(tmp_path, epochs=1).fit()
    other = new_trainer(**options)
    before = tensors(other)
    with pytest.raises(ValueError, match=message):
        other.resume(tmp_path / "checkpoint.pt")
    assert all(torch.equal(t, before[name]) for name, t in tensors(other).items())
    assert other.epoch == 0
