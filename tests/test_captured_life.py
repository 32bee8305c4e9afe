"""Captured SVI outside of its steps: preparing, copying, comparing with Pyro, refusals."""

import copy
import gc
import pickle
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import tiny
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import pvae
from pvae import captured, heads, temper
from pvae.captured import NotCaptured, as_traced, compiling, private
from pvae.captured.capturing import as_tensors, signature_of
from pvae.captured.seen import Seen, Spot

DATA = torch.linspace(-1, 2, 5)


@pytest.fixture(autouse=True)
def _clear():
    pyro.clear_param_store()


def guide(data):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def model(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def made(kind=captured.SVI, model=model, guide=guide, **options):
    if kind is captured.SVI:
        options = {"compiler": as_traced, "strict": True, **options}
    return kind(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)


def trained(svi, n=6, data=DATA):
    torch.manual_seed(0)
    return [svi.step(data) for _ in range(n)]


# ---- prepared ----


def test_every_step_of_a_prepared_run_is_captured():
    stock = trained(made(SVI))
    expected = {n: p.clone() for n, p in pyro.get_param_store().named_parameters()}
    pyro.clear_param_store()
    svi = made()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    svi.prepare(DATA)
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.param("loc") == 0.3
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    assert not svi.optim.optim_objs
    losses = []
    for _ in range(6):
        losses.append(svi.step(DATA))
        assert svi.engine == "captured"
    assert losses == pytest.approx(stock, rel=1e-5)
    for name, p in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(p, expected[name])


def test_preparing_leaves_buffers_and_gradients():
    head = heads.Normal((3,))
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6))
    vae = pvae.VAE(tiny(net="mlp").model, pvae.Guide(pvae.Conditional(net, head, event_dim=3)))
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = captured.SVI(vae.model, vae.guide, adam, Trace_ELBO(), compiler=as_traced, strict=True)
    before = copy.deepcopy(vae.state_dict())
    for p in vae.parameters():
        p.grad = torch.ones_like(p)
    images = torch.ones(4, 1, 8, 8)
    with temper(0.5):
        svi.prepare(images)
        svi.prepare(images[:2])
    assert all(torch.equal(before[name], t) for name, t in vae.state_dict().items())
    assert all((p.grad == 1).all() for p in vae.parameters())
    for batch in (images, images[:2]):
        with temper(0.7):
            svi.step(batch)
        assert svi.engine == "captured"
    assert svi.captures == 2


def test_no_more_graphs_are_prepared_than_may_be_made():
    svi = made(max_graphs=2)
    svi.prepare(torch.ones(3))
    svi.prepare(torch.ones(4))
    with pytest.raises(NotCaptured, match="2 captures were tried for 2 different calls"):
        svi.prepare(torch.ones(5))
    assert svi.captures == 2


def test_an_autoguide_is_prepared():
    auto = AutoNormal(model)
    svi = made(guide=auto)
    svi.prepare(DATA)
    svi.step(DATA)
    assert svi.engine == "captured"


def test_what_cannot_be_prepared_says_so_and_runs():
    def branches(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(-z if z > 0 else z, 1.0).expand([5]).to_event(1), obs=data)

    with pytest.raises(NotCaptured, match="ask for the value"):
        made(model=branches).prepare(DATA)
    svi = made(model=branches, strict=False)
    with pytest.warns(UserWarning, match="ask for the value"):
        svi.prepare(DATA)
    assert svi.step(DATA) > 0
    assert svi.engine == "eager"


# ---- copied ----


def double(x):
    return 2 * x


def test_what_is_pickled_and_copied_captures_anew():
    """A copy captures again. An SVI is copied before its first step: later it cannot be pickled."""
    for copied in (lambda v: pickle.loads(pickle.dumps(v)), copy.deepcopy):
        svi = copied(made())
        trained(svi, 3)
        assert svi.engine == "captured"
        pyro.clear_param_store()
        ours = captured.Function(double, compiler=as_traced)
        for _ in range(3):
            ours(DATA)
        other = copied(ours)
        assert ours.engine == "captured"
        for engine in ("eager", "eager", "captured"):
            assert torch.equal(other(DATA), 2 * DATA)
            assert other.engine == engine


