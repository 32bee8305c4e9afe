"""A captured step has the loss and gradients of a step of stock SVI at the same noise."""

import copy
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import test_laws as laws
import torch
from conftest import CLOSED, images, tiny
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pvae
from pvae import captured, results, temper
from pvae.builder import GUIDES, LIKELIHOODS, PRIORS
from pvae.captured import NotCaptured, as_traced
from pvae.crosscheck import _Draws
from pvae.data import load, observe
from pvae.heads import Normal
from pvae.objectives import OBJECTIVES
from pvae.schedule import Schedule
from pvae.train import Trainer


class Still(pyro.optim.PyroOptim):
    """An optimizer that keeps the gradients and changes no parameter."""

    def __init__(self):
        super().__init__(torch.optim.SGD, {})

    def __call__(self, params):
        names = {p: name for name, p in pyro.get_param_store().named_parameters()}
        self.gradients = {names[p]: None if p.grad is None else p.grad.clone() for p in params}


@pytest.fixture(autouse=True)
def _clear():
    pyro.clear_param_store()


def pair(model, guide, elbo, **options):
    """Returns stock SVI and a strict captured SVI over the same pair."""
    options = {"strict": True, "compiler": as_traced, **options}
    return (
        SVI(model, guide, Still(), elbo),
        captured.SVI(model, guide, Still(), elbo, **options),
    )


def step(svi, args, seed=3):
    torch.manual_seed(seed)
    loss = svi.step(*args)
    return loss, svi.optim.gradients, torch.rand(()).item()


def assert_same(stock, ours, args, tolerance=1e-5):
    """Steps until a step is captured; the next one must equal stock SVI's at the same seed."""
    while ours.engine != "captured":
        ours.step(*args)
        assert ours.captures < 2
    loss, gradients, after = step(ours, args)
    assert ours.engine == "captured"
    expected, stock_gradients, stock_after = step(stock, args)
    # abs: a loss near 0 may be the difference of sums of some hundred nats
    assert loss == pytest.approx(expected, rel=tolerance, abs=1e-4)
    assert set(gradients) == set(stock_gradients)
    for name, g in stock_gradients.items():
        if g is None:
            assert gradients[name] is None
        else:
            assert (gradients[name] - g).norm() <= tolerance * g.norm() + 1e-12, name
    assert any(g is not None and g.norm() > 0 for g in stock_gradients.values())
    assert after == stock_after  # as many random numbers were drawn


# ---- pairs of this package ----


# the fast cases: each likelihood once, the guides in turn
SHARED_OUT = [
    pytest.param(
        likelihood, guide, marks=[] if CLOSED[i % len(CLOSED)] == guide else [pytest.mark.slow]
    )
    for i, likelihood in enumerate(LIKELIHOODS)
    for guide in CLOSED
]


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO, pytest.param(TraceMeanField_ELBO, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("likelihood", "guide"), SHARED_OUT)
def test_every_pair(likelihood, guide, elbo):
    vae, x = tiny(likelihood, guide, (3, 9, 6)), images(likelihood, (3, 9, 6)).float()
    assert_same(*pair(vae.model, vae.guide, elbo()), (x,))


CAPTURED_GUIDES = [name for name in GUIDES if name not in ("spline", "ladder", "per_datum")]


@pytest.mark.parametrize(("guide", "prior"), [*zip(CAPTURED_GUIDES, itertools.cycle(PRIORS))])
def test_every_guide_and_prior(guide, prior, x):
    classes = 4 if prior == "conditional" else None
    vae = pvae.build((1, 8, 8), 3, "mlp", "bernoulli", guide, prior, hidden=16, num_classes=classes)
    labels = () if classes is None else (torch.tensor([0, 1, 2, 3, 0, 1]),)
    assert_same(*pair(vae.model, vae.guide, Trace_ELBO()), (x, *labels))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective, x):
    vae = tiny(net="mlp")
    assert_same(*pair(vae.model, vae.guide, OBJECTIVES[objective].elbo(3)), (x,))


NOT_CAPTURED = ("spline",)


def check_combination(number, likelihood, guide, prior, conditional):
    """Compares captured with stock SVI on the combination of `test_laws` with this number."""
    torch.manual_seed(number)
    vae = laws.make(likelihood, guide, prior, conditional, number)
    args = laws.data(vae, likelihood, conditional)
    elbo = OBJECTIVES["trace_elbo"].elbo(1)
    stock, ours = pair(*laws.programs(vae, guide), elbo)
    assert_same(stock, ours, args)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_a_sample_of_the_laws_product(part):
    """Takes every 11th combination of `test_laws`, so that each part meets many others."""
    combinations = [
        (number, *c)
        for number, c in enumerate(laws.PRODUCT)
        if c[1] not in NOT_CAPTURED and laws.refusal(*c[1:]) is None
    ]
    for combination in combinations[11 * part :: 22]:
        pyro.clear_param_store()
        check_combination(*combination)


