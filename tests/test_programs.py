"""The pair as plain Pyro: stock tools work on it, and no two pairs ever share parameters."""

import copy
import gc
import itertools
import pickle
import subprocess
import sys

import pyro
import pytest
import torch
from conftest import PAIRS, SHAPES, images, tiny
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pvae
from pvae import Guide, Model, SingleOptimizer, captured, crosscheck, evaluate
from pvae.heads import FullCovariance, Normal, NormalFixedScale
from pvae.objectives import MeanField
from pvae.priors import StandardNormal
from pvae.programs import LadderGuide

X = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def stock_svi(vae, lr=5e-3):
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())


def single_svi(vae, lr=5e-3):
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=lr))
    return SVI(vae.model, vae.guide, adam, Trace_ELBO())


def weights(vae):
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def moved(vae, before):
    return [name for name, p in vae.named_parameters() if not torch.equal(p, before[name])]


# ---- stock Pyro tools ----


# each pair once, the shapes and the optimizers taking turns; all four of each are slow
TURNS = [
    pytest.param(*case, marks=[] if number % 4 == number // 4 % 4 else pytest.mark.slow)
    for number, case in enumerate(itertools.product(PAIRS, SHAPES, [stock_svi, single_svi]))
]


@pytest.mark.parametrize(("pair", "shape", "make_svi"), TURNS)
def test_every_trainable_tensor_moves_and_the_loss_falls(pair, shape, make_svi):
    vae, x = tiny(*pair, shape), images(pair[0], shape).float()
    before, svi = weights(vae), make_svi(vae)

    def losses():
        """50 losses, at the same noise whenever this is called."""
        with evaluate.fixed_noise("cpu", 7):
            return torch.tensor([svi.evaluate_loss(x) for _ in range(50)])

    at_first = losses()
    for _ in range(30):
        svi.step(x)
    assert set(moved(vae, before)) == set(before)
    fall = at_first - losses()
    assert fall.mean() > 5 * fall.std() / 50**0.5


def test_stock_adam_and_the_single_optimizer_take_the_same_steps():
    vae = tiny()
    twin = copy.deepcopy(vae)
    for pair, make in ((vae, stock_svi), (twin, single_svi)):
        torch.manual_seed(1)
        svi = make(pair)
        for _ in range(5):
            svi.step(X)
    for p, q in zip(vae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_elbo_module(elbo):
    vae = tiny()
    loss = elbo(vae.model, vae.guide)(X)
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_renyi_elbo_trains():
    vae = tiny()
    before = weights(vae)
    objective = RenyiELBO(0, 5, vectorize_particles=True, max_plate_nesting=1)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), objective).step(X)
    assert set(moved(vae, before)) == set(before)


def test_trace_has_the_sites_and_plate_of_the_contract():
    vae = tiny()
    trace = poutine.trace(vae.model).get_trace(X)
    trace.compute_log_prob()
    assert trace.stochastic_nodes == ["data", "z"]
    assert trace.observation_nodes == ["x"]
    assert trace.nodes["z"]["value"].shape == (6, 3)
    assert trace.nodes["x"]["log_prob"].shape == (6,)


def test_predictive_from_the_prior_and_from_the_posterior():
    vae = tiny()
    prior = Predictive(vae.model, num_samples=4)(size=3)
    assert prior["x"].shape == (4, 3, 1, 8, 8)
    assert prior["z"].shape == (4, 3, 3)
    # given data, Predictive hands back the data; unconditioned, it draws new images
    echo = Predictive(vae.model, guide=vae.guide, num_samples=4)(X)
    assert all(torch.equal(x, X) for x in echo["x"])
    new = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=4)(X)
    assert new["x"].shape == (4, 6, 1, 8, 8)
    assert not torch.equal(new["x"][0], X)


def test_render_model():
    pytest.importorskip("graphviz")
    assert "z" in pyro.render_model(tiny().model, model_args=(X,)).source


def test_frozen_parameters_stay_and_the_rest_trains():
    vae = tiny()
    for p in vae.guide.parameters():
        p.requires_grad_(False)
    vae.guide.eval()  # pyro.module warns of frozen parameters in train mode
    before = weights(vae)
    stock_svi(vae).step(X)
    assert set(moved(vae, before)) == {name for name in before if name.startswith("model")}


# ---- the traps of a global parameter store ----


def test_channels_last_weights_train():
    vae = tiny().to(memory_format=torch.channels_last)
    for make in (stock_svi, single_svi):
        before = weights(vae)
        make(vae).step(X)
        assert set(moved(vae, before)) == set(before)