def test_it_takes_the_place_of_stock_svi(monkeypatch):
    monkeypatch.setattr(pyro.infer, "SVI", captured.SVI)
    svi = pyro.infer.SVI(
        model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), compiler=as_traced
    )
    trained(svi)
    assert svi.engine == "captured"
    assert isinstance(svi, SVI)


# ---- compared with Pyro ----

HIDDEN = 1.0


def hidden(data):
    z = pyro.sample("z", dist.Normal(0.0, globals()["".join(["HID", "DEN"])]))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def test_a_change_that_is_not_looked_up_is_found(monkeypatch):
    svi = made(model=hidden, strict=False)
    trained(svi, 2 + 5)
    assert svi.engine == "captured"
    monkeypatch.setattr(f"{__name__}.HIDDEN", 3.0)
    text = "differ in the loss: .*number of calls that may be wrong: 3$"
    with pytest.warns(UserWarning, match=text) as noted:
        losses = trained(svi, 5)
    assert len(noted) == 1
    assert svi.engine == "eager"
    pyro.clear_param_store()
    stock = made(SVI, model=hidden)
    assert trained(svi, 3) == pytest.approx(trained_anew(stock, 3))
    assert len(losses) == 5


def trained_anew(svi, n):
    pyro.clear_param_store()
    return trained(svi, n)


def test_a_change_that_is_not_looked_up_is_found_strictly(monkeypatch):
    svi = made(model=hidden)
    trained(svi, 2 + 5)
    monkeypatch.setattr(f"{__name__}.HIDDEN", 3.0)
    with pytest.raises(NotCaptured, match="the graph and the programs differ in the loss"):
        trained(svi, 5)


def test_checks_change_no_bit(monkeypatch):
    runs = []
    for _ in range(2):
        pyro.clear_param_store()
        runs.append(trained(made(), 40))
        monkeypatch.setattr("pvae.captured.capturing.is_due", lambda done: False)
    assert runs[0] == runs[1]


def test_when_a_call_is_held_against_the_programs():
    from pvae.captured.capturing import is_due

    assert [n for n in range(40) if is_due(n)] == [1, 2, 4, 8, 16, 32]
    assert is_due(1000)
    assert is_due(3000)
    assert not is_due(1001)


def test_a_function_is_held_against_itself(monkeypatch):
    ours = captured.Function(lambda x: x * globals()["".join(["HID", "DEN"])], compiler=as_traced)
    for _ in range(2 + 5):
        ours(DATA)
    assert ours.engine == "captured"
    monkeypatch.setattr(f"{__name__}.HIDDEN", 3.0)

    def calls():
        return [ours(DATA) for _ in range(5)]

    with pytest.warns(UserWarning, match="the graph and the function differ in a result"):
        last = calls()[-1]
    assert torch.equal(last, 3 * DATA)


def test_writing_through_the_data_of_a_gradient_is_found():
    def noisy_steps():
        for _ in range(4):
            for _, p in pyro.get_param_store().named_parameters():
                p.grad.data.add_(1.0)
            svi.step(DATA)

    svi = made(strict=False)
    trained(svi, 4)
    with pytest.warns(UserWarning, match="a gradient, to which other code wrote"):
        noisy_steps()
    assert svi.engine == "eager"


# ---- what is refused ----


def test_a_door_that_is_missing(monkeypatch):
    monkeypatch.setattr(private, "MISSING", ["torch.there.is.none"])
    svi = made(strict=False)
    with pytest.warns(UserWarning, match="has no torch.there.is.none, which captured needs"):
        losses = trained(svi, 3)
    pyro.clear_param_store()
    assert losses == trained(made(SVI), 3)