def test_a_spline_flow_is_not_captured(x):
    """A spline selects the elements within its bounds, so values decide a shape."""
    vae = tiny(guide="spline", net="mlp")
    svi = captured.SVI(vae.model, vae.guide, Still(), Trace_ELBO(), compiler=as_traced)
    svi.step(x)
    with pytest.warns(UserWarning, match="decide the shape of another, in `_monotonic"):
        svi.step(x)
    assert svi.engine == "eager"


@pytest.mark.parametrize(
    "elbo",
    [
        pytest.param(Trace_ELBO(3), marks=pytest.mark.slow),
        Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
        TraceGraph_ELBO(),
        pytest.param(RenyiELBO(0, 3), marks=pytest.mark.slow),
        pytest.param(
            RenyiELBO(0.5, 3, vectorize_particles=True, max_plate_nesting=1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_objectives_and_particles(elbo):
    vae, x = tiny(), images("bernoulli", (1, 8, 8)).float()
    assert_same(*pair(vae.model, vae.guide, elbo), (x,))


def test_labels_are_arguments():
    vae, x = pvae.build((1, 8, 8), 3, hidden=16, num_classes=4), images("bernoulli", (1, 8, 8))
    stock, ours = pair(vae.model, vae.guide, Trace_ELBO())
    assert_same(stock, ours, (x.float(), torch.tensor([0, 1, 2, 3, 0, 1])))
    assert_same(stock, ours, (x.float(), torch.tensor([3, 1, 1, 3, 0, 2])))
    assert ours.captures == 1


def test_a_module_that_model_and_guide_share_is_trained_once():
    """A parameter with two names in the store has one Pyro optimizer, which makes one step."""
    net = pvae.Conditional(nn.Linear(3, 6), Normal((3,)), event_dim=1)
    model = pvae.Model(pvae.priors.StandardNormal(3), net)
    data, twin = torch.rand(5, 3), copy.deepcopy(net)
    other = pvae.Model(pvae.priors.StandardNormal(3), twin)
    for m, n, svi, options in (
        (model, net, SVI, {}),
        (other, twin, captured.SVI, {"strict": True, "compiler": as_traced}),
    ):
        adam = pyro.optim.ClippedAdam({"lr": 1e-2})
        trained = svi(m, pvae.Guide(n), adam, Trace_ELBO(), **options)
        torch.manual_seed(0)
        for _ in range(5):
            trained.step(data)
    assert trained.engine == "captured"
    torch.testing.assert_close(twin.state_dict(), net.state_dict())


def test_one_factor_for_each_datum():
    vae, x = tiny(), images("bernoulli", (1, 8, 8)).float()
    guide = pvae.Guide(pvae.Conditional(nn.Embedding(10, 6), Normal((3,)), event_dim=0))
    stock, ours = pair(vae.model, guide, Trace_ELBO())
    for index in (torch.arange(6), torch.arange(3, 9)):
        for _ in range(3):
            ours.step(x, index=index)
        assert ours.engine == "captured"
        torch.manual_seed(3)
        loss = ours.step(x, index=index)
        torch.manual_seed(3)
        assert loss == pytest.approx(stock.step(x, index=index), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "elbo", "dtype", "tolerance"),
    [
        ("conv", Trace_ELBO(), torch.float32, 1e-5),
        ("deep", TraceMeanField_ELBO(), torch.float64, 1e-9),
        ("mlp", RenyiELBO(0, 3), torch.float64, 1e-9),
    ],
)
def test_compiled(net, elbo, dtype, tolerance):
    vae, x = tiny(shape=(1, 16, 16), net=net).to(dtype), images("bernoulli", (1, 16, 16))
    vae.to(memory_format=torch.channels_last)
    stock, ours = pair(vae.model, vae.guide, elbo, compiler=captured.inductor)
    assert_same(stock, ours, (x.to(dtype),), tolerance)


@pytest.mark.parametrize(
    "net", ["conv", *(pytest.param(net, marks=pytest.mark.slow) for net in ("deep", "mlp"))]
)
def test_the_main_examples_layout(net):
    """At 28x28 in channels_last, a graph gives a convolution's output the layout of a real run."""
    vae = pvae.build((1, 28, 28), 3, net).to(memory_format=torch.channels_last)
    x = (torch.rand(8, 1, 28, 28) > 0.5).float()
    assert_same(*pair(vae.model, vae.guide, Trace_ELBO()), (x,))


def meaningful(vae):
    """Returns the state without the biases before a BatchNorm and its running means.

    BatchNorm subtracts such a bias again, so its gradient is rounding, of which Adam makes steps.
    """
    left_out = set()
    for path, module in vae.named_modules():
        layers = list(module.children()) if isinstance(module, nn.Sequential) else []
        for i, (_, after) in enumerate(pairwise(layers)):
            if isinstance(after, nn.modules.batchnorm._BatchNorm):
                left_out |= {f"{path}.{i}.bias", f"{path}.{i + 1}.running_mean"}
    return {name: t for name, t in vae.state_dict().items() if name not in left_out}


def test_training_is_that_of_stock_svi():
    """Ten steps with Adam, a rising beta and BatchNorm end in the same state in both."""
    vae, x = tiny(net="deep", shape=(1, 16, 16)), images("bernoulli", (1, 16, 16)).float()
    other = copy.deepcopy(vae)
    for v, svi in ((vae, SVI), (other, captured.SVI)):
        adam = pvae.SingleOptimizer(torch.optim.Adam(v.parameters(), lr=1e-3))
        options = {"compiler": as_traced, "strict": True} if v is other else {}
        trainer = svi(v.model, v.guide, adam, Trace_ELBO(), **options)
        torch.manual_seed(1)
        for i in range(10):
            with temper(i / 9):
                trainer.step(x)
    assert trainer.engine == "captured"
    assert trainer.captures == 1
    state = meaningful(other)
    for name, value in meaningful(vae).items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    assert any("running_var" in name for name in state)
    assert len(state) < len(other.state_dict())


# ---- any Pyro program ----


def regression(x, y):
    """A hierarchical regression: the slopes of four groups vary around a common slope."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 4):
        slope = pyro.sample("slope", dist.Normal(loc, scale))
    sigma = pyro.param("sigma", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope[torch.arange(len(x)) % 4] * x, sigma), obs=y)


X = torch.linspace(-1, 1, 12)
Y = 2 * X + 0.1


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("particles", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_hierarchical_regression(autoguide, particles):
    assert_same(*pair(regression, autoguide(regression), Trace_ELBO(particles)), (X, Y))


def test_subsampling():
    """The plate draws the rows, so the graph must draw them too."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    stock, ours = pair(model, AutoNormal(model), Trace_ELBO())
    assert_same(stock, ours, (Y * 10,))
    assert len({ours.step(Y * 10) for _ in range(5)}) == 5


def coin(flips):
    with pyro.plate("data", len(flips)):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        pyro.sample("flip", dist.Bernoulli(0.5 * fair + 0.9 * (1 - fair)), obs=flips)


def coin_guide(flips):
    p = pyro.param("p", torch.full((len(flips),), 0.3), constraint=constraints.unit_interval)
    with pyro.plate("data", len(flips)):
        pyro.sample("fair", dist.Bernoulli(p))


FLIPS = torch.tensor([1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(3)])
def test_score_function_gradients_of_a_constrained_parameter(elbo):
    assert_same(*pair(coin, coin_guide, elbo), (FLIPS,))


def test_implicit_reparameterization():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate * weights[0]), obs=y)

    def guide(y):
        a = pyro.param("a", torch.tensor(1.5), constraint=constraints.positive)
        c = pyro.param("c", torch.tensor([1.0, 2.0, 3.0]), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, 1.0))
        pyro.sample("weights", dist.Dirichlet(c))

    assert_same(*pair(model, guide, Trace_ELBO()), (Y.abs(),))