def test_replaced_parameters_train():
    """load_state_dict(assign=True) puts new parameters where Pyro knows the old ones."""
    vae = tiny()
    stock_svi(vae).step(X)
    vae.load_state_dict({n: t.clone() for n, t in vae.state_dict().items()}, assign=True)
    before = weights(vae)
    stock_svi(vae).step(X)
    assert set(moved(vae, before)) == set(before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_of_another_memory_layout_steps_the_right_weights(fused):
    """torch's fused Adam pairs elements by their order in memory: wrong for mixed layouts."""
    weight = nn.Parameter(torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last))
    twin = nn.Parameter(weight.detach().clone())
    adam = SingleOptimizer(torch.optim.Adam([weight], fused=fused))
    plain = torch.optim.Adam([twin], foreach=False)
    for _ in range(3):
        weight.grad = torch.randn(4, 6, 3, 3)
        twin.grad = weight.grad.clone()
        adam({weight})
        plain.step()
        torch.testing.assert_close(weight, twin)


def test_single_optimizer_refuses_parameters_that_it_does_not_hold():
    vae, other = tiny(), tiny()
    adam = SingleOptimizer(torch.optim.Adam(other.parameters()))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    with pytest.raises(ValueError, match="does not hold"):
        svi.step(X)


@pytest.mark.parametrize("make_svi", [stock_svi, single_svi])
def test_two_pairs_trained_in_turn_are_each_as_if_alone(make_svi):
    def train(in_turn):
        torch.manual_seed(0)
        pairs = [tiny(), tiny()]
        svis = [make_svi(pair) for pair in pairs]
        states = [torch.random.manual_seed(s).get_state() for s in (1, 2)]
        order = [0, 1] * 4 if in_turn else [0] * 4 + [1] * 4
        for which in order:
            torch.set_rng_state(states[which])
            svis[which].step(X)
            states[which] = torch.get_rng_state()
        return [weights(pair) for pair in pairs]

    for alone, together in zip(train(False), train(True), strict=True):
        assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_copy_trains_on_its_own(duplicate):
    vae = tiny()
    stock_svi(vae).step(X)  # a parameter that Pyro has seen carries a weak reference
    copied = duplicate(vae)
    original, same = weights(vae), weights(copied)
    assert all(torch.equal(original[name], same[name]) for name in same)
    stock_svi(copied).step(X)
    assert set(moved(copied, same)) == set(same)
    assert moved(vae, original) == []
    stock_svi(vae).step(X)
    assert set(moved(vae, original)) == set(original)
    # the copy's oracle looks at the copy
    z = torch.zeros(6, 3)
    torch.testing.assert_close(
        copied.terms(X, {"z": z}).elbo_sampled(),
        copied.decode(z).log_prob(X)
        - copied.encode(X).log_prob(z)
        + copied.model.prior().log_prob(z),
    )


def test_names_leave_the_store_with_the_object():
    gc.collect()
    vae, kept = tiny(), tiny()
    for pair in (vae, kept):
        stock_svi(pair).step(X)
    names = set(pyro.get_param_store())
    del vae, pair
    gc.collect()
    left = set(pyro.get_param_store())
    gone = names - left
    assert len(gone) == len(list(kept.parameters()))
    before = weights(kept)
    stock_svi(kept).step(X)
    assert set(moved(kept, before)) == set(before)
    assert set(pyro.get_param_store()) == left


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_module_shared_by_two_programs_stays_with_the_one_that_is_left():
    gc.collect()
    vae = tiny()
    shared = Guide(vae.guide.posterior)
    stock_svi(vae).step(X)
    shared(X)
    names = set(pyro.get_param_store())
    del shared
    gc.collect()
    store = pyro.get_param_store()
    assert len(names - set(store)) == len(list(vae.guide.parameters()))
    assert {store.param_name(p) for p in vae.parameters()} <= set(store)
    before = weights(vae)
    stock_svi(vae).step(X)
    assert set(moved(vae, before)) == set(before)


def test_clearing_the_store_does_not_untrain_or_freeze():
    vae = tiny()
    svi = stock_svi(vae)
    svi.step(X)
    before = weights(vae)
    pyro.clear_param_store()
    assert moved(vae, before) == []
    svi.step(X)
    assert set(moved(vae, before)) == set(before)


def test_constructors_change_nothing_global():
    tiny()
    torch.manual_seed(3)
    store = list(pyro.get_param_store())
    settings = pyro.settings.get()
    Model(StandardNormal(2), nn.Identity())
    Guide(nn.Identity())
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(3).get_state())
    assert list(pyro.get_param_store()) == store
    assert pyro.settings.get() == settings