def test_arguments_that_cannot_be_told_apart(monkeypatch):
    """Without a hash of their structure (torch up to 2.7), arguments are refused with a reason."""
    unhashable = types.SimpleNamespace(tree_flatten=lambda tree: ([], []))
    monkeypatch.setattr("pvae.captured.capturing.pytree", unhashable)
    svi = made(strict=False)
    with pytest.warns(UserWarning, match="the arguments cannot be told apart: unhashable"):
        svi.step(data=DATA)


@pytest.mark.slow
def test_a_tensor_at_the_place_of_another_that_is_gone():
    """A new tensor may get the `id` of one that was freed; it is not the same tensor."""
    layers = nn.ModuleList([nn.Linear(1, 1)])

    def model(data):
        pyro.module("net", layers)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(layers[0](z), 1.0).to_event(1), obs=data[:, None])

    def guide(data):
        pyro.sample("z", dist.Normal(pyro.param("at", torch.zeros(1)), 1.0).to_event(1))

    svi, stock = made(model=model, guide=guide), made(SVI, model=model, guide=guide)
    for i in range(6):
        pyro.clear_param_store()
        layers[0] = nn.Linear(1, 1)
        gc.collect()
        for _ in range(2):
            torch.manual_seed(i)
            loss = svi.step(DATA)
            torch.manual_seed(i)
            assert loss == pytest.approx(stock.evaluate_loss(DATA), rel=0.2)


# ---- nothing is left of tracing ----


def test_no_tensor_without_data_is_left():
    vae = pvae.build((1, 8, 8), 3, "mlp", "bernoulli", "iaf", hidden=16)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = captured.SVI(vae.model, vae.guide, adam, Trace_ELBO(), compiler=as_traced, strict=True)
    for _ in range(3):
        svi.step(torch.ones(4, 1, 8, 8))
    assert svi.engine == "captured"
    seen = Seen(vars(svi), ("model", "guide", "loss", "loss_and_grads"), list(vae.modules()))
    assert not any(isinstance(t, FakeTensor) for t in seen.tensors)
    for module in vae.modules():
        for value in vars(module).values():
            held = value if isinstance(value, (tuple, list)) else [value]
            assert not any(isinstance(t, FakeTensor) for t in held)


def test_what_is_seen_is_put_back():
    """What a program writes to an object, a list, a dictionary and a cell can be undone."""

    class Holder:
        def __init__(self):
            self.value, self.rows, self.named = 1.0, [1, 2], {"a": 1}

    holder, cell = Holder(), 5

    def program():
        nonlocal cell
        cell = 6
        holder.value, holder.new = 2.0, torch.ones(1)
        holder.rows.append(3)
        holder.named["b"] = 2

    seen = Seen({"program": program}, ["program"])
    assert seen.holds()
    program()
    assert not seen.holds()
    seen.put_back()
    assert seen.holds()
    assert vars(holder) == {"value": 1.0, "rows": [1, 2], "named": {"a": 1}}
    assert cell == 5


@pytest.mark.slow
def test_compiled_code_draws_as_stock_svi():
    """Compiled code keeps a draw that no result depends on: later draws must be the same."""

    def idle(data):
        torch.randn(3)
        model(data)
        torch.rand(2)

    losses = {}
    for kind, options in ((SVI, {}), (captured.SVI, {"compiler": captured.inductor})):
        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            svi = made(kind, model=idle, **options)
            losses[kind] = trained(svi, 6)
    assert svi.engine == "captured"
    assert losses[captured.SVI] == pytest.approx(losses[SVI], rel=1e-5)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_kink_that_rounding_crosses_is_no_difference(prepared):
    """Other rounding may put an input on the other side of a ReLU's kink; this is accepted."""

    def kinked(x):
        w = pyro.param("w", torch.ones(3))
        pyro.sample("x", dist.Normal((w - 1).relu(), 1.0).to_event(1), obs=x)

    def rounding_otherwise(graph, inputs):
        return lambda *args: graph(*[t * (1 + torch.finfo(t.dtype).eps) for t in args])

    still = pyro.optim.SGD({"lr": 0.0})
    svi = captured.SVI(
        kinked, lambda x: None, still, Trace_ELBO(), compiler=rounding_otherwise, strict=True
    )
    if prepared:
        svi.prepare(torch.full((3,), 2.0))
    for _ in range(5):
        svi.step(torch.full((3,), 2.0))
    assert svi.engine == "captured"