def test_several_losses():
    """If the loss returns a tuple, a captured step returns a tuple too."""

    def loss(model, guide, *args):
        elbo = Trace_ELBO().differentiable_loss(model, guide, *args)
        return elbo, 2 * elbo.detach()

    def loss_and_grads(model, guide, *args):
        elbo, twice = loss(model, guide, *args)
        elbo.backward()
        return elbo.detach(), twice

    svi = captured.SVI(
        coin, coin_guide, Still(), loss, loss_and_grads, strict=True, compiler=as_traced
    )
    for _ in range(3):
        once, twice = svi.step(FLIPS)
    assert svi.engine == "captured"
    assert twice == pytest.approx(2 * once)


# ---- what changes from step to step ----


def ready(vae, x, optimizer=None, **options):
    """Returns a captured SVI over a VAE that has already captured the shape of the batch x."""
    options = {"strict": True, "compiler": as_traced, **options}
    optim = optimizer or pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    svi = captured.SVI(vae.model, vae.guide, optim, Trace_ELBO(), **options)
    for _ in range(3):
        svi.step(x)
    assert svi.engine == "captured"
    return svi


@pytest.fixture
def x():
    return images("bernoulli", (1, 8, 8)).float()


def test_noise_and_data_differ_from_call_to_call(x):
    svi = ready(tiny(), x, Still())
    assert svi.step(x) != svi.step(x)
    torch.manual_seed(0)
    one = svi.step(x)
    torch.manual_seed(0)
    other = svi.step(1 - x)
    assert one != other


def test_a_parameter_changed_by_hand_is_seen(x):
    vae = tiny()
    svi = ready(vae, x, Still())
    stock = SVI(vae.model, vae.guide, Still(), Trace_ELBO())
    with torch.no_grad():
        for p in vae.parameters():
            p.mul_(1.5)
    (loss, *_), (expected, *_) = step(svi, (x,)), step(stock, (x,))
    assert svi.engine == "captured"
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_parameter_replaced_in_the_store_is_seen():
    stock, ours = pair(coin, coin_guide, Trace_ELBO())
    for _ in range(3):
        ours.step(FLIPS)
    pyro.get_param_store()["p"] = torch.full((4,), 0.7)
    (loss, g, _), (expected, h, _) = step(ours, (FLIPS,)), step(stock, (FLIPS,))
    assert ours.engine == "captured"
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(g["p"], h["p"])