def test_a_pair_goes_on_in_a_new_process(tmp_path):
    vae = tiny()
    stock_svi(vae).step(X)
    torch.save((vae, X), tmp_path / "pair.pt")
    code = (
        "import sys, torch, pyro, pvae\n"
        "from pyro.infer import SVI, Trace_ELBO\n"
        "other = pvae.build((1, 8, 8), 3, hidden=16)\n"
        "vae, x = torch.load(sys.argv[1], weights_only=False)\n"
        "before = {n: p.detach().clone() for n, p in vae.named_parameters()}\n"
        "adam = pyro.optim.Adam({'lr': 1e-2})\n"
        "for pair in (other, vae):\n"
        "    SVI(pair.model, pair.guide, adam, Trace_ELBO()).step(x)\n"
        "assert all((p != before[n]).any() for n, p in vae.named_parameters())\n"
        "assert vae.guide._unique_name != other.guide._unique_name\n"
        "print(before['guide.posterior.net.layers.0.weight'].sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pair.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    total = vae.guide.posterior.net.layers[0].weight.sum().item()
    assert float(done.stdout) == pytest.approx(total, abs=1e-6)


# ---- by hand ----


def test_one_factor_for_each_datum():
    """q(z | index): each image's own loc and scale, the model untouched."""
    vae = tiny()
    posterior = pvae.Conditional(nn.Embedding(10, 6), Normal((3,)), event_dim=0)
    guide = Guide(posterior)
    before = posterior.net.weight.detach().clone()
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(X, index=torch.tensor([1, 2, 3, 4, 5, 7]))
    changed = (posterior.net.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 7]


def test_plain_sequentials_are_a_pair():
    model = Model(StandardNormal(2), nn.Sequential(nn.Linear(2, 5), NormalFixedScale((5,))))
    guide = Guide(nn.Sequential(nn.Linear(5, 4), Normal((2,))))
    vae = pvae.VAE(model, guide)
    assert stock_svi(vae).step(torch.rand(3, 5)) > 0
    assert vae.sample(4).shape == (4, 5)


# ---- the ladder: a guide that shares the model's path ----

DIMS = (3, 4, 2)


def normal(in_dim, dim, join=None):
    classes = 0 if join is None else join.num_classes
    return pvae.Conditional(
        nn.Linear(in_dim + classes, 2 * dim), Normal((dim,)), event_dim=1, join=join
    )


def ladder(labels=False):
    join = pvae.ConcatLabel(2) if labels else None
    model = pvae.build((1, 8, 8), DIMS, "mlp", hidden=8, num_classes=2 if labels else None).model
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh())
    up = [first, *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in DIMS[1:])]
    if labels:  # a label joins where the estimates are made
        up = [WithoutLabel(net) for net in up]
    return pvae.VAE(model, LadderGuide(model, up, [normal(8, dim, join) for dim in DIMS]))


class WithoutLabel(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, v, y):
        return self.net(v)


def test_a_ladder_multiplies_the_models_priors_with_what_the_data_say():
    """log q - log p(z1 | z2) - log r(z1) is one number for every z1, and q integrates to 1."""
    vae = ladder().double()
    x, z2 = X.double(), torch.randn(6, 4).double()
    z = {"z1": torch.randn(50, 6, 3).double(), "z2": z2, "z3": torch.randn(6, 2).double()}
    d = x
    estimates = []
    for up, estimate in zip(vae.guide.up, vae.guide.estimates, strict=True):
        d = up(d)
        estimates.append(estimate(d))
    log_q = vae.guide.densities(x, z)
    rest = log_q["z1"] - vae.model.prior(z2).log_prob(z["z1"]) - estimates[0].log_prob(z["z1"])
    torch.testing.assert_close(rest, rest[:1].expand(50, 6))
    torch.testing.assert_close(log_q["z3"], estimates[2].log_prob(z["z3"]))
    # the factor of two normals' product: N(m; m', s^2 + s'^2) for each unit
    p, r = vae.model.prior(z2).base_dist, estimates[0].base_dist
    overlap = torch.distributions.Normal(r.loc, (p.scale**2 + r.scale**2).sqrt())
    torch.testing.assert_close(rest[0], -overlap.log_prob(p.loc).sum(-1))