def test_a_sum_of_which_only_rounding_is_left_is_no_difference():
    """At an optimum, large terms cancel in a gradient: what is left depends on their order."""
    x = 1e4 + 1e3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))

    def shifted(x):
        loc = pyro.param("loc", x.mean())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def in_another_order(graph, inputs):
        order = inputs[0].argsort()
        return lambda x, *others: graph(x[order], *others)

    still = pyro.optim.SGD({"lr": 0.0})
    svi = captured.SVI(
        shifted, lambda x: None, still, Trace_ELBO(), compiler=in_another_order, strict=True
    )
    for _ in range(5):
        svi.step(x)
    assert svi.engine == "captured"


def test_a_bias_of_many_images_is_held_against_more_than_onednn():
    """oneDNN's gradient of a bias loses digits, so the compiled code takes torch's sum."""
    x = (torch.rand(500, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        conv.bias.copy_(x.mean().logit())  # the optimum

    def decoding(x):
        pyro.module("conv", conv)
        logits = conv(torch.zeros_like(x))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def with_sums(graph, inputs):
        compiling._sum_for_biases(graph)
        return graph

    still = pyro.optim.SGD({"lr": 0.0})
    svi = captured.SVI(
        decoding, lambda x: None, still, Trace_ELBO(), compiler=with_sums, strict=True
    )
    for _ in range(4):
        svi.step(x)
    assert svi.engine == "captured"


def test_under_autocast_rounding_is_that_of_bfloat16():
    """Compiled code keeps digits between two operators that the programs round to bfloat16."""
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    x = x - x.mean() + 8.0  # so the gradient is 0 at 8

    def shifted(x):
        loc = pyro.param("loc", torch.full((1, 1), 8.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.ones_like(x) @ loc, 1.0).to_event(1), obs=x)

    def one_digit_off(graph, inputs):
        return lambda x, loc: graph(x, loc * (1 + torch.finfo(torch.bfloat16).eps))

    still = pyro.optim.SGD({"lr": 0.0})
    svi = captured.SVI(shifted, lambda x: None, still, Trace_ELBO(), compiler=one_digit_off)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            svi.step(x)
    assert svi.engine == "captured"
    svi.step(x)
    with pytest.warns(UserWarning, match="differ in the loss"):
        svi.step(x)  # in float32 it is more than rounding


# ---- what a step leaves as it was ----


def with_missing(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    there = ~data.isnan()
    with pyro.plate("data", len(data)), poutine.mask(mask=there):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data.nan_to_num())


@pytest.mark.parametrize("kind", ["expanded", "complex", "mapped"])
def test_missing_numbers_are_not_written_anew(kind, tmp_path):
    """NaN is not equal to itself, but it is no change; the tensor may be read-only."""
    if kind == "mapped":
        np.save(tmp_path / "data.npy", np.array([1.0, np.nan, 2.0], np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only arrays
            data = torch.from_numpy(np.load(tmp_path / "data.npy", mmap_mode="r"))
    else:
        dtype = torch.complex64 if kind == "complex" else torch.float32
        data = torch.tensor([float("nan")], dtype=dtype).expand(3)

    def real(data):
        with_missing(data.real if data.is_complex() else data)

    svi = made(model=real)
    trained(svi, data=data)
    assert svi.engine == "captured"


def test_numbers_are_back_in_their_places_if_one_of_them_cannot_be_a_tensor():
    class Picky(dict):
        def __setitem__(self, key, value):
            if isinstance(value, torch.Tensor):
                raise TypeError("only numbers")
            super().__setitem__(key, value)

    first, second = {"rate": 1.0}, Picky(rate=2.0)
    spots = [Spot(holder, "rate", "rate") for holder in (first, second)]
    numbers = [(spot, torch.tensor(0.0)) for spot in spots]
    with pytest.raises(TypeError, match="only numbers"), as_tensors(numbers, [1.0, 2.0]):
        pass
    assert first == {"rate": 1.0}
    assert second == {"rate": 2.0}


def test_preparing_leaves_a_generator_of_numpy_as_it_was():
    noise = np.random.default_rng(0)

    def noisy(data):
        z = pyro.sample("z", dist.Normal(noise.normal(), 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    svi = made(model=noisy, strict=False)
    with pytest.warns(UserWarning, match="random numbers of Python or NumPy"):
        svi.prepare(DATA)
    assert noise.normal() == np.random.default_rng(0).normal()


# ---- what is kept, and said ----


def picky(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if len(data) == 5 and data.sum() > 0:
        z = z * 0.9
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def test_the_reason_is_that_of_the_last_step():
    svi = made(model=picky, strict=False)
    with pytest.warns(UserWarning, match="value of a tensor") as noted:
        trained(svi, 3)
    assert noted[0].filename == __file__
    assert "value of a tensor" in svi.reason
    svi.step(DATA[:4])
    assert svi.reason is None
    svi.step(DATA)
    assert "value of a tensor" in svi.reason
    for _ in range(2):
        svi.step(DATA[:4])
    assert svi.engine == "captured"
    svi.step(DATA)
    assert "value of a tensor" in svi.reason


def test_a_copy_may_capture_as_often_as_the_first():
    svi = made(max_graphs=1)
    trained(svi, 3)
    other = copy.deepcopy(svi)
    trained(other, 3)
    assert other.engine == "captured"


def test_a_new_graph_is_compared_as_early_as_the_first(monkeypatch):
    svi = made(model=hidden, strict=False)
    trained(svi, 2 + 9)
    pyro.clear_param_store()
    trained(svi, 2 + 1)
    assert svi.engine == "captured"
    monkeypatch.setattr(f"{__name__}.HIDDEN", 3.0)
    with pytest.warns(UserWarning, match="number of calls that may be wrong: 1$"):
        svi.step(DATA)


def test_steps_of_all_graphs_are_told_that_may_be_wrong(monkeypatch):
    svi = made(model=hidden, strict=False)
    trained(svi, 2)
    trained(svi, 2, DATA[:4])
    monkeypatch.setattr(f"{__name__}.HIDDEN", 3.0)
    svi.step(DATA)
    svi.step(DATA[:4])
    with pytest.warns(UserWarning, match="number of calls that may be wrong: 2$"):
        svi.step(DATA)


def test_an_argument_that_is_new_at_every_step_is_named_and_not_kept():
    def counting(data, names):
        model(data)

    svi = made(model=counting, guide=lambda data, names: guide(data), strict=False)
    for i in range(16):
        svi.step(DATA, [f"{i}.png"])
    with pytest.warns(UserWarning, match=r"`args\[1\]` has changed"):
        svi.step(DATA, ["16.png"])
    for i in range(17, 120):
        svi.step(DATA, [f"{i}.png"])
    assert "different calls" in svi.reason
    assert not svi._entries


class Box:
    def __init__(self, values, number):
        self.values, self.number = values, number


def test_an_argument_of_a_class_that_others_taught_torch_to_open_is_named():
    private.pytree.register_pytree_node(
        Box, lambda box: ([box.values, box.number], None), lambda inside, _: Box(*inside)
    )
    then, now = (signature_of((DATA,), {"box": Box(DATA, i)}) for i in range(2))
    assert now.first_change_from(then.without_data()) == "box"
    assert now.first_change_from(now.without_data()) is None


def test_what_cannot_be_looked_up_is_refused_when_a_step_is_prepared():
    class Odd:
        @property
        def __class__(self):
            raise RuntimeError("no class")

    odd = Odd()

    def with_odd(data):
        assert odd.__dict__ == {}
        model(data)

    svi = made(model=with_odd, strict=False)
    with pytest.warns(UserWarning, match="cannot be looked up"):
        svi.prepare(DATA)
    with pytest.raises(NotCaptured, match="cannot be looked up"):
        made(model=with_odd).prepare(DATA)