def test_a_cleared_store_is_filled_again(x):
    vae = tiny()
    svi = ready(vae, x)
    pyro.clear_param_store()
    svi.step(x)
    assert svi.engine == "eager"
    before = [p.detach().clone() for p in vae.parameters()]
    for _ in range(2):
        svi.step(x)
    assert svi.engine == "captured"
    assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))


def test_tensors_that_a_module_is_given_anew_are_seen(x):
    vae = tiny()
    svi = ready(vae, x, Still())
    vae.load_state_dict({n: 1.1 * t for n, t in vae.state_dict().items()}, assign=True)
    stock = SVI(vae.model, vae.guide, Still(), Trace_ELBO())
    for _ in range(3):
        (loss, *_), (expected, *_) = step(svi, (x,)), step(stock, (x,))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert svi.engine == "captured"
    assert svi.captures == 2


class CoinGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = 1.0
        self.logit = nn.Parameter(torch.ones(4))

    def forward(self, flips):
        pyro.module("guide", self, update_module_params=True)
        with pyro.plate("data", len(flips)):
            probs = (self.logit / self.temperature).sigmoid()
            pyro.sample("fair", dist.Bernoulli(probs))


def test_a_modules_parameter_that_is_replaced_in_the_store_is_seen():
    """`pyro.module` gives the store's tensor to the module, so the programs have to run again."""
    guide = CoinGuide()
    _, ours = pair(coin, guide, Trace_ELBO())
    for _ in range(3):
        ours.step(FLIPS)
    assert ours.engine == "captured"
    pyro.get_param_store()["guide$$$logit"] = torch.full((4,), 2.0)
    ours.step(FLIPS)
    assert ours.engine == "eager"
    assert (guide.logit == 2.0).all()


def test_store_and_optimizer_hold_what_is_trained(x):
    vae = tiny()
    svi = ready(vae, x)
    before = [p.detach().clone() for p in vae.parameters()]
    svi.step(x)
    assert svi.engine == "captured"
    assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))
    store = dict(pyro.get_param_store().named_parameters()).values()
    assert {id(p) for p in store} >= {id(p) for p in vae.parameters()}
    assert all(s["step"] == 4 for s in svi.optim.optimizer.state.values())


def test_one_optimizer_for_each_parameter_works_as_well(x):
    vae = tiny()
    ready(vae, x, pyro.optim.ClippedAdam({"lr": 1e-2}))


@pytest.mark.parametrize("scaled", [temper, lambda s: poutine.scale(scale=s)])
def test_a_scale_that_changes_is_an_input(x, scaled):
    vae = tiny()
    stock, ours = pair(vae.model, vae.guide, Trace_ELBO())
    for beta in (0.1, 0.2, 0.3, 0.7):
        with scaled(beta):
            (loss, *_), (expected, *_) = step(ours, (x,)), step(stock, (x,))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert ours.engine == "captured"
    assert ours.captures == 1


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_modes_shapes_dtypes_and_frozen_layers_make_graphs_of_their_own(x):
    vae = tiny()
    svi = ready(vae, x)
    for change, captures in (
        (lambda: None, 1),
        (vae.eval, 2),
        (vae.train, 2),
        (lambda: vae.guide.requires_grad_(False), 3),
    ):
        change()
        for _ in range(3):
            svi.step(x)
        assert (svi.engine, svi.captures) == ("captured", captures)
    for _ in range(3):
        svi.step(x[:4])
    assert (svi.engine, svi.captures) == ("captured", 4)
    svi.step(x)
    assert (svi.engine, svi.captures) == ("captured", 4)


def test_a_number_that_a_module_holds_is_no_constant():
    """A graph reads the temperature that the module holds, here annealed by hand."""

    guide = CoinGuide()
    stock, ours = pair(coin, guide, Trace_ELBO(), max_graphs=2)
    for temperature in (1.0, 0.5, 0.1):
        guide.temperature = temperature
        for _ in range(3):
            (loss, *_), (expected, *_) = step(ours, (FLIPS,)), step(stock, (FLIPS,))
            assert loss == pytest.approx(expected, rel=1e-5)
        assert ours.engine == "captured"
    assert ours.captures == 2  # the second graph takes the number as an input
    for temperature in (2, 3):  # each integer needs a graph of its own
        guide.temperature = temperature
        with pytest.raises(NotCaptured, match=r"2 captures .*`guide\.temperature` has changed"):
            ours.step(FLIPS)


def test_rare_signatures_may_stay_eager(x):
    svi = ready(tiny(), x)
    svi.after = 4
    for _ in range(4):
        svi.step(x[:2])
        assert svi.engine == "eager"
    assert svi.captures == 1