@pytest.mark.parametrize("labels", [False, True])
def test_a_ladder_trains_captured_or_not(labels):
    args = (X, torch.tensor([0, 1, 1, 0, 0, 1])) if labels else (X,)
    trained = []
    for make in (SVI, captured.SVI):
        torch.manual_seed(0)
        pyro.clear_param_store()
        vae = ladder(labels)
        assert vae.takes_y == labels
        before = weights(vae)
        adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
        options = {} if make is SVI else {"strict": True, "compiler": captured.as_traced}
        svi = make(vae.model, vae.guide, adam, Trace_ELBO(), **options)
        check = crosscheck.cross_check(svi, vae, *args)
        assert check.relative < 1e-5
        losses = [svi.step(*args) for _ in range(40)]
        assert set(moved(vae, before)) == set(before)
        assert sum(losses[-5:]) < sum(losses[:5])
        trained.append(losses)
    assert svi.engine == "captured"
    assert trained[0] == pytest.approx(trained[1], rel=1e-3)


@pytest.mark.parametrize("guide", ["normal", "ladder"])
def test_a_unit_that_the_layer_above_determines_has_gradients(guide):
    vae = pvae.build((1, 8, 8), DIMS, "mlp", hidden=8, guide=guide)
    with torch.no_grad():
        vae.model.prior.net.out.bias[DIMS[0] :] = -100.0  # log variances of p(z1 | z2)
        if guide == "ladder":  # q(z1 | z2, x) is as narrow
            vae.guide.estimates[0].net.out.bias[DIMS[0] :] = 20.0
        else:
            vae.guide.posterior.net.out.bias[DIMS[0] :] = -10.0
    Trace_ELBO().loss_and_grads(vae.model, vae.guide, X)
    assert all(p.grad.isfinite().all() for p in vae.parameters())


def test_a_ladder_draws_in_the_models_order():
    """So the mean-field ELBO, wrong on a guide from below, is the ELBO here."""
    vae = ladder().double()
    trace = poutine.trace(vae.guide).get_trace(X.double())
    assert trace.stochastic_nodes == ["data", "z3", "z2", "z1"]
    many = {"vectorize_particles": True, "max_plate_nesting": 1}
    one, two = (
        torch.tensor([elbo(2000, **many).loss(vae.model, vae.guide, X.double()) for _ in range(5)])
        for elbo in (Trace_ELBO, MeanField)
    )
    assert (one.mean() - two.mean()).abs() < 5 * ((one.var() + two.var()) / 5).sqrt()
    # of KLs site by site there is no loss by hand, so none that would fail a run
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), MeanField())
    assert crosscheck.cross_check(svi, vae, X.double()).against == crosscheck.NOTHING


def test_a_ladder_reconstructs_copies_and_keeps_what_it_shares():
    vae = copy.deepcopy(ladder())
    assert vae.guide.priors[-1] is vae.model.prior
    torch.testing.assert_close(vae.reconstruct(X), vae.decode(vae.encode(X).mean).mean)
    assert vae.encode(X).batch_shape == (6,)


def test_what_is_no_ladder_is_refused():
    vae = ladder()
    up, estimates = list(vae.guide.up), list(vae.guide.estimates)
    with pytest.raises(ValueError, match=r"up must be 3 modules, one for each layer.*not 2"):
        LadderGuide(vae.model, up[:2], estimates)
    with pytest.raises(ValueError, match=r"estimates must be 3 modules, one for each layer.*not 1"):
        LadderGuide(vae.model, up, estimates[:1])
    full = pvae.Conditional(nn.Linear(8, 9), FullCovariance((3,)), event_dim=1)
    with pytest.raises(ValueError, match="must be diagonal normals, not a Multi"):
        LadderGuide(vae.model, up, [full, *estimates[1:]])(X)


# ---- bad input ----


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "dtype torch.uint8"),
        (torch.zeros(0, 1, 8, 8), r"shape \(0, 1, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8), r"\(1, 8, 8\) each.*\(3, 8, 8\)"),
        (torch.zeros(4, 1, 8, 9), r"\(1, 8, 8\) each.*\(1, 8, 9\)"),
        (torch.full((4, 1, 8, 8), float("nan")), "nan"),
        (torch.full((4, 1, 8, 8), 0.5), "support"),
    ],
)
def test_bad_batches_are_refused_in_training(x, message):
    vae = tiny()
    before = weights(vae)
    with pytest.raises(ValueError, match=message):
        stock_svi(vae).step(x)
    assert moved(vae, before) == []


def test_the_model_refuses_images_that_are_not_its_likelihoods():
    vae = tiny()
    with pytest.raises(ValueError, match=r"\(1, 8, 9\).*\(1, 8, 8\)"):
        vae.model(torch.zeros(4, 1, 8, 9))


def test_the_guide_needs_data():
    with pytest.raises(ValueError, match="x is missing"):
        tiny().guide(size=3)


def test_labels_are_refused_where_none_are_used():
    vae, y = tiny(), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="takes no labels"):
        stock_svi(vae).step(X, y)