# ---- what cannot be captured ----


def branches(flips):
    with pyro.plate("data", len(flips)):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        if fair.sum() > 2:
            fair = fair * 0.9
        pyro.sample("flip", dist.Bernoulli(0.4 + 0.5 * fair), obs=flips)


def rows_of_a_draw(flips):
    with pyro.plate("data", len(flips)):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
    for i in range(int(fair.sum())):
        pyro.sample(f"extra{i}", dist.Bernoulli(0.5), obs=flips[0])


def other_random_numbers(flips):
    with pyro.plate("data", len(flips)):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        p = 0.4 + 0.1 * random.random() + 0.4 * fair
        pyro.sample("flip", dist.Bernoulli(p), obs=flips)


def numpy_inside(flips):
    with pyro.plate("data", len(flips)):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        p = torch.from_numpy(flips.numpy()) * 0.1 + 0.4 + 0.4 * fair
        pyro.sample("flip", dist.Bernoulli(p), obs=flips)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (branches, "ask for the value of a tensor, in `branches`"),
        (rows_of_a_draw, "ask for the value of a tensor, in `rows_of_a_draw`"),
        (other_random_numbers, "random numbers of Python"),
        (numpy_inside, ""),
    ],
)
def test_falls_back_with_one_warning(model, reason):
    svi = captured.SVI(model, coin_guide, Still(), Trace_ELBO(), compiler=as_traced)
    stock = SVI(model, coin_guide, Still(), Trace_ELBO())
    random.seed(0)
    svi.step(FLIPS)
    with pytest.warns(UserWarning, match=f"runs eager: .*{reason}") as noted:
        svi.step(FLIPS)
    assert len(noted) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            random.seed(seed)
            loss = step(svi, (FLIPS,), seed)[0]
            random.seed(seed)
            assert loss == step(stock, (FLIPS,), seed)[0]
    assert svi.engine == "eager"
    assert reason in svi.reason
    assert svi.captures == 1


def test_strict_raises():
    svi = captured.SVI(branches, coin_guide, Still(), Trace_ELBO(), strict=True, compiler=as_traced)
    svi.step(FLIPS)
    with pytest.raises(NotCaptured, match="ask for the value of a tensor, in `branches`"):
        svi.step(FLIPS)


def test_handlers_that_do_more_than_hold_numbers_are_run(x):
    svi = ready(tiny(), x, strict=False)
    with pytest.warns(UserWarning, match="values of the handler _Draws"), _Draws() as draws:
        svi.step(x)
    assert svi.engine == "eager"
    assert [z.shape for z in draws.values["z"]] == [(6, 3)]
    svi.step(x)
    assert svi.engine == "captured"


def test_a_wrong_compiler_is_found_out(x):
    def off_by_a_little(graph, inputs):
        def run(*args):
            losses, *gradients = graph(*args)
            return [losses, *(1.001 * g for g in gradients)]

        return run

    vae = tiny()
    svi = captured.SVI(vae.model, vae.guide, Still(), Trace_ELBO(), compiler=off_by_a_little)
    svi.step(x)
    with pytest.warns(UserWarning, match="the graph and the programs differ in the gradient of .*"):
        svi.step(x)
    assert svi.engine == "eager"


def test_without_a_compiler_it_runs_eager(x):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler\nand a long story")

    vae = tiny()
    svi = captured.SVI(vae.model, vae.guide, Still(), Trace_ELBO(), compiler=missing)
    svi.step(x)
    with pytest.warns(UserWarning, match="runs eager: RuntimeError: no C[+][+] compiler$"):
        svi.step(x)
    assert svi.step(x) > 0


def test_tracing_leaves_no_trace(x):
    """Tracing changes neither the store, nor the random state, the buffers or global settings."""
    vae = tiny(net="deep", shape=(1, 16, 16))
    other = copy.deepcopy(vae)
    x = images("bernoulli", (1, 16, 16)).float()
    stock = SVI(vae.model, vae.guide, Still(), Trace_ELBO())
    ours = captured.SVI(other.model, other.guide, Still(), Trace_ELBO(), compiler=as_traced)
    settings = pyro.settings.get()
    names = None
    for svi in (stock, ours):
        torch.manual_seed(0)
        svi.step(x)
        names = names or len(pyro.get_param_store())
        svi.step(x)
        svi.last = torch.rand(())
    assert ours.captures == 1
    assert stock.last == ours.last
    assert len(pyro.get_param_store()) == 2 * names
    assert pyro.settings.get() == settings
    assert not torch.compiler.is_compiling()
    for a, b in zip(vae.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["after", "max_graphs"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        captured.SVI(coin, coin_guide, Still(), Trace_ELBO(), **{name: 0})


def test_pyro_validates_the_first_step_and_nan_is_warned_of(x):
    vae = tiny()
    svi = captured.SVI(vae.model, vae.guide, Still(), Trace_ELBO(), compiler=as_traced)
    with pytest.raises(ValueError, match="support"):
        svi.step(x * 0.5)
    svi = ready(vae, x, Still())
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN: loss"):
        assert svi.step(x) != svi.step(x)


# ---- precision ----


def test_bfloat16_is_of_the_networks_alone(x):
    """The captured bfloat16 loss is the eager one, and near the float32 loss at the same noise."""
    vae = tiny()
    stock, ours = pair(vae.model, vae.guide, Trace_ELBO())
    exact = step(stock, (x,))[0]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert vae.encode(x).mean.dtype == torch.float32
            coarse, loss = step(stock, (x,))[0], step(ours, (x,))[0]
        assert loss == pytest.approx(coarse, rel=1e-5)
        assert coarse == pytest.approx(exact, rel=1e-2)
    assert ours.engine == "captured"
    assert coarse != exact


# ---- recordings ----


class Recordings:
    """Imitates a CUDA graph without a GPU; `tensors` are the tensors that the step writes.

    To record a step does not change them. A replay is the recorded step; it reads the learning
    rates from the tensors that held them when it was recorded.
    """

    def __init__(self, tensors):
        self.tensors, self.made = tensors, 0

    def of(self, optim):
        def record(step, device):
            optimizer = optim.optimizer
            groups = optimizer.param_groups
            rates = [group["lr"] for group in groups]
            assert all(isinstance(rate, torch.Tensor) for rate in rates)
            assert all(group["capturable"] for group in groups)
            own = [*self.tensors]
            own += [v for p in self.tensors for v in optimizer.state.get(p, {}).values()]
            before, random = [t.detach().clone() for t in own], torch.get_rng_state()
            results = step()
            with torch.no_grad():
                for t, value in zip(own, before, strict=True):
                    t.copy_(value)
            torch.set_rng_state(random)

            def replay():
                now = [group["lr"] for group in groups]
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
                for result, new in zip(results, step(), strict=True):
                    result.copy_(new)
                for group, rate in zip(groups, now, strict=True):
                    group["lr"] = rate

            self.made += 1
            return replay, results

        return record


# the net "deep" has buffers that a step writes
@pytest.mark.parametrize("net", ["mlp", pytest.param("deep", marks=pytest.mark.slow)])
def test_a_recorded_step_trains_as_stock_svi(net):
    """Data, noise, beta and learning rate change from step to step without a new recording.

    Then the optimizer's state is replaced, and then its settings: each makes one new recording.
    """
    vae = tiny(net=net, shape=(1, 16, 16)).double()
    other = copy.deepcopy(vae)
    adams = [torch.optim.Adam(v.parameters(), lr=1e-2, fused=True) for v in (vae, other)]
    tensors = [*vae.parameters(), *(b for b in vae.buffers() if b.numel())]
    record = Recordings(tensors)
    optims = [pvae.SingleOptimizer(adam) for adam in adams]
    options: dict = {"strict": True, "compiler": as_traced, "record": record.of(optims[0])}
    ours = captured.SVI(vae.model, vae.guide, optims[0], Trace_ELBO(), **options)
    stock = SVI(other.model, other.guide, optims[1], Trace_ELBO())

    def same_step(i):
        x = (torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(i)) > 0.5).double()
        losses = []
        for svi, adam in ((ours, adams[0]), (stock, adams[1])):
            torch.manual_seed(i)
            adam.param_groups[0]["lr"] = 1e-2 / (1 + i)
            with temper(0.1 * i):
                losses.append(svi.step(x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)

    def assert_same():
        for a, b in zip(meaningful(vae).values(), meaningful(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    for i in range(9):
        same_step(i)
    assert (ours.engine, ours.captures, record.made) == ("captured", 1, 1)
    assert_same()
    for adam in adams:
        adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    same_step(9)
    same_step(10)
    assert record.made == 2
    for adam in adams:
        adam.param_groups[0]["betas"] = (0.5, 0.9)
    same_step(11)
    assert record.made == 3
    assert_same()
    assert not any(isinstance(g["lr"], torch.Tensor) for g in adams[0].param_groups)


def test_launched_losses_are_the_steps_own(x):
    """`launch` returns loss tensors that later steps do not overwrite."""
    vae = tiny()
    adam = torch.optim.Adam(vae.parameters(), lr=0.0, fused=True)
    record, optim = Recordings(list(vae.parameters())), pvae.SingleOptimizer(adam)
    svi = ready(vae, x, optim, record=record.of(optim))
    launched = []
    for i in range(6):
        torch.manual_seed(i)
        launched.append(svi.launch(x))
    assert record.made == 1
    assert all(isinstance(loss, torch.Tensor) for loss in launched)
    for i, loss in enumerate([loss.item() for loss in launched]):
        torch.manual_seed(i)
        assert svi.step(x) == pytest.approx(loss, rel=1e-6)


def test_what_a_recording_no_longer_fits_is_seen(x):
    """A new optimizer, and a parameter with new memory, are seen, and are used from then on."""
    vae = tiny()
    adam = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    optim = pvae.SingleOptimizer(adam)
    record = Recordings(list(vae.parameters()))
    svi = ready(vae, x, optim, record=record.of(optim))
    for _ in range(4):
        svi.step(x)
    assert record.made == svi.recordings == 1
    other = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    svi.optim = pvae.SingleOptimizer(other)
    svi.record = record.of(svi.optim)
    for _ in range(2):
        svi.step(x)
    assert len(other.state) == len(list(vae.parameters()))
    assert svi.recordings == 3  # one before the new optimizer has a state, one after
    first = next(vae.parameters())
    moved = first.detach().clone()
    first.data = moved  # at another address
    svi.step(x)
    assert svi.recordings == 4
    assert first.data_ptr() == moved.data_ptr()


def test_a_setting_that_always_changes_ends_recording(x):
    vae = tiny()
    adam = torch.optim.Adam(vae.parameters(), fused=True)
    optim = pvae.SingleOptimizer(adam)
    record = Recordings(list(vae.parameters()))
    svi = ready(vae, x, optim, record=record.of(optim), strict=False, max_graphs=1)

    def steps():
        for i in range(10):
            adam.param_groups[0]["betas"] = (0.9 - i / 100, 0.999)
            assert svi.step(x) > 0

    with pytest.warns(UserWarning, match="4 recordings were made: a setting"):
        steps()
    assert record.made == 4
    assert svi.engine == "captured"
    assert not any(isinstance(g["lr"], torch.Tensor) for g in adam.param_groups)
    assert not any(p.grad.any() for p in vae.parameters())  # gradients are zero, as after stock SVI


def test_a_cuda_graph_of_a_pair_on_the_cpu_is_captured_without_it(x):
    vae = tiny()
    optim = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), fused=True))
    svi = ready(vae, x, optim, record=captured.cuda_graph, strict=False)
    with pytest.warns(UserWarning, match="takes a pair and arguments on a GPU, not on cpu"):
        losses = [svi.step(x) for _ in range(6)]
    assert svi.engine == "captured"
    assert len(set(losses)) == 6


def test_what_cannot_be_recorded_is_refused():
    vae = tiny()
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), foreach=True))
    sgd = pvae.SingleOptimizer(torch.optim.SGD(vae.parameters(), fused=True))
    for optim in (adam, sgd, pyro.optim.Adam({"lr": 1e-3})):
        with pytest.raises(
            ValueError, match=r"record needs a pvae\.SingleOptimizer of a fused .*; optim is a"
        ):
            captured.SVI(vae.model, vae.guide, optim, Trace_ELBO(), record=captured.cuda_graph)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_a_cuda_graph_trains_as_stock_svi(net):
    """From the same parameters, losses agree to 3 %: the noise of the two runs differs."""
    last = []
    for kind in (SVI, lambda *a: captured.SVI(*a, strict=True, record=captured.cuda_graph)):
        torch.manual_seed(0)
        vae = pvae.build((1, 16, 16), 3, net, hidden=16).cuda()
        adam = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        x = (torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
        svi = kind(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
        losses = []
        for i in range(200):
            adam.param_groups[0]["lr"] = 1e-2 * (1 - i / 200)
            with temper(min(1.0, (i + 1) / 100)):
                losses.append(svi.step(x.cuda()))
        last.append(sum(losses[-20:]) / 20)
        assert len(set(losses)) > 190  # each step draws new noise
    assert last[0] == pytest.approx(last[1], rel=0.03)


# ---- functions ----


def test_a_function_with_noise_gradients_and_a_module():
    """Values and gradients equal the eager ones at the same noise, for changing arguments."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 1))

    def energy(x, scale):
        with torch.enable_grad():
            x = (x + torch.randn_like(x) * scale).requires_grad_()
            value = net(x)[:, 0]
            (slope,) = torch.autograd.grad(value.sum(), x)
        return {"value": value, "slope": slope}

    ours = captured.Function(energy, list(net.modules()), compiler=as_traced, strict=True)
    for seed in range(4):
        x, scale = torch.rand(2, 1, 6, 6), torch.tensor(float(seed))
        torch.manual_seed(seed)
        found = ours(x, scale)
        torch.manual_seed(seed)
        for name, expected in energy(x, scale).items():
            torch.testing.assert_close(found[name], expected.detach())
            assert not found[name].requires_grad
        with torch.no_grad():  # the next call must see this
            next(net.parameters()).add_(0.1)
    assert ours.engine == "captured"
    assert ours.captures == 1
    net[3] = nn.Linear(3 * 4 * 4, 1)
    torch.manual_seed(0)
    found = ours(x, scale)
    torch.manual_seed(0)
    assert torch.equal(found["value"], energy(x, scale)["value"])
    assert ours.engine == "eager"  # another weight tensor needs a new graph


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x if x.sum() > 0 else -x, "ask for the value of a tensor"),
        (lambda x: (x, 1.0), "returns a float, not a tensor"),
        (lambda x: x * random.random(), "random numbers of Python"),
    ],
)
def test_a_function_that_cannot_be_captured_runs_as_it_is(function, reason):
    ours = captured.Function(function, compiler=as_traced)
    x = torch.ones(3)
    ours(x)
    with pytest.warns(UserWarning, match=f"captured.Function runs eager: .*{reason}"):
        ours(x)
    random.seed(1)
    found = ours(-x)
    random.seed(1)
    torch.testing.assert_close(found, function(-x))
    strict = captured.Function(function, compiler=as_traced, strict=True)
    strict(x)
    with pytest.raises(NotCaptured, match=reason):
        strict(x)


def test_a_wrong_compiler_of_a_function_is_found_out():
    def off_by_a_little(graph, inputs):
        return lambda *args: [1.001 * t for t in graph(*args)]

    ours = captured.Function(lambda x: x.sum(), compiler=off_by_a_little)
    ours(torch.ones(3))
    with pytest.warns(UserWarning, match="the graph and the function differ in a result"):
        assert ours(torch.ones(3)) == 3
    assert ours(torch.ones(3)) == 3
    assert ours.engine == "eager"


# ---- the trainer, the example, the benchmark ----


def trainer(folder, precision="fp32"):
    torch.manual_seed(0)
    vae = pvae.build((1, 28, 28), 2, "mlp", hidden=16)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    svi = captured.SVI(vae.model, vae.guide, adam, Trace_ELBO(), strict=True, compiler=as_traced)
    return Trainer(
        vae,
        svi,
        observe(load("digits"), "dynamic"),
        epochs=4,
        batch_size=512,
        schedule=Schedule(kl_warmup=0.5),
        precision=precision,
        folder=folder,
        quiet=True,
    )


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_a_captured_run_is_resumed(tmp_path):
    """A resumed run ends with the same bits as an uninterrupted one; no step of it is eager."""
    whole = trainer(tmp_path)
    whole.fit()
    assert whole.svi.engine == "captured"
    assert whole.svi.captures == 2  # the short last batch has a graph of its own
    final = {name: t.clone() for name, t in whole.vae.state_dict().items()}
    first = trainer(tmp_path)
    first.fit(until=2)
    second = trainer(tmp_path)
    second.resume(tmp_path / "checkpoint.pt")
    second.svi._eager = None  # to show that no step calls it
    second.fit()
    assert without_time(second.history) == without_time(whole.history)
    assert all(torch.equal(t, final[name]) for name, t in second.vae.state_dict().items())


def test_training_in_bfloat16(tmp_path):
    coarse, exact = trainer(None, "bf16"), trainer(None)
    coarse.fit()
    exact.fit()
    assert coarse.svi.engine == "captured"
    assert coarse.history[-1]["validation_elbo"] == pytest.approx(
        exact.history[-1]["validation_elbo"], rel=1e-2
    )
    assert coarse.history[-1]["validation_elbo"] != exact.history[-1]["validation_elbo"]


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, not 'fp8'"):
        trainer(None, "fp8")


ROOT = Path(pvae.__file__).parent.parent


def run(argv, tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_captured(tmp_path):
    small = ["--dataset", "digits", "--net", "mlp", "--hidden", "16", "-n", "2", "-b", "64"]
    example = ROOT / "examples" / "mnist_svi.py"
    elbos = {}
    for engine in ("eager", "captured"):
        said = run([example, *small, "--engine", engine, "--out", engine], tmp_path)
        assert f"engine: {engine}" in said
        elbos[engine] = results.read(tmp_path / engine / "results.json")["elbo"].mean
    assert elbos["captured"] == pytest.approx(elbos["eager"], rel=1e-4)


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    short = ["--nets", "mlp", "--batches", "4", "--turns", "2", "--seconds", "0.05"]
    some = ["--variants", "eager", "pytorch/examples", "--json", "t.json", "--figure", "t.png"]
    said = run([ROOT / "benchmarks" / "throughput.py", *short, *some], tmp_path)
    assert "mlp, batch 4" in said
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == ["plain", "eager", "pytorch/examples"]
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in rows)
    assert (tmp_path / "t.png").exists()


@pytest.mark.slow
def test_the_growth_of_cost(tmp_path):
    """The benchmark may time more batches than an epoch has."""
    short = ["--axes", "images", "--images", "50000", "--batch", "100", "--timed", "98"]
    out = ["--engines", "eager", "--json", "g.json", "--figure", "g.png"]
    said = run([ROOT / "benchmarks" / "growth.py", *short, *out], tmp_path)
    assert "training images" in said
    few, many = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert (few["images"], many["images"]) == (10_000, 50_000)
    assert many["epoch_seconds"] == pytest.approx(500 * many["milliseconds"] / 1e3)
    assert many["peak_mib"] - few["peak_mib"] > 15  # the images alone are 30 MiB
    assert (tmp_path / "g.png").exists()
