"""Small programs that stock SVI and captured SVI run step by step from the same seed.

Loss, parameters, optimizer and random numbers are equal after every step. A program is captured,
or it runs eager and one warning says why.
"""

import array
import collections
import contextlib
import contextvars
import copy
import decimal
import enum
import functools
import itertools
import math
import operator
import os
import queue
import random
import re
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.trace_tail_adaptive_elbo import TraceTailAdaptive_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.overrides import TorchFunctionMode

from pvae import captured, temper
from pvae.captured import as_traced

STEPS = 8
DATA = torch.linspace(-1, 2, 5)
OLDEST_TORCH = torch.__version__.startswith("2.8.")


class Program(NamedTuple):
    run: Callable[[Callable[..., SVI]], Iterator[object]]
    captured: bool | None  # None: both are allowed
    says: str  # a pattern of the warning if the program is not captured


PROGRAMS: dict[str, Program] = {}


def program(captured=True, says=""):
    def add(run):
        PROGRAMS[run.__name__] = Program(run, captured, says)
        return run

    return add


# ---- how they are run ----


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(v) for v in value]
    return value


def world(svi):
    """Returns all state that a step may change and that other code can see."""
    return {
        "parameters": copied(dict(pyro.get_param_store().named_parameters())),
        "gradients": {n: copied(p.grad) for n, p in pyro.get_param_store().named_parameters()},
        "optimizer": copied({k: v for k, v in svi.optim.get_state().items() if k}),
        "torch": torch.get_rng_state(),
        "python": random.getstate()[1],
        "numpy": np.random.get_state()[1],  # noqa: NPY002
    }


def run(steps, kind):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    made = []

    def svi_of(model, guide, elbo=None, optim=None):
        optim = optim or pyro.optim.Adam({"lr": 0.05})
        made.append(kind(model, guide, optim, elbo or Trace_ELBO()))
        return made[-1]

    rows = []
    for said in steps(svi_of):
        rows.append({"said": copied(said), **world(made[-1])})
    return rows, made[-1]


def assert_equal(found, expected, where):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name in expected:
            assert_equal(found[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b, where)
    elif isinstance(expected, torch.Tensor) and expected.dtype.is_floating_point:
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, np.ndarray):
        assert (found == expected).all(), where
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True), where
    else:
        assert found == expected, where


captured_svi = partial(captured.SVI, compiler=as_traced)


def held_against_stock(steps):
    """Runs a program by both SVIs and compares them; returns captured SVI and its warnings."""
    expected, _ = run(steps, SVI)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found, svi = run(steps, captured_svi)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_equal(ours, theirs, f"step {i}")
    return svi, [str(w.message) for w in noted if "captured." in str(w.message)]


# ---- a pair that most of them use ----


def guide(*args, **kwargs):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    return pyro.sample("z", dist.Normal(loc, scale))


def observed(z, data, scale=1.0):
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, scale), obs=data)


def model(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)


def batch(i):
    return torch.linspace(-1, 2, 5) * (1 + 0.1 * i)


# ---- what does not change ----


@program()
def plain(svi_of):
    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def long_enough_for_several_checks(svi_of):
    svi = svi_of(model, guide)
    for i in range(40):
        yield svi.step(batch(i))


@program()
def two_shapes_in_turn(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(batch(i)[: 5 - i % 2])


@program()
def no_arguments(svi_of):
    def closed():
        model(DATA)

    svi = svi_of(closed, guide)
    for _ in range(STEPS):
        yield svi.step()


@program()
def keyword_arguments(svi_of):
    def model(data, *, scale):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i), scale=0.5)


# ---- Python state: globals ----

BATCH = DATA
NUMBER = 1.0
COUNT = 2
SETTINGS: dict = {}
NUMBERS: list = []
TOLD = None


def of_globals():
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), BATCH)


@program()
def a_minibatch_in_a_global(svi_of):
    global BATCH
    svi = svi_of(of_globals, guide)
    for i in range(STEPS):
        BATCH = batch(i)
        yield svi.step()


@program()
def a_minibatch_in_a_global_of_another_length(svi_of):
    global BATCH
    svi = svi_of(of_globals, guide)
    for i in range(12):
        BATCH = batch(i)[: 5 if i < 6 else 3]
        yield svi.step()


@program()
def a_minibatch_that_is_written_in_place(svi_of):
    global BATCH
    svi = svi_of(of_globals, guide)
    BATCH = torch.zeros(5)
    for i in range(STEPS):
        BATCH.copy_(batch(i))
        yield svi.step()


def with_number(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, NUMBER)


@program()
def a_number_in_a_global_that_is_annealed(svi_of):
    global NUMBER
    svi = svi_of(with_number, guide)
    for i in range(STEPS):
        NUMBER = 1.0 + 0.1 * i
        yield svi.step(DATA)


@program()
def a_number_in_a_global_that_changes_once(svi_of):
    global NUMBER
    svi = svi_of(with_number, guide)
    for i in range(12):
        NUMBER = 1.0 if i < 5 else 2.0
        yield svi.step(DATA)


def with_annealed_factor(data):
    with poutine.scale(scale=NUMBER):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observed(z, data)


@program()
def a_number_in_a_handler_inside(svi_of):
    global NUMBER
    svi = svi_of(with_annealed_factor, guide)
    for i in range(STEPS):
        NUMBER = 0.1 + 0.1 * i
        yield svi.step(DATA)


def with_a_branch_on_a_number(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observed(z, data, 2.0 if NUMBER > 0.5 else 1.0)


@program()
def a_number_that_is_branched_on(svi_of):
    global NUMBER
    svi = svi_of(with_a_branch_on_a_number, guide)
    for i in range(12):
        NUMBER = 0.1 if i < 6 else 0.9
        yield svi.step(DATA)


@program(captured=False, says="NUMBER")
def a_number_that_is_annealed_and_branched_on(svi_of):
    global NUMBER
    svi = svi_of(with_a_branch_on_a_number, guide)
    for i in range(12):
        NUMBER = 0.1 * i
        yield svi.step(DATA)


def with_math(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, math.exp(NUMBER))


@program(captured=False, says="NUMBER")
def a_number_that_is_annealed_through_math(svi_of):
    global NUMBER
    svi = svi_of(with_math, guide)
    for i in range(12):
        NUMBER = 0.1 * i
        yield svi.step(DATA)


def counted(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for _ in range(COUNT):
        z = z * 1.1
    observed(z, data)


@program()
def a_whole_number_in_a_global(svi_of):
    global COUNT
    svi = svi_of(counted, guide)
    for i in range(12):
        COUNT = 1 if i < 6 else 3
        yield svi.step(DATA)


def with_settings(data):
    scale = SETTINGS["scale"] * NUMBERS[0]
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)


@program()
def a_number_in_a_dictionary(svi_of):
    SETTINGS.update(scale=1.0)
    NUMBERS[:] = [1.0]
    svi = svi_of(with_settings, guide)
    for i in range(STEPS):
        SETTINGS["scale"] = 1.0 + 0.1 * i
        yield svi.step(DATA)


@program()
def a_number_in_a_list(svi_of):
    SETTINGS.update(scale=1.0)
    NUMBERS[:] = [1.0]
    svi = svi_of(with_settings, guide)
    for i in range(12):
        NUMBERS[0] = 1.0 if i < 6 else 3.0
        yield svi.step(DATA)


def by_a_helper(data):
    observed(helper(), data)


def helper():
    return pyro.sample("z", dist.Normal(0.0, NUMBER))


@program()
def a_number_that_a_helper_names(svi_of):
    global NUMBER
    svi = svi_of(by_a_helper, guide)
    for i in range(12):
        NUMBER = 1.0 if i < 6 else 3.0
        yield svi.step(DATA)


def told(data):
    if TOLD is not None:
        data = data + TOLD
    model(data)


@program()
def a_global_that_is_none_at_first(svi_of):
    global TOLD
    svi = svi_of(told, guide)
    for i in range(12):
        TOLD = None if i < 6 else torch.ones(5)
        yield svi.step(DATA)
    TOLD = None


def by_numpy(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, float(NUMBER))


@program()
def a_numpy_number_in_a_global(svi_of):
    global NUMBER
    svi = svi_of(by_numpy, guide)
    for i in range(12):
        NUMBER = np.float32(1.0 if i < 6 else 3.0)
        yield svi.step(DATA)


ARRAY = np.ones(3)


def with_array(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, float(ARRAY[1]))


@program()
def a_numpy_array_that_is_written(svi_of):
    svi = svi_of(with_array, guide)
    for i in range(12):
        ARRAY[1] = 1.0 if i < 6 else 3.0
        yield svi.step(DATA)


config = types.SimpleNamespace(scale=1.0, unused=0)


def with_config(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, config.scale)


@program()
def an_attribute_of_an_object(svi_of):
    svi = svi_of(with_config, guide)
    for i in range(STEPS):
        config.scale = 1.0 + 0.1 * i
        config.unused = i  # no program reads it
        yield svi.step(DATA)


class Settings:
    scale = 1.0


def with_class(data):
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, Settings.scale)


@program()
def an_attribute_of_a_class(svi_of):
    svi = svi_of(with_class, guide)
    for i in range(12):
        Settings.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)
    Settings.scale = 1.0


SCALES = types.MappingProxyType({"one": 1.0})


@program()
def a_law_in_a_global(svi_of):
    svi = svi_of(with_law, guide)
    global LAW
    for i in range(12):
        if i in (0, 6):
            LAW = dist.Normal(0.0, 1.0 + i)
        yield svi.step(DATA)


LAW = dist.Normal(0.0, 1.0)


def with_law(data):
    observed(pyro.sample("z", LAW), data)


# ---- Python state: closures, arguments, attributes ----


@program()
def a_minibatch_in_a_closure(svi_of):
    data = DATA

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        data = batch(i)
        yield svi.step()


@program()
def a_number_in_a_closure(svi_of):
    scale = 1.0

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        scale = 1.0 + 0.1 * i
        yield svi.step(DATA)


@program()
def a_number_in_a_lambda_of_a_closure(svi_of):
    scale = 1.0
    spread = lambda: 2 * scale  # noqa: E731

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, spread())

    svi = svi_of(model, guide)
    for i in range(12):
        scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def a_minibatch_by_number_in_a_list(svi_of):
    batches = [batch(i) for i in range(3)]
    at = 0

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), batches[at])

    svi = svi_of(model, guide)
    for i in range(15):
        at = i % 3
        yield svi.step()


@program()
def a_default_argument(svi_of):
    def model(data, scales=[1.0]):  # noqa: B006
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scales[0])

    svi = svi_of(model, guide)
    for i in range(12):
        model.__defaults__[0][0] = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def an_attribute_of_a_function(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, model.scale)

    model.scale = 1.0
    svi = svi_of(model, guide)
    for i in range(12):
        model.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def a_partial(svi_of):
    given = {"scale": 1.0}

    def model(data, scale):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    bound = partial(model, **given)
    svi = svi_of(bound, guide)
    for i in range(12):
        bound.keywords["scale"] = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


class Trained:
    """Model, guide and training in one object, whose other attributes change at every step."""

    def __init__(self):
        self.data, self.scale = DATA, 1.0
        self.losses, self.steps = [], 0

    def model(self):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), self.data, self.scale)


@program()
def a_method(svi_of):
    whole = Trained()
    svi = svi_of(whole.model, guide)
    for i in range(STEPS):
        whole.data = batch(i)
        whole.losses.append(svi.step())
        whole.steps += 1
        yield whole.losses[-1]


@program()
def a_number_of_an_object_that_is_annealed(svi_of):
    whole = Trained()
    svi = svi_of(whole.model, guide)
    for i in range(STEPS):
        whole.scale = 1.0 + 0.2 * i
        yield svi.step()


@dataclass
class Inner:
    scale: float = 1.0


class Outer:
    def __init__(self):
        self.inner = Inner()

    @property
    def twice(self):
        return 2 * self.inner.scale

    def __call__(self, data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, self.twice)


@program()
def an_object_in_an_object_behind_a_property(svi_of):
    whole = Outer()
    svi = svi_of(whole, guide)
    for i in range(12):
        whole.inner.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def an_object_that_is_replaced(svi_of):
    whole = Outer()
    svi = svi_of(whole, guide)
    for i in range(12):
        if i in (0, 6):
            whole.inner = Inner(1.0 + i)
        yield svi.step(DATA)


class Slots:
    __slots__ = ("scale",)


@program()
def an_attribute_in_a_slot(svi_of):
    slots = Slots()

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, slots.scale)

    svi = svi_of(model, guide)
    for i in range(12):
        slots.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def an_attribute_by_getattr(svi_of):
    whole = Inner()

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, getattr(whole, "scale"))  # noqa: B009

    svi = svi_of(model, guide)
    for i in range(12):
        whole.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def an_argument_that_is_in_a_closure_as_well(svi_of):
    fixed = DATA.clone()

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + fixed.mean(), data)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(fixed if i < 4 or i > 10 else batch(i))


@program()
def an_argument_that_is_always_in_a_global_as_well(svi_of):
    global BATCH

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + BATCH.mean(), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        BATCH = batch(i)
        yield svi.step(BATCH)


@program()
def two_names_of_one_tensor_part(svi_of):
    first = second = DATA

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), first + 0.5 * second)

    svi = svi_of(model, guide)
    for i in range(12):
        if i > 5:
            second = batch(i)
        yield svi.step()


@program()
def one_tensor_or_two_in_turn(svi_of):
    first = second = DATA

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), first + 0.5 * second)

    svi = svi_of(model, guide)
    for i in range(16):
        second = DATA if i % 2 else batch(i)
        yield svi.step()


@program()
def data_of_condition(svi_of):
    def free(n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": DATA}
    svi = svi_of(poutine.condition(free, data=data), guide)
    for i in range(STEPS):
        data["x"] = batch(i)
        yield svi.step(5)


@program()
def a_scale_around_the_model(svi_of):
    handler = poutine.scale(scale=1.0)
    svi = svi_of(handler(model), guide)
    for i in range(STEPS):
        handler.scale = 1.0 + 0.1 * i
        yield svi.step(DATA)


# ---- the ELBO and the SVI ----


@program()
def particles_that_change(svi_of):
    elbo = Trace_ELBO()
    svi = svi_of(model, guide, elbo)
    for i in range(12):
        elbo.num_particles = 1 if i < 6 else 3
        yield svi.step(DATA)


class Scaled(Trace_ELBO):
    weight = 1.0

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs) * self.weight
        loss.backward()
        return loss.item()


@program()
def an_elbo_of_ones_own(svi_of):
    elbo = Scaled()
    svi = svi_of(model, guide, elbo)
    for i in range(STEPS):
        elbo.weight = 1.0 + 0.1 * i
        yield svi.step(DATA)


@program()
def an_svi_that_is_given_another_model(svi_of):
    def other(data):
        observed(pyro.sample("z", dist.Normal(0.0, 2.0)), data)

    svi = svi_of(model, guide)
    for i in range(12):
        svi.model = model if i < 6 else other
        yield svi.step(DATA)


@program()
def an_svi_that_is_given_another_loss(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            svi.loss_and_grads = Trace_ELBO(num_particles=2).loss_and_grads
        yield svi.step(DATA)


@program()
def another_optimizer(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            svi.optim = pyro.optim.SGD({"lr": 0.01})
        yield svi.step(DATA)


@program()
def beta_around_the_step(svi_of):
    svi = svi_of(model, guide)
    for i in range(STEPS):
        with temper(i / STEPS):
            yield svi.step(DATA)


# ---- modules ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(1, 5), nn.Dropout(0.5)
        self.factor, self.settings, self.inner = 1.0, {"shift": 0.0}, Inner()

    def forward(self, z):
        return self.decode(z)

    def decode(self, z):
        shift = self.settings["shift"] + self.inner.scale
        return self.drop(self.layer(z)) * float(self.factor) + shift


def of_net(by_name):
    """Returns a module, a model that decodes by it, and the guide."""

    def model(net, data):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        mean = net.decode(z) if by_name else net(z)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=data)

    def guide(data):
        loc = pyro.param("loc", torch.zeros(1))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    net = Net()
    return net, partial(model, net), guide


@program()
def a_module_called_by_a_method(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(15):
        net.train(i < 5 or i > 9)
        yield svi.step(DATA)


@program()
def a_module_in_a_closure(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        net.train(i < 6)
        yield svi.step(DATA)


@program()
def a_dropout_that_changes(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(12):
        net.drop.p = 0.5 if i < 6 else 0.1
        yield svi.step(DATA)


@program()
def a_numpy_number_of_a_module(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(12):
        net.factor = np.float64(1.0 if i < 6 else 3.0)
        yield svi.step(DATA)


@program()
def a_dictionary_of_a_module(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(12):
        net.settings["shift"] = 0.0 if i < 6 else 3.0
        yield svi.step(DATA)


@program()
def an_object_of_a_module(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(12):
        net.inner.scale = 0.0 if i < 6 else 3.0
        yield svi.step(DATA)


@program()
def a_layer_that_is_replaced(svi_of):
    net, model, guide = of_net(by_name=True)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            pyro.clear_param_store()
            torch.manual_seed(5)
            net.layer = nn.Linear(1, 5)
        yield svi.step(DATA)


@program()
def a_forward_hook_after_the_capture(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.layer.register_forward_hook(lambda module, args, out: out * 2)
        yield svi.step(DATA)


@program()
def a_pre_hook_before_the_capture(svi_of):
    net, model, guide = of_net(by_name=False)
    hook = net.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            hook.remove()
        yield svi.step(DATA)


@program(captured=False, says="hook is registered on a parameter")
def a_hook_on_a_parameter(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.layer.weight.register_hook(lambda g: g * 2)
        yield svi.step(DATA)


@program(captured=False, says="hook is registered on a parameter")
def a_hook_after_the_gradient(svi_of):
    net, model, guide = of_net(by_name=False)
    norms = []
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.layer.weight.register_post_accumulate_grad_hook(
                lambda p: norms.append(p.grad.norm())
            )
        yield svi.step(DATA), list(norms)


@program()
def a_hook_of_all_modules(svi_of):
    _, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for _ in range(6):
        yield svi.step(DATA)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        for _ in range(6):
            yield svi.step(DATA)
    finally:
        hook.remove()


@program()
def batch_norm(svi_of):
    norm = nn.BatchNorm1d(1)

    def model(data):
        pyro.module("norm", norm)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z, norm(data[:, None])[:, 0])

    svi = svi_of(model, guide)
    for i in range(12):
        norm.train(i < 8)
        yield svi.step(batch(i)), norm.running_mean, norm.running_var, norm.num_batches_tracked


@program()
def spectral_norm(svi_of):
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 5))

    def model(data):
        pyro.module("layer", layer)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=data)

    def guide(data):
        loc = pyro.param("loc", torch.zeros(1))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        loss = svi.step(DATA)
        assert type(layer.parametrizations.weight[0]._u) is torch.Tensor
        yield loss, layer.weight


@program()
def weight_norm(svi_of):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(1, 5))

    def model(data):
        pyro.module("layer", layer)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=data)

    def guide(data):
        loc = pyro.param("loc", torch.zeros(1))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


# ---- gradients: None, zero, of other parameters, of an earlier step ----

USED = True


def sometimes(data):
    shift = pyro.param("shift", torch.tensor(0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observed(z + shift if USED else z, data)


@program()
def a_parameter_that_is_not_used_any_more(svi_of):
    global USED
    svi = svi_of(sometimes, guide)
    for i in range(15):
        USED = i < 6 or i > 11
        yield svi.step(DATA)
    USED = True


@program()
def a_parameter_that_is_never_used(svi_of):
    global USED
    USED = False
    svi = svi_of(sometimes, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)
    USED = True


@program()
def a_parameter_outside_of_the_store(svi_of):
    free = torch.tensor(0.5, requires_grad=True)
    adam = torch.optim.Adam([free], lr=0.05)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + free, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        loss = svi.step(DATA)
        gradient = free.grad.clone()
        if i % 2:
            adam.step()
            adam.zero_grad(set_to_none=i > 5)
        yield loss, gradient, free


@program()
def gradients_of_before(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i % 3 == 2:
            for p in pyro.get_param_store()._params.values():
                p.grad = torch.full_like(p, 0.3 * i)
        yield svi.step(DATA)


@program()
def gradients_that_are_taken_away(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i % 3 == 2:
            for p in pyro.get_param_store()._params.values():
                p.grad = None
        yield svi.step(DATA)


@program()
def an_optimizer_that_writes_to_gradients(svi_of):
    svi = svi_of(sometimes, guide, optim=pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.1}))
    for _ in range(STEPS):
        yield svi.step(DATA)


@program()
def frozen_by_detach(svi_of):
    def model(data):
        shift = pyro.param("shift", torch.tensor(0.5))
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + shift.detach(), data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


# ---- the store ----


@program()
def a_parameter_that_is_set(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            pyro.get_param_store()["scale"] = torch.tensor(2.0)
        yield svi.step(DATA)


@program()
def a_parameter_with_another_constraint(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            del pyro.get_param_store()["scale"]
            pyro.param("scale", torch.tensor(0.5), constraint=constraints.unit_interval)
        yield svi.step(DATA)


@program()
def a_cleared_store(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            pyro.clear_param_store()
        yield svi.step(DATA)


@program(captured=False, says="Pyro's store")
def a_new_parameter_at_every_step(svi_of):
    made = itertools.count().__next__

    def model(data):
        pyro.param(f"new{len(pyro.get_param_store())}", torch.tensor(0.1))
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    del made
    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


# ---- random numbers ----


@program()
def a_draw_that_nothing_depends_on(svi_of):
    def model(data):
        torch.randn(3)
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)
        torch.rand(2)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program()
def a_latent_that_nothing_depends_on(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)
        pyro.sample("w", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    def guide_of_both(data):
        guide(data)
        pyro.sample("w", dist.Normal(0.0, 1.0))

    svi = svi_of(model, guide_of_both)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False)
def a_seed_inside(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        torch.manual_seed(3)
        observed(z + 0.1 * torch.randn(5), data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False)
def a_seed_at_the_end(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)
        torch.manual_seed(3)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False)
def forked_random_numbers(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with torch.random.fork_rng():
            noise = torch.randn(5)
        observed(z + 0.1 * noise, data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False, says="random numbers of Python")
def random_numbers_of_python(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + 0.1 * random.random())

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False, says="random numbers of Python")
def random_numbers_of_numpy(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + 0.1 * np.random.rand())  # noqa: NPY002

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False, says="a generator of one's own")
def a_numpy_generator(svi_of):
    rng = np.random.default_rng(0)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + 0.1 * rng.random())

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), str(rng.bit_generator.state)


@program(captured=False, says="a generator of one's own")
def a_python_generator(svi_of):
    rng = random.Random(0)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + 0.1 * rng.random())

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), rng.getstate()[1]


@program(captured=False, says="a generator of one's own")
def a_torch_generator(svi_of):
    rng = torch.Generator().manual_seed(0)

    def model(data):
        noise = 0.1 * torch.randn(5, generator=rng)
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + noise)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), rng.get_state()


# ---- surroundings ----


@program()
def no_grad_inside(svi_of):
    def model(data):
        with torch.no_grad():
            data = data * 2
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def no_grad_around_a_step(svi_of):
    svi = svi_of(model, guide)
    for i in range(12):
        with torch.no_grad() if 5 < i < 8 else contextlib.nullcontext():
            yield svi.step(DATA)


@program()
def grad_inside_no_grad(svi_of):
    def model(data):
        shift = pyro.param("shift", torch.tensor(0.5))
        with torch.no_grad():
            half = shift * 0.5
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + half + shift, data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=None)
def inference_mode_inside(svi_of):
    def model(data):
        with torch.inference_mode():
            twice = data * 2
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), twice.clone())

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def another_default_dtype(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z * torch.ones(()), data)

    svi = svi_of(model, guide)
    try:
        for i in range(12):
            torch.set_default_dtype(torch.float32 if i < 6 else torch.float64)
            yield svi.step(DATA)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- what programs could notice of tracing ----


@program(captured=False, says="`calls`|change `n`")
def a_counter(svi_of):
    n = 0

    def model(data):
        nonlocal n
        n += 1
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), n


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, data):
        self.calls += 1
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)


@program(captured=False, says=r"change `model\.calls`")
def a_counter_of_a_module(svi_of):
    counting = Counting()
    svi = svi_of(counting, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), counting.calls


@program(captured=False, says="change `kept")
def a_list_that_grows(svi_of):
    kept = []

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        kept.append(z.detach())
        observed(z, data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        loss = svi.step(DATA)
        assert all(type(z) is torch.Tensor for z in kept)
        yield loss, list(kept)


@program(captured=False, says="change `kept")
def a_tensor_that_is_kept(svi_of):
    kept = {}

    def model(data):
        kept["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(kept["z"], data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), kept["z"]


@program(captured=False, says="iterator `batches`")
def an_iterator(svi_of):
    batches = iter([batch(i) for i in range(STEPS)])

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), next(batches))

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step()


@program(captured=False, says="iterator `batches`")
def a_generator(svi_of):
    batches = (batch(i) for i in range(STEPS))

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), next(batches))

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step()


@program(captured=False, says="ask for the value of a tensor, in `.*model")
def a_branch_on_a_value(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(-z if z > 0 else z, data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False, says="the values of a tensor decide the shape of another, in `.*model")
def a_shape_by_a_value(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data[data > 0])

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


# ---- changes that cannot be looked up, but that a check finds ----

HIDDEN_A = 1.0


@program(captured=False, says="number of calls that may be wrong: ")
def a_name_that_is_put_together(svi_of):
    def model(data):
        scale = globals()["_".join(["HIDDEN", "A"])]
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    global HIDDEN_A
    HIDDEN_A = 1.0
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 4:  # the step before a check
            HIDDEN_A = 2.0
        yield svi.step(DATA)
    HIDDEN_A = 1.0


# ---- laws, handlers and objectives of Pyro ----


@program()
def particles_in_a_plate(svi_of):
    svi = svi_of(model, guide, Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(STEPS):
        yield svi.step(DATA)


@program()
def renyi(svi_of):
    svi = svi_of(model, guide, RenyiELBO(0.5, 3, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(STEPS):
        yield svi.step(DATA)


@program()
def tail_adaptive(svi_of):
    elbo = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = svi_of(model, guide, elbo)
    for _ in range(STEPS):
        yield svi.step(DATA)


@config_enumerate
def mixture(data):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(data)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=data)


@program()
def a_mixture(svi_of):
    guide = AutoNormal(poutine.block(mixture, expose=["loc"]))
    svi = svi_of(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1))
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def an_enumerated_guide(svi_of):
    def guide(data):
        logits = pyro.param("logits", torch.zeros(5, 3))
        loc = pyro.param("at", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("components", 3):
            pyro.sample("loc", dist.Delta(loc))
        with pyro.plate("data", len(data)):
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    svi = svi_of(
        poutine.infer_config(mixture, lambda site: {"enumerate": None}),
        guide,
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def an_enumerated_guide_in_sequence(svi_of):
    def model(data):
        on = pyro.sample("on", dist.Bernoulli(0.5))
        observed(on * 2.0, data)

    @partial(config_enumerate, default="sequential")
    def guide(data):
        pyro.sample(
            "on", dist.Bernoulli(pyro.param("p", torch.tensor(0.3), constraints.unit_interval))
        )

    svi = svi_of(model, guide, TraceEnum_ELBO(max_plate_nesting=1))
    for i in range(STEPS):
        yield svi.step(batch(i))


@config_enumerate
def hmm(data):
    move = pyro.param("move", torch.eye(2) * 0.5 + 0.25, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    state = 0
    for t in pyro.markov(range(len(data))):
        state = pyro.sample(f"s{t}", dist.Categorical(move[state]))
        pyro.sample(f"x{t}", dist.Normal(loc[state], 1.0), obs=data[t])


@program()
def a_hidden_markov_model(svi_of):
    svi = svi_of(hmm, lambda data: None, TraceEnum_ELBO(max_plate_nesting=0))
    for i in range(STEPS):
        yield svi.step(batch(i))


def discrete(data):
    on = pyro.sample("on", dist.Bernoulli(0.5))
    observed(on * 2.0, data)


def discrete_guide(data):
    p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
    pyro.sample("on", dist.Bernoulli(p))


@program()
def a_score_function(svi_of):
    svi = svi_of(discrete, discrete_guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_score_function_by_the_graph(svi_of):
    svi = svi_of(discrete, discrete_guide, TraceGraph_ELBO())
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says="Pyro's store")
def a_baseline_that_decays(svi_of):
    def guide(data):
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        pyro.sample(
            "on", dist.Bernoulli(p), infer={"baseline": {"use_decaying_avg_baseline": True}}
        )

    svi = svi_of(discrete, guide, TraceGraph_ELBO())
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_baseline_of_a_net(svi_of):
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0), Sum())

    def guide(data):
        pyro.module("net", net)
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        baseline = {"nn_baseline": net, "nn_baseline_input": data}
        pyro.sample("on", dist.Bernoulli(p), infer={"baseline": baseline})

    svi = svi_of(discrete, guide, TraceGraph_ELBO())
    for i in range(STEPS):
        yield svi.step(batch(i))


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


@program()
def mean_field(svi_of):
    svi = svi_of(model, guide, TraceMeanField_ELBO())
    for i in range(STEPS):
        yield svi.step(batch(i))


def of_law(law, whole=False):
    """Returns a program that observes data, or whole numbers, under `law(z)` of a latent z."""

    def run(svi_of):
        def model(data):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(data)):
                pyro.sample("x", law(z), obs=data)

        svi = svi_of(model, guide)
        for i in range(STEPS):
            data = batch(i).abs() + 1.5
            yield svi.step(data.round() if whole else data)

    return run


for _name, _law in {
    "laplace": lambda z: dist.Laplace(z, torch.tensor(1.0)),
    "cauchy": lambda z: dist.Cauchy(z, torch.tensor(1.0)),
    "student": lambda z: dist.StudentT(3.0, z, 1.0),
    "weibull": lambda z: dist.Weibull(z.exp(), torch.tensor(1.5)),
    "pareto": lambda z: dist.Pareto(z.sigmoid(), torch.tensor(1.5)),
    "gamma": lambda z: dist.Gamma(z.exp(), 1.0),
    "log normal": lambda z: dist.LogNormal(z, 1.0),
    "gumbel": lambda z: dist.Gumbel(z, torch.tensor(1.0)),
    "validated": lambda z: dist.Normal(z, 1.0, validate_args=True),
}.items():
    PROGRAMS[f"observed under {_name}"] = Program(of_law(_law), True, "")


def of_latent(law, by):
    """Returns a program whose latent has the prior `law(1)` and the guide `by(p)`."""

    def run(svi_of):
        def model(data):
            z = pyro.sample("z", law(torch.tensor(1.0)))
            observed(z.reshape(-1)[0], data)

        def guide(data):
            p = pyro.param("p", torch.tensor(0.8), constraint=constraints.positive)
            pyro.sample("z", by(p))

        svi = svi_of(model, guide)
        for i in range(STEPS):
            yield svi.step(batch(i))

    return run


for _name, _law in {
    "laplace": lambda p: dist.Laplace(p, p),
    "cauchy": lambda p: dist.Cauchy(p, p),
    "weibull": lambda p: dist.Weibull(p, p),
    "pareto": lambda p: dist.Pareto(torch.tensor(1.0), p),
    "gamma": lambda p: dist.Gamma(p, p),
    "beta": lambda p: dist.Beta(p, p),
    "dirichlet": lambda p: dist.Dirichlet(p.expand(3)),
    "lkj": lambda p: dist.LKJCholesky(3, p),
    "gumbel": lambda p: dist.Gumbel(p, p),
    "relaxed": lambda p: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=p),
    "multivariate": lambda p: dist.MultivariateNormal(torch.zeros(2), torch.eye(2) * p),
}.items():
    PROGRAMS[f"a latent under {_name}"] = Program(of_latent(_law, _law), True, "")


def of_autoguide(kind):
    def run(svi_of):
        def model(data):
            with pyro.plate("pair", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.HalfNormal(1.0))
            observed(z.sum(), data, s + 0.1)

        svi = svi_of(model, kind(model))
        for i in range(STEPS):
            yield svi.step(batch(i))

    return run


for _kind in (
    AutoNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
):
    PROGRAMS[_kind.__name__] = Program(of_autoguide(_kind), True, "")


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.spread = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, data):
        mean = self.layer(data[:, None])[:, 0]
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mean, self.spread), obs=2 * data)


@program()
def a_pyro_sample(svi_of):
    net = Bayesian()
    svi = svi_of(net, AutoNormal(net))
    for i in range(STEPS):
        yield svi.step(batch(i))


def of_recurrent(kind):
    def run(svi_of):
        net = kind(1, 3)

        def model(data):
            pyro.module("net", net)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observed(z + net(data[:, None])[0].sum(-1), data)

        svi = svi_of(model, guide)
        for i in range(STEPS):
            yield svi.step(batch(i))

    return run


for _kind in (nn.GRU, nn.LSTM, nn.RNN):
    PROGRAMS[f"recurrent {_kind.__name__}"] = Program(of_recurrent(_kind), True, "")


@program()
def vmap_inside(svi_of):
    offset = torch.tensor(0.5)

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(torch.vmap(lambda d: d * offset + z)(data), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def checkpointing(svi_of):
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def model(data):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = torch.utils.checkpoint.checkpoint(net, data[:, None], use_reentrant=False)
        observed(z + mean[:, 0], data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def subsampled_rows(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def masked(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=data > 0):
            observed(z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_factor(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(data - z).square().sum())

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_loss_that_is_not_a_number(svi_of):
    svi = svi_of(model, guide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN")
        pyro.enable_validation(False)
        try:
            for i in range(12):
                yield svi.step(DATA * (float("nan") if i > 6 else 1.0))
        finally:
            pyro.enable_validation(True)


# ---- more of everything, and combinations ----


@program()
def a_number_among_the_arguments_that_is_annealed(svi_of):
    def model(data, scale):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i), 1.0 + 0.1 * i)


@program(captured=False, says="an argument|among the arguments")
def a_number_among_the_arguments_that_is_branched_on(svi_of):
    def model(data, scale):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale if scale > 1.2 else 0.5)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(batch(i), 1.0 + 0.1 * i)


@program()
def two_numbers_and_a_minibatch(svi_of):
    global BATCH, NUMBER
    shift = 0.0

    def model(weight):
        with poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + shift, BATCH, NUMBER)

    svi = svi_of(model, guide)
    for i in range(12):
        BATCH, NUMBER, shift = batch(i), 1.0 + 0.1 * i, 0.2 * i
        yield svi.step(0.5 + 0.1 * i)


@program()
def numbers_that_change_one_after_the_other(svi_of):
    whole = types.SimpleNamespace(a=1.0, b=1.0)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, whole.a)), data, whole.b)

    svi = svi_of(model, guide)
    for i in range(20):
        if i > 6:
            whole.a += 0.1
        if i > 12:
            whole.b += 0.1
        yield svi.step(DATA)


@program()
def a_temperature(svi_of):
    def model(data):
        observed(pyro.sample("z", relaxed(torch.tensor(0.0))), data)

    def guide(data):
        pyro.sample("z", relaxed(pyro.param("logit", torch.tensor(0.3))))

    def relaxed(logit):
        return dist.RelaxedBernoulli(torch.ones(()) * NUMBER, logits=logit)

    global NUMBER
    svi = svi_of(model, guide)
    for i in range(STEPS):
        NUMBER = 1.0 / (1 + 0.1 * i)
        yield svi.step(DATA)


@program()
def a_spread_of_the_prior_that_is_annealed(svi_of):
    global NUMBER
    svi = svi_of(by_a_helper, guide)
    for i in range(STEPS):
        NUMBER = 1.0 + 0.1 * i
        yield svi.step(DATA)


@program(captured=False, says="COUNT")
def a_whole_number_that_always_changes(svi_of):
    global COUNT
    svi = svi_of(counted, guide)
    for i in range(12):
        COUNT = i
        yield svi.step(DATA)


@program(captured=False, says="time")
def the_time(svi_of):
    def model(data):
        elapsed = time.perf_counter() * 0.0
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + elapsed)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


LARGE = np.linspace(-1, 1, 5000)


@program()
def a_large_numpy_array_that_is_written_once(svi_of):
    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), torch.tensor(LARGE[:50]).float())

    LARGE[:] = np.linspace(-1, 1, 5000)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            LARGE[:] *= -2
        yield svi.step()


@program()
def a_buffer_that_is_written_in_place(svi_of):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, data):
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * data.mean())
            observed(pyro.sample("z", dist.Normal(self.mean, 1.0)), data)

    net = Mean()
    svi = svi_of(net, guide)
    for i in range(12):
        yield svi.step(batch(i)), net.mean


@program(captured=False, says=r"change `model\.mean`")
def a_buffer_that_is_replaced(svi_of):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, data):
            self.mean = 0.9 * self.mean + 0.1 * data.mean()
            observed(pyro.sample("z", dist.Normal(self.mean, 1.0)), data)

    net = Mean()
    svi = svi_of(net, guide)
    for i in range(12):
        yield svi.step(batch(i)), net.mean


@program()
def a_layer_that_is_frozen(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        for i in range(15):
            net.layer.weight.requires_grad_(i < 5 or i > 9)
            yield svi.step(DATA)


@program()
def weights_that_are_loaded(svi_of):
    net, model, guide = of_net(by_name=False)
    before = copy.deepcopy(net.state_dict())
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.load_state_dict(before)
        yield svi.step(DATA)


@program()
def a_list_of_modules(svi_of):
    nets = [nn.Linear(1, 5), nn.Dropout(0.5)]

    def model(data):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        for i, net in enumerate(nets):
            pyro.module(f"net{i}", net)
            z = net(z)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide(data):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))

    svi = svi_of(model, guide)
    for i in range(15):
        nets[1].train(i < 5)
        if i == 10:
            nets.append(nn.Softplus())
        yield svi.step(DATA)


@program()
def a_function_that_is_replaced(svi_of):
    whole = types.SimpleNamespace(link=torch.exp)

    def model(data):
        observed(whole.link(pyro.sample("z", dist.Normal(0.0, 1.0))), data)

    svi = svi_of(model, guide)
    for i in range(12):
        whole.link = torch.exp if i < 6 else torch.tanh
        yield svi.step(DATA)


@program()
def a_law_by_name(svi_of):
    whole = {"law": "Normal"}

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", getattr(dist, whole["law"])(z, 1.0), obs=data)

    svi = svi_of(model, guide)
    for i in range(12):
        whole["law"] = "Normal" if i < 6 else "Laplace"
        yield svi.step(DATA)


@program()
def two_svis_over_one_store(svi_of):
    first = svi_of(model, guide)
    second = svi_of(with_number, guide)
    global NUMBER
    NUMBER = 2.0
    for i in range(12):
        yield (first if i % 2 else second).step(batch(i))


@program()
def steps_and_evaluations_in_turn(svi_of):
    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i)), svi.evaluate_loss(batch(i))


@program()
def a_loss_function_of_ones_own(svi_of):
    weights = [1.0]

    def loss(model, guide, data):
        return weights[0] * Trace_ELBO().differentiable_loss(model, guide, data)

    svi = svi_of(model, guide, loss)
    for i in range(12):
        weights[0] = 1.0 if i < 6 else 2.0
        yield svi.step(batch(i))


@program()
def a_guide_with_a_net_and_labels(svi_of):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def guide(data, labels):
        pyro.module("net", net)
        both = torch.stack([data, labels.float()], -1)
        loc, scale = net(both).unbind(-1)
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    def model(data, labels):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(labels * 1.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        labels = torch.arange(5) % (2 + i % 2)
        yield svi.step(batch(i), labels), copy.deepcopy(net.state_dict())


@program()
def a_learning_rate_that_changes(svi_of):
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
    )
    svi = svi_of(model, guide, optim=optim)
    for i in range(STEPS):
        yield svi.step(batch(i))
        optim.step()


@program()
def lifted_parameters(svi_of):
    def model(data):
        loc = pyro.param("w", torch.tensor(0.1))
        observed(loc, data)

    lifted = poutine.lift(model, prior={"w": dist.Normal(0.0, 1.0)})

    def guide(data):
        pyro.sample("w", dist.Normal(pyro.param("at", torch.tensor(0.2)), 1.0))

    svi = svi_of(lifted, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_reparameterized_model(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 2.0))
        observed(z, data)

    other = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    svi = svi_of(other, AutoNormal(other))
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_flow(svi_of):
    flow = dist.transforms.affine_coupling(2, [4])

    def model(data):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observed(z.sum(), data)

    def guide(data):
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        loss = svi.step(batch(i))
        assert type(flow._cached_log_scale) is torch.Tensor
        yield loss


@program()
def what_is_kept_only_while_tracing(svi_of):
    kept, named, whole = [], {}, types.SimpleNamespace(z=1.0)
    last = None

    def model(data):
        nonlocal last
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if torch.compiler.is_compiling():
            kept.append(z)
            named["z"] = whole.z = last = z
        observed(z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i)), list(kept), dict(named), whole.z, last


@program(captured=False, says="the graph and the programs differ in the gradient of `shift`")
def a_gradient_that_is_zero_and_then_none(svi_of):
    def model(data):
        shift = pyro.param("shift", torch.tensor(0.5))
        used = globals()["_".join(["HIDDEN", "A"])] == 1.0
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + 0.0 * shift if used else z, data)

    global HIDDEN_A
    HIDDEN_A = 1.0
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 4:  # the step before a check
            HIDDEN_A = 2.0
        yield svi.step(DATA)
    HIDDEN_A = 1.0


@program(captured=False, says="number of calls that may be wrong: ")
def the_environment(svi_of):
    def model(data):
        scale = float(os.environ.get("PVAE_TEST_SCALE", "1.0"))
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    svi = svi_of(model, guide)
    try:
        for i in range(12):
            if i == 4:  # the step before a check
                os.environ["PVAE_TEST_SCALE"] = "2.0"
            yield svi.step(DATA)
    finally:
        del os.environ["PVAE_TEST_SCALE"]


# ---- still more ----


@program()
def a_minibatch_as_an_attribute_of_a_module(svi_of):
    class Holds(nn.Module):
        def forward(self):
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)), self.x)

    net = Holds()
    svi = svi_of(net, guide)
    for i in range(STEPS):
        net.x = batch(i)
        yield svi.step()


@program()
def a_buffer_that_is_given_anew(svi_of):
    net = nn.BatchNorm1d(1).eval()

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z, net(data[:, None])[:, 0].detach())

    svi = svi_of(model, guide)
    for i in range(STEPS):
        net.running_mean = torch.tensor([0.1 * i])
        yield svi.step(DATA)


@program()
def a_weight_that_is_given_anew(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            pyro.clear_param_store()
            net.layer.weight = nn.Parameter(torch.ones(5, 1))
        yield svi.step(DATA)


@program()
def weights_at_another_place(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.layer.weight.data = torch.ones(5, 1)
        yield svi.step(DATA)


@program(captured=False, says="change `Counter.calls")
def a_counter_of_a_class(svi_of):
    class Counter:
        calls = 0

    def model(data):
        Counter.calls += 1
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), Counter.calls


@program(captured=False, says="change `last")
def a_deque_that_is_written(svi_of):
    last = collections.deque(maxlen=3)

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        last.append(z.detach())
        observed(z, data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), list(last)


@program(captured=False, says="change `noted")
def a_numpy_array_that_is_written_inside(svi_of):
    noted = np.zeros(3)

    def model(data):
        noted[0] += 1
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), noted


@program()
def a_tensor_of_a_closure_that_is_written_inside(svi_of):
    mean = torch.zeros(())

    def model(data):
        with torch.no_grad():
            mean.mul_(0.9).add_(0.1 * data.mean())
        observed(pyro.sample("z", dist.Normal(mean, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(batch(i)), mean


@program(captured=False, says="generator of one's own")
def a_numpy_random_state(svi_of):
    rng = np.random.RandomState(0)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + 0.1 * rng.rand())

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


@program(captured=False)
def batches_by_a_function(svi_of):
    at = 0

    def next_batch():
        nonlocal at
        at += 1
        return batch(at)

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), next_batch())

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step()


@program(captured=False, says="ask for the value")
def rows_by_the_value_of_a_draw(svi_of):
    batches = [batch(i) for i in range(3)]

    def model():
        at = int(torch.randint(3, ()))
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), batches[at])

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step()


@program()
def a_branch_on_the_grad_mode(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z if torch.is_grad_enabled() else -z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i)), svi.evaluate_loss(DATA)


@program(captured=False)
def a_branch_on_compiling(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(-z if torch.compiler.is_compiling() else z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says="ask for the value")
def a_branch_in_a_try(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        try:
            up = bool(z > 0)
        except Exception:
            up = True
        observed(z if up else -2 * z, data)

    svi = svi_of(model, guide)
    for i in range(6):
        yield svi.step(batch(i))


@dataclass(frozen=True)
class Frozen:
    scale: float = 1.0
    name: str = "a"


@program()
def a_frozen_dataclass_that_is_replaced(svi_of):
    whole = types.SimpleNamespace(settings=Frozen())

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, whole.settings.scale)

    svi = svi_of(model, guide)
    for i in range(12):
        whole.settings = Frozen(1.0 if i < 6 else 2.0)
        yield svi.step(DATA)


class Kind(enum.Enum):
    SMALL = 0.5
    LARGE = 2.0


@program()
def an_enumeration(svi_of):
    whole = types.SimpleNamespace(kind=Kind.SMALL)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, whole.kind.value)

    svi = svi_of(model, guide)
    for i in range(12):
        whole.kind = Kind.SMALL if i < 6 else Kind.LARGE
        yield svi.step(DATA)


@program()
def parameters_that_are_read_from_a_file(svi_of):
    svi = svi_of(model, guide)
    store = pyro.get_param_store()
    for i in range(12):
        if i == 4:
            kept = copied(store.get_state())
        if i == 8:
            kept["params"] = {n: p.requires_grad_() for n, p in kept["params"].items()}
            store.set_state(kept)
        yield svi.step(batch(i))


@program()
def wake_and_sleep(svi_of):
    elbo = pyro.infer.ReweightedWakeSleep(2, vectorize_particles=True, max_plate_nesting=1)

    def free(data=None):
        z = pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(0.1)), 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    svi = svi_of(free, guide, elbo)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=None)
def energy_distance(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(0.1)), 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    svi = svi_of(model, guide, pyro.infer.EnergyDistance(num_particles=3))
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def attention(svi_of):
    net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def model(data):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + net(data[None, :, None].expand(1, 5, 4)).sum(-1)[0], data)

    svi = svi_of(model, guide)
    for i in range(12):
        net.train(i < 6)
        yield svi.step(batch(i))


@program()
def an_embedding_and_a_convolution(svi_of):
    names, net = nn.Embedding(3, 5), nn.Conv1d(1, 1, 3, padding=1)

    def model(data, at):
        pyro.module("names", names)
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + net(names(at)[None])[0], data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i), torch.tensor([i % 3]))


@program()
def old_spectral_norm(svi_of):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.spectral_norm(nn.Linear(1, 5))

    def model(data):
        pyro.module("layer", layer)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=data)

    def guide(data):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA), layer.weight_u


@program()
def a_gaussian_process(svi_of):
    x = torch.linspace(0, 1, 5)
    whole = gp.models.GPRegression(x, DATA, gp.kernels.RBF(1), noise=torch.tensor(0.5))
    svi = svi_of(whole.model, whole.guide)
    for i in range(12):
        if i > 5:
            whole.set_data(x, batch(i))
        yield svi.step()


for _kind in (
    pyro.infer.autoguide.AutoIAFNormal,
    pyro.infer.autoguide.AutoStructured,
    pyro.infer.autoguide.AutoGaussian,
):
    PROGRAMS[_kind.__name__] = Program(of_autoguide(_kind), True, "")


for _name, _law in {
    "a mixture": lambda z: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([z, -z]), 1.0)
    ),
    "poisson": lambda z: dist.Poisson(z.exp()),
    "negative binomial": lambda z: dist.NegativeBinomial(torch.tensor(3.0), logits=z),
    "zero inflated": lambda z: dist.ZeroInflatedPoisson(z.exp(), gate=torch.tensor(0.1)),
    "inverse gamma": lambda z: dist.InverseGamma(z.exp(), torch.tensor(1.0)),
    "skew": lambda z: dist.AsymmetricLaplace(z, 1.0, 2.0),
    "half normal": lambda z: dist.HalfNormal(z.exp()),
}.items():
    PROGRAMS[f"observed under {_name}"] = Program(
        of_law(_law, whole=_name in ("poisson", "negative binomial", "zero inflated")), True, ""
    )


@program()
def a_gaussian_hmm(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        one = torch.eye(1)
        law = dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(1), one),
            one * z.sigmoid(),
            dist.MultivariateNormal(torch.zeros(1), one),
            one,
            dist.MultivariateNormal(torch.zeros(1), one),
            duration=5,
        )
        pyro.sample("x", law, obs=data[:, None])

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_trace_inside(svi_of):
    inner = lambda: pyro.sample("w", dist.Normal(0.0, 1.0))  # noqa: E731

    def model(data):
        found = poutine.trace(poutine.block(inner)).get_trace()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + 0 * found.nodes["_RETURN"]["value"], data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


# ---- code that no program names ----


class Wide(dist.Normal):
    """A user's own distribution, whose methods Pyro calls."""

    def log_prob(self, value):
        return super().log_prob(value) * NUMBER


@program()
def a_law_of_ones_own(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", Wide(z, 1.0), obs=data)

    global NUMBER
    svi = svi_of(model, guide)
    for i in range(12):
        NUMBER = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


class Weighs(poutine.messenger.Messenger):
    def __init__(self):
        super().__init__()
        self.weight = 1.0

    def _pyro_sample(self, msg):
        msg["scale"] = msg["scale"] * self.weight * NUMBERS[0]


@program()
def a_handler_of_ones_own(svi_of):
    handler = Weighs()
    NUMBERS[:] = [1.0]
    svi = svi_of(handler(model), guide)
    for i in range(18):
        handler.weight = 1.0 if i < 6 else 2.0
        NUMBERS[0] = 1.0 if i < 12 else 2.0
        yield svi.step(DATA)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g * NUMBER


@program()
def a_gradient_of_ones_own(svi_of):
    def model(data):
        observed(Twice.apply(pyro.sample("z", dist.Normal(0.0, 1.0))), data)

    global NUMBER
    svi = svi_of(model, guide)
    for i in range(12):
        NUMBER = 2.0 if i < 6 else 3.0
        yield svi.step(DATA)


@program()
def a_forward_that_is_replaced(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(15):
        if i == 5:
            net.layer.forward = lambda z: z.expand(5) * 0.5
        if i == 10:
            net.forward = lambda z: z.expand(5) * 2
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            yield svi.step(DATA)


@program(captured=False, says="that are their arguments")
def arguments_that_are_changed(svi_of):
    def model(given):
        given["twice"] = given["data"] * 2
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), given["twice"])

    svi = svi_of(model, guide)
    for i in range(STEPS):
        given = {"data": batch(i)}
        loss = svi.step(given)
        assert type(given["twice"]) is torch.Tensor
        yield loss, given


@program()
def a_numpy_number_that_is_annealed(svi_of):
    global NUMBER
    svi = svi_of(with_number, guide)
    for i in range(STEPS):
        NUMBER = np.float64(1.0 + 0.1 * i)
        yield svi.step(DATA)


@program(captured=None)
def a_hook_on_the_gradients_of_a_module(svi_of):
    net, model, guide = of_net(by_name=False)
    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            net.layer.register_full_backward_hook(lambda module, g, h: (g[0] * 2,))
        yield svi.step(DATA)


@program()
def a_hook_on_a_draw(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.requires_grad:
            z.register_hook(lambda g: g * 2)
        observed(z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=None)
def a_gradient_inside(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        slope = torch.func.grad(lambda d: (d * d).sum())(data)
        observed(z, slope)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def complex_numbers(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z, torch.fft.rfft(data).abs().sum() * torch.ones(5))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def the_store_itself(svi_of):
    def model(data):
        store = pyro.get_param_store()
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + store["extra"], data)

    pyro.param("extra", torch.tensor(0.5))
    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def double_precision(svi_of):
    def guide(data):
        pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(0.1).double()), 1.0))

    svi = svi_of(with_number, guide)
    global NUMBER
    for i in range(STEPS):
        NUMBER = 1.0 + 0.1 * i
        yield svi.step(batch(i).double())


# ---- other places of Python state ----

SPREAD: contextvars.ContextVar[float] = contextvars.ContextVar("spread", default=1.0)
OF_THREAD = threading.local()


@program()
def a_context_variable(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, SPREAD.get())

    svi = svi_of(model, guide)
    for i in range(12):
        token = SPREAD.set(1.0 if i < 6 else 2.0)
        yield svi.step(DATA)
        SPREAD.reset(token)


@program()
def an_attribute_of_a_thread(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, OF_THREAD.scale)

    svi = svi_of(model, guide)
    for i in range(12):
        OF_THREAD.scale = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def a_dictionary_of_ones_own(svi_of):
    settings = collections.UserDict(scale=1.0)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, settings["scale"])

    svi = svi_of(model, guide)
    for i in range(12):
        settings["scale"] = 1.0 if i < 6 else 2.0
        yield svi.step(DATA)


@program()
def a_function_that_keeps_its_results(svi_of):
    @functools.lru_cache
    def table(n):
        return torch.arange(n) * 0.1

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data + table(5))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


class Shifted:
    scale = 1.0

    def shift(self):
        return self.by


class Derived(Shifted):
    def __init__(self):
        self.by = 0.0

    def __call__(self, data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z + super().shift(), data, self.scale)


@program()
def attributes_that_are_inherited(svi_of):
    whole = Derived()
    svi = svi_of(whole, guide)
    for i in range(18):
        whole.by = 0.0 if i < 6 else 1.0
        if i == 12:
            whole.scale = 2.0  # hides the attribute of the class
        yield svi.step(DATA)


@program()
def a_pair_that_is_given_anew(svi_of):
    given = (DATA, 1.0)

    def model():
        data, scale = given
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        given = (batch(i), 1.0)
        yield svi.step()


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@program()
def a_named_tuple_that_is_given_anew(svi_of):
    given = None

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), given.x + given.y)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        given = Batch(batch(i), torch.ones(5) * i)
        yield svi.step()


@dataclass
class Rows:
    x: torch.Tensor
    scale: float = 1.0


@program()
def a_batch_that_is_a_dataclass(svi_of):
    whole = types.SimpleNamespace(rows=None)

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), whole.rows.x, whole.rows.scale)

    svi = svi_of(model, guide)
    for i in range(16):
        whole.rows = Rows(batch(i), 1.0 if i < 8 else 2.0)
        yield svi.step()


@dataclass
class Whole:
    x: torch.Tensor
    scale: float = 1.0

    def model(self):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), self.x, self.scale)


@program()
def a_method_of_a_dataclass(svi_of):
    whole = Whole(DATA)
    svi = svi_of(whole.model, guide)
    for i in range(16):
        whole.x, whole.scale = batch(i), 1.0 if i < 8 else 2.0
        yield svi.step()


@program()
def arguments_of_a_partial(svi_of):
    given = [1.0]

    def model(scales, data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scales[0])

    svi = svi_of(partial(model, given), guide)
    for i in range(16):
        given[0] = 1.0 if i < 8 else 2.0
        yield svi.step(DATA)


class Shy:
    """An object whose attribute only `model` can read; any other reader gets an error."""

    __slots__ = ("scale",)

    def __getattribute__(self, name):
        if name == "scale" and sys._getframe(1).f_code.co_name != "model":
            raise RuntimeError("go away")
        return object.__getattribute__(self, name)


@program(captured=False, says="what the programs read cannot be looked up: .* go away")
def an_object_that_cannot_be_looked_at(svi_of):
    shy = Shy()
    shy.scale = 1.0

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, shy.scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says="`whole.x` changes at every call, and is not a tensor")
def batches_of_numpy(svi_of):
    whole = types.SimpleNamespace(x=None)

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), torch.as_tensor(whole.x))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        whole.x = batch(i).numpy()
        yield svi.step()


@program()
def two_guides_in_turn(svi_of):
    which = ["a"]

    def either(data):
        if which[0] == "a":
            guide(data)
        else:
            pyro.sample("z", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))

    svi = svi_of(model, either)
    for i in range(24):
        which[0] = "a" if i // 6 % 2 == 0 else "b"
        yield svi.step(batch(i))


@program()
def a_mask_that_is_a_flag(svi_of):
    on = [True]

    def model(data):
        with poutine.mask(mask=on[0]):
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(12):
        on[0] = i < 6
        yield svi.step(DATA)


@program()
def an_assertion_of_a_test(svi_of):
    """pytest rewrites an assertion, so the code also names a global of pytest."""

    def model(data):
        assert data.shape == (5,)
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says=r"run code of torch\.jit.*: take the ELBO without Jit")
def an_elbo_by_torch_jit(svi_of):
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # torch.jit is deprecated
            warnings.simplefilter("ignore", kind)
        svi = svi_of(model, guide, JitTrace_ELBO(ignore_jit_warnings=True))
        for i in range(STEPS):
            yield svi.step(batch(i))


@program()
def nothing_to_train(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    def prior(data):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    svi = svi_of(model, prior)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says="put the value of a tensor into a text")
def names_of_a_subsample(svi_of):
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(data), subsample_size=2):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=data[0])

    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(DATA)


# ---- a number that lies where no name of the programs' code says it ----

HIDDEN = 1.0


class Multiplies:
    def __rmul__(self, other):
        return other * HIDDEN


class Contains:
    def __contains__(self, other):
        return HIDDEN < 1.5


class Descriptor:
    def __get__(self, owner, kind):
        return HIDDEN


class Described:
    number = Descriptor()

    class Inner:
        number = 1.0


class Filled(dict):
    def __missing__(self, key):
        return HIDDEN


class Calls(type):
    def __call__(cls):
        made = super().__call__()
        made.number = HIDDEN
        return made


class Called(metaclass=Calls):
    pass


class New:
    def __new__(cls):
        made = super().__new__(cls)
        made.number = HIDDEN
        return made


def written(holder, key=0):
    """Returns a function that writes a number to `holder[key]`."""
    return functools.partial(operator.setitem, holder, key)


def hidden(read, write):
    def steps(svi_of):
        def model(data):
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, read())

        write(1.0)
        svi = svi_of(model, guide)
        for i in range(STEPS):
            if i == 5:  # a step that is not compared with stock SVI
                write(2.0)
            yield svi.step(batch(i))
        write(1.0)

    return steps


a_dictionary = {"number": 1.0}
a_view, a_chain = types.MappingProxyType(a_dictionary), collections.ChainMap({}, a_dictionary)
a_user_list, an_array = collections.UserList([1.0]), array.array("d", [1.0])
some_objects = np.array([1.0, None], dtype=object)
a_space, by_getter = types.SimpleNamespace(far=1.0), operator.attrgetter("far")
multiplies, contains, described, filled = Multiplies(), Contains(), Described(), Filled()
in_the_global = written(globals(), "HIDDEN")
for name, read, write in (
    ("a_view_of_a_dictionary", lambda: a_view["number"], written(a_dictionary, "number")),
    ("a_chain_of_dictionaries", lambda: a_chain["number"], written(a_dictionary, "number")),
    ("a_list_of_the_library", lambda: a_user_list[0], written(a_user_list)),
    ("an_array_of_the_library", lambda: an_array[0], written(an_array)),
    ("an_array_of_objects", lambda: some_objects[0], written(some_objects)),
    ("an_attribute_by_attrgetter", lambda: by_getter(a_space), written(vars(a_space), "far")),
    ("a_product_of_ones_own", lambda: 1.0 * multiplies, in_the_global),
    ("a_container_of_ones_own", lambda: 1.0 if 3 in contains else 3.0, in_the_global),
    ("a_descriptor", lambda: described.number, in_the_global),
    ("a_missing_key", lambda: filled["key"], in_the_global),
    ("a_call_of_a_metaclass", lambda: Called().number, in_the_global),
    ("a_new_of_ones_own", lambda: New().number, in_the_global),
    (
        "a_class_in_a_class",
        lambda: Described.Inner.number,
        functools.partial(setattr, Described.Inner, "number"),
    ),
):
    PROGRAMS[name] = Program(hidden(read, write), captured=True, says="")


@program()
def a_decimal_that_is_given_anew(svi_of):
    held = types.SimpleNamespace(number=None)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, float(held.number))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        held.number = decimal.Decimal(2)
        yield svi.step(batch(i))


@program()
def numpy_numbers_and_a_member_of_an_enum_among_the_arguments(svi_of):
    def model(data, scale, side):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observed(z if side is Side.LEFT else -z, data, scale)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(batch(i), np.float64(1 + i / 4), Side.LEFT if i < 8 else Side.RIGHT)


class Side(enum.Enum):
    LEFT = 1
    RIGHT = 2


class AttrsBatch:
    """A class as attrs would make it."""

    __attrs_attrs__ = (types.SimpleNamespace(name="data"), types.SimpleNamespace(name="scale"))
    __slots__ = ("data", "scale")

    def __init__(self, data, scale):
        self.data, self.scale = data, scale


@program()
def a_batch_of_attrs_that_is_given_anew(svi_of):
    held = [None]

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), held[0].data, held[0].scale)

    svi = svi_of(model, guide)
    for i in range(12):
        held[0] = AttrsBatch(batch(i), 1.0 if i < 6 else 2.0)
        yield svi.step()


@program()
def a_dataclass_with_an_attribute_besides(svi_of):
    @dataclass
    class Held:
        data: torch.Tensor

    held = Held(DATA)
    held.scale = 1.0

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), held.data, held.scale)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        held.data = batch(i)
        held.scale = 1.0 if i < 5 else 2.0
        yield svi.step()


@program(captured=False, says="can draw from the iterator `waiting`")
def batches_in_a_queue(svi_of):
    waiting = queue.Queue()

    def model():
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), waiting.get(timeout=1))

    for i in range(STEPS):
        waiting.put(batch(i))
    svi = svi_of(model, guide)
    for _ in range(STEPS):
        yield svi.step(), waiting.qsize()


@program(captured=not OLDEST_TORCH, says="dynamo-optimized" * OLDEST_TORCH)  # cannot be traced
def a_net_by_torch_compile(svi_of):
    net = nn.Linear(1, 1)
    compiled = torch.compile(net, backend="eager")
    positive = torch.compile(torch.nn.functional.softplus, backend="eager")

    def model(data):
        pyro.module("net", net)
        mean = compiled(data[:, None])[:, 0] + positive(data)
        observed(mean + pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


# ---- what appears, or is replaced as a whole ----


def changed(name):
    """Returns a program whose prior has the scale `scale()`; `change()` runs before step 7.

    By the comparisons alone the change would be found at step 10.
    """

    def run(svi_of):
        scale, change = {name: both for name, *both in appearing()}[name]

        def model(data):
            observed(pyro.sample("z", dist.Normal(0.0, scale())), data)

        svi = svi_of(model, guide)
        for i in range(12):
            if i == 7:
                change()
            yield svi.step(batch(i))

    return run


class Bare:
    scale = torch.tensor(1.0)


class Further(Bare):
    def other(self):
        return torch.tensor(3.0)


def appearing():
    """Yields a name, the scale and its change, each with objects of its own."""
    three = torch.tensor(3.0)

    held = types.SimpleNamespace()
    yield (
        "an_attribute_that_appears",
        lambda: getattr(held, "wide", 1.0),
        lambda: setattr(held, "wide", 3.0),
    )
    empty = Bare()
    yield (
        "an_attribute_of_an_object_without_any",
        lambda: empty.scale,
        lambda: setattr(empty, "scale", three),
    )
    kind = type("Sub", (Bare,), {})
    yield (
        "an_attribute_of_a_subclass_that_appears",
        lambda: kind.scale,
        lambda: setattr(kind, "scale", three),
    )
    net = nn.Linear(1, 1)
    yield (
        "an_attribute_of_a_module_that_appears",
        lambda: 3.0 if hasattr(net, "wide") else 1.0,
        lambda: setattr(net, "wide", True),
    )

    def marked():
        return getattr(marked, "wide", 1.0)

    yield (
        "an_attribute_of_a_function_that_appears",
        marked,
        lambda: setattr(marked, "wide", 3.0),
    )

    globals().pop("appeared", None)

    def global_or_not():
        try:
            return appeared
        except NameError:
            return 1.0

    yield (
        "a_global_that_appears",
        global_or_not,
        lambda: globals().__setitem__("appeared", 3.0),
    )
    other = Further()
    other.__class__ = Further
    yield (
        "an_object_of_another_class",
        lambda: other.other() if isinstance(other, Further) else torch.tensor(1.0),
        lambda: setattr(other, "__class__", Bare),
    )

    def by_code():
        return 1.0

    yield (
        "code_that_is_replaced",
        by_code,
        lambda: setattr(by_code, "__code__", (lambda: 3.0).__code__),
    )
    weights = types.SimpleNamespace(first=0.5, second=0.5)
    yield (
        "attributes_named_in_a_tuple",
        lambda: sum(getattr(weights, name) for name in ("first", "second")),
        lambda: setattr(weights, "second", 2.5),
    )
    listed, names = types.SimpleNamespace(first=0.5, second=0.5), ["first", "second"]
    yield (
        "attributes_named_in_a_list",
        lambda: sum(getattr(listed, name) for name in names),
        lambda: setattr(listed, "second", 2.5),
    )
    options = types.SimpleNamespace(first=0.5, second=0.5)
    yield (
        "all_attributes",
        lambda: sum(vars(options).values()),
        lambda: setattr(options, "second", 2.5),
    )
    settings = types.ModuleType("settings_of_a_test")
    settings.scale = 1.0
    sys.modules["settings_of_a_test"] = settings

    def imported():
        import settings_of_a_test

        return settings_of_a_test.scale

    yield "a_module_imported_inside", imported, lambda: setattr(settings, "scale", 3.0)

    class Hidden:
        __slots__ = ("__scale",)

        def __init__(self):
            self.__scale = 1.0

        def widen(self):
            self.__scale = 3.0

        def get(self):
            return self.__scale

    hidden = Hidden()
    yield "a_private_slot", hidden.get, hidden.widen
    table = {"first": 1.0}
    values = table.values()
    yield "values_of_a_dictionary", lambda: sum(values), lambda: table.update(first=3.0)
    target = Further()
    behind = weakref.ref(target)
    yield (
        "an_object_behind_a_weak_reference",
        lambda: behind().scale,
        lambda: setattr(target, "scale", three),
    )
    source = [1.0]

    @functools.lru_cache
    def cached():
        return source[0]

    def forget():
        source[0] = 3.0
        cached.cache_clear()

    yield "a_cache_that_is_cleared", cached, forget
    zero = types.SimpleNamespace(scale=-0.0)
    yield (
        "a_zero_of_another_sign",
        lambda: 2.0 + math.copysign(1.0, zero.scale),
        lambda: setattr(zero, "scale", 0.0),
    )


for _name, *_ in appearing():
    PROGRAMS[_name] = Program(changed(_name), True, "")


@program()
def a_float_that_is_zero_once(svi_of):
    def model(data, weight):
        try:
            scale = 1 / weight
        except ZeroDivisionError:
            scale = 3.0
        observed(pyro.sample("z", dist.Normal(0.0, scale)), data)

    svi = svi_of(model, guide)
    for i in range(16):
        yield svi.step(batch(i), 0.0 if i == 11 else 1 + 0.1 * i)


@program(captured=None, says="number")
def a_float_as_a_key(svi_of):
    def model(data, weight):
        observed(pyro.sample("z", dist.Normal(0.0, {1.5: 3.0}.get(weight, 1.0))), data)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(batch(i), 1.5 if i == 7 else 1 + 0.01 * i)


@program()
def a_tensor_that_is_copied_inside(svi_of):
    prior = {"loc": torch.zeros(()), "scale": torch.tensor(1.0)}

    def model(data):
        observed(pyro.sample("z", dist.Normal(**copy.deepcopy(prior))), data)

    svi = svi_of(model, guide)
    for i in range(12):
        prior["scale"].fill_(1 + 0.1 * i)
        yield svi.step(batch(i))


@program(captured=False, says="the programs change `memory`")
def a_long_list_that_is_written(svi_of):
    memory = [torch.zeros(())] * 300

    def model(data):
        z = pyro.sample("z", dist.Normal(0.1 * memory[7], 1.0))
        memory[7] = z.detach()
        observed(z, data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i)), memory[7]


@program(captured=False, says="the system's random numbers, by `dice`")
def random_numbers_of_the_system(svi_of):
    dice = random.SystemRandom()

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0 + 0 * dice.random())), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_view_whose_values_are_negated_later(svi_of):
    x = torch.complex(DATA, DATA)

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(x.conj().imag if i > 6 else x.imag)


@program(captured=False, says="inside a mode of torch")
def inside_a_mode_of_torch(svi_of):
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is torch.Tensor.exp else result

    def model(data):
        scale = torch.zeros(()).exp()
        observed(pyro.sample("z", dist.Normal(0.0, scale)), data)

    svi = svi_of(model, guide)
    for i in range(12):
        with Doubled() if i >= 7 else contextlib.nullcontext():
            yield svi.step(batch(i))


def of_plate(make, is_captured):
    def run(svi_of):
        def model(data):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in make():
                pyro.sample(f"x{i}", dist.Normal(z, 1.0 + i), obs=data[i])

        svi = svi_of(model, guide)
        for i in range(STEPS):
            yield svi.step(batch(i))

    return Program(run, is_captured, "" if is_captured else "value of a tensor")


_few = torch.tensor([1, 3])
for _name, _make, _is_captured in (
    ("a plate", lambda: pyro.plate("loop", 5), True),
    ("a plate of 3 of 5", lambda: pyro.plate("loop", 5, subsample_size=3), False),
    ("a plate of given indices", lambda: pyro.plate("loop", 5, subsample=_few), False),
):
    PROGRAMS[f"one after another in {_name}"] = of_plate(_make, _is_captured)


# ---- gradients that programs read ----


def clipped(model, guide, data):
    loss = Trace_ELBO().loss_and_grads(model, guide, data)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    return loss


@program()
def gradients_clipped_inside_with_older_ones(svi_of):
    svi = svi_of(model, guide)
    svi.loss_and_grads = clipped
    for i in range(12):
        if i == 6:  # the clipped gradient is the sum of this one and the step's
            (3.0 * pyro.param("loc")).backward()
        yield svi.step(batch(i))


@program(captured=False, says="read a gradient before they compute it")
def a_guide_that_reads_a_gradient(svi_of):
    def guide(data):
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc, 1.0 if loc.grad is None else 2.0))

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program(captured=False, says="read a gradient before they compute it")
def an_optimizer_inside_of_the_programs(svi_of):
    w = torch.zeros(5, requires_grad=True)
    inner = torch.optim.SGD([w], 0.1, momentum=0.9)

    def loss_and_grads(model, guide, data):
        inner.zero_grad()
        ((w - data) ** 2).sum().backward()
        inner.step()
        inner.zero_grad()
        return Trace_ELBO().loss_and_grads(model, guide, data)

    svi = svi_of(model, guide)
    svi.loss_and_grads = loss_and_grads
    for i in range(STEPS):
        yield svi.step(batch(i)), w


@program()
def one_gradient_of_two_parameters(svi_of):
    def guide(data):
        a, b = (pyro.param(name, torch.tensor(0.3)) for name in "ab")
        pyro.sample("z", dist.Normal(a + 2 * b, 1.0))

    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:  # torch adds to it in place, once for each of the two
            pyro.param("a").grad = pyro.param("b").grad = torch.ones(())
        yield svi.step(batch(i))


# ---- state that is written, or drawn from, out of sight ----


@program(captured=False, says="write to a tensor .3,. in a place that is not looked up")
def a_tensor_that_is_written_out_of_sight(svi_of):
    held = [torch.zeros(3) for _ in range(300)]

    def model(data):
        held[7].add_(data.mean())
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + held[7].sum(), data)

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i)), held[7]


@program(captured=False, says="Python or NumPy, or of a generator")
def a_draw_by_a_bound_method(svi_of):
    draw = random.Random(0).random

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, 1.0 + draw())

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


class Hidden:  # a class of NumPy by its name: it is not looked into
    __module__ = "numpy"

    def __init__(self):
        self.count = 0.0

    def __call__(self):
        self.count += 0.3
        return 1.0 + self.count


def test_a_difference_that_a_second_run_has_too_is_not_rounding():
    """The programs count out of sight, so that no run at the same noise repeats another."""
    counted = Hidden()

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, counted())

    svi = captured_svi(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(batch(0))
    with pytest.warns(UserWarning, match="a second run at the same noise gives other results"):
        svi.step(batch(1))


def of_bound(make, change, is_captured=True, says=""):
    """A program that calls the method of a builtin object, which changes at step 6."""

    def run(svi_of):
        held, method = make()

        def model(data):
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, method())

        svi = svi_of(model, guide)
        for i in range(12):
            if i == 6:
                change(held)
            yield svi.step(batch(i)), len(held)

    return Program(run, is_captured, says)


def _bound(held, name, *arguments):
    return held, partial(getattr(held, name), *arguments)


PROGRAMS["a value by the bound method of a dictionary"] = of_bound(
    lambda: _bound({"s": 1.0}, "get", "s"), lambda held: held.update(s=2.0)
)
PROGRAMS["a value that a bound method takes out"] = of_bound(
    lambda: _bound([1.0 + 0.1 * i for i in range(40)], "pop"),
    lambda held: None,
    is_captured=False,
    says="change `.*` at every call",
)


# ---- places that are easily overlooked ----


class WithPriors(PyroModule):
    def __init__(self):
        super().__init__()
        self.spread = 1.0
        self.w = PyroSample(lambda self: dist.Normal(0.0, self.spread))

    def forward(self, data):
        observed(self.w, data)


class WithDecoratedPrior(PyroModule):
    spread = 1.0

    @PyroSample
    def w(self):
        return dist.Normal(0.0, self.spread)

    def forward(self, data):
        observed(self.w, data)


def guide_of_w(data):
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))


def of_priors(make, change):
    def run(svi_of):
        model = make()
        svi = svi_of(model, guide_of_w)
        for i in range(12):
            if i == 6:
                change(model)
            yield svi.step(batch(i))

    return Program(run, True, "")


for _name, _make, _change in (
    ("an attribute", WithPriors, lambda model: setattr(model, "spread", 3.0)),
    ("another prior", WithPriors, lambda m: setattr(m, "w", PyroSample(dist.Normal(0.0, 3.0)))),
    ("a decorated prior", WithDecoratedPrior, lambda model: setattr(model, "spread", 3.0)),
):
    PROGRAMS[f"a PyroModule whose prior depends on {_name}"] = of_priors(_make, _change)


@program()
def a_handler_of_ones_own_around_the_step(svi_of):
    class Weigh(poutine.messenger.Messenger):
        beta = 1.0

        def _pyro_sample(self, msg):
            msg["scale"] = msg["scale"] * Weigh.beta

    svi = svi_of(model, guide)
    for i in range(12):
        Weigh.beta = 1.0 if i < 6 else 3.0
        with Weigh():
            yield svi.step(batch(i))


@program()
def a_step_inside_a_block(svi_of):
    svi = svi_of(model, guide)
    for i in range(STEPS):
        with poutine.block():  # as `svi.run` has it
            yield svi.step(batch(i))


class Given(NamedTuple):
    data: torch.Tensor

    def scale(self):
        return NUMBER


@program()
def a_global_that_a_method_of_the_argument_reads(svi_of):
    global NUMBER

    def model(given):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), given.data, given.scale())

    svi = svi_of(model, guide)
    for i in range(12):
        NUMBER = 1.0 if i < 6 else 3.0
        yield svi.step(Given(batch(i)))
    NUMBER = 1.0


@program(captured=False, says="an argument is a tensor with attributes: scale")
def an_argument_with_an_attribute(svi_of):
    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, data.scale)

    svi = svi_of(model, guide)
    for i in range(12):
        data = batch(i)
        data.scale = 1.0 if i < 6 else 3.0
        yield svi.step(data)


@program()
def a_parameter_under_a_block_that_is_replaced(svi_of):
    def model(data):
        with poutine.block():
            w = pyro.param("w", torch.tensor(1.0))
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)) * w, data)

    svi = svi_of(model, guide)
    for i in range(12):
        if i == 6:
            pyro.get_param_store()["w"] = torch.tensor(3.0)
        yield svi.step(batch(i))


def of_module(change):
    """A program around a module, which is changed at step 6."""

    def run(svi_of):
        torch.manual_seed(1)
        net = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})

        def model(data):
            h = net["a"](data[:, None]) - 2 * net["b"](data[:, None])
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)) + h.squeeze(-1), data)

        svi = svi_of(model, guide)
        for i in range(12):
            if i == 6:
                change(net)
            yield svi.step(batch(i))

    return Program(run, True, "")


def _exchange(net):
    a, b = net.pop("a"), net.pop("b")
    net["b"], net["a"] = a, b


for _name, _change in (
    ("its layers exchanged", _exchange),
    ("its state set", lambda net: net["a"].__setstate__(nn.Linear(1, 1).__dict__)),
):
    PROGRAMS[f"a module with {_name}"] = of_module(_change)


def _of_keyword(*, s=1.0):
    return s


def _with_empty_cell():
    def read():
        try:
            return s
        except NameError:
            return 1.0

    def fill():
        nonlocal s
        s = 3.0

    if False:
        s = 0.0
    return read, fill


def of_function(make):
    """A program that calls a function, which changes at step 6."""

    def run(svi_of):
        scale, change = make()

        def model(data):
            observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, scale())

        svi = svi_of(model, guide)
        for i in range(12):
            if i == 6:
                change()
            yield svi.step(batch(i))
        _of_keyword.__kwdefaults__ = {"s": 1.0}
        NAMED.clear()

    return Program(run, True, "")


NAMED: dict = {}
for _name, _make in (
    (
        "other keyword defaults",
        lambda: (_of_keyword, lambda: setattr(_of_keyword, "__kwdefaults__", {"s": 3.0})),
    ),
    ("a cell that was empty", _with_empty_cell),
    (
        "a global that it names by a string",
        lambda: (lambda: globals()["NAMED"].get("s", 1.0), lambda: NAMED.update(s=3.0)),
    ),
    (
        "the name of a library's",
        lambda: (
            functools.wraps(nn.Linear.forward)(lambda: NAMED.get("s", 1.0)),
            lambda: NAMED.update(s=3.0),
        ),
    ),
):
    PROGRAMS[f"a function with {_name}"] = of_function(_make)


# ---- what torch does to gradients and memory ----


@program(captured=False, says="set_detect_anomaly is on")
def anomaly_detection_at_later_steps(svi_of):
    svi = svi_of(model, guide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        for i in range(12):
            with torch.autograd.set_detect_anomaly(True) if i > 6 else contextlib.nullcontext():
                yield svi.step(batch(i))


@program(captured=False, says="a tensor that is not dense .torch.sparse_csr.")
def a_sparse_tensor_of_rows(svi_of):
    def model(rows):
        data = rows.to_dense().sum(0)
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data)

    svi = svi_of(model, guide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")
        for i in range(STEPS):
            yield svi.step(batch(i).diag().to_sparse_csr())


@program(captured=False, says="ask where the memory of a tensor is")
def a_window_that_asks_for_its_offset(svi_of):
    whole = torch.linspace(-1, 2, 40)

    def model(data):
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data, 1.0 + data.storage_offset())

    svi = svi_of(model, guide)
    for i in range(12):
        yield svi.step(whole[i : i + 5])


@program(captured=False, says="is not in Pyro's store: module_local_params is on")
def parameters_of_modules_alone(svi_of):
    with pyro.settings.context(module_local_params=True):
        svi = svi_of(model, AutoNormal(model))
        for i in range(STEPS):
            yield svi.step(batch(i))


def of_correlations(guide_of):
    def run(svi_of):
        def model(data):
            factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
            with pyro.plate("data", len(data)):
                given = dist.MultivariateNormal(torch.zeros(3), scale_tril=factor)
                pyro.sample("x", given, obs=data[:, None] * torch.ones(3))

        svi = svi_of(model, guide_of(model))
        for i in range(STEPS):
            yield svi.step(batch(i))

    return Program(run, True, "")


for _guide_of in (AutoNormal, AutoDelta, AutoMultivariateNormal):
    PROGRAMS[f"a correlation matrix and {_guide_of.__name__}"] = of_correlations(_guide_of)


@program(captured=False, says="the values of a tensor decide the shape of another")
def a_mask_of_the_data_by_way_of_numbers(svi_of):
    def model(data):
        kept = torch.arange(5) < 3
        kept &= data > -10  # no longer of numbers alone
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data[kept])

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


@program()
def a_mask_made_of_numbers(svi_of):
    def model(data):
        kept = (torch.arange(5) % 2 == 0) & ~(torch.arange(5) >= 4)
        observed(pyro.sample("z", dist.Normal(0.0, 1.0)), data[kept])

    svi = svi_of(model, guide)
    for i in range(STEPS):
        yield svi.step(batch(i))


WEIGHT = nn.Linear(2, 2)


def _bent(u):
    return torch.tanh(WEIGHT(u))


def of_derivative(derivative):
    def run(svi_of):
        def model(data):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            observed(derivative(z).pow(2).sum(), data)

        def guide(data):
            pyro.sample("z", dist.Normal(pyro.param("at", torch.zeros(2)), 1.0).to_event(1))

        svi = svi_of(model, guide)
        for i in range(STEPS):
            yield svi.step(batch(i))

    return Program(run, True, "")


for _name, _derivative in {
    "grad": torch.func.grad(lambda u: _bent(u).sum()),
    "jacrev": torch.func.jacrev(_bent),
    "vmap of jacrev": lambda z: torch.vmap(torch.func.jacrev(_bent))(z.expand(3, 2)),
}.items():
    PROGRAMS[f"torch.func: {_name}"] = of_derivative(_derivative)


# torch 2.8 makes the inverse of a transform anew at every call
@program(captured=not OLDEST_TORCH, says="`flow._inv`" * OLDEST_TORCH)
def a_flow_that_is_kept_and_observed(svi_of):
    flow = pyro.distributions.transforms.affine_coupling(2, [4])

    def model(data):
        pyro.module("flow", flow)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        base = dist.Normal(z.expand(2), 1.0)
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=data)

    svi = svi_of(model, guide)
    data = torch.stack([DATA, DATA.flip(0)], 1)
    for i in range(STEPS):
        yield svi.step(data * (1 + 0.1 * i))  # the flow keeps what it made of a tensor


# ---- the table ----


def shared_out(names):
    """Marks all but every eighth program as slow: programs next to each other are similar."""
    return [pytest.param(n, marks=pytest.mark.slow if i % 8 else ()) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", shared_out(PROGRAMS))
def test_program(name):
    steps, is_captured, says = PROGRAMS[name]
    svi, noted = held_against_stock(steps)
    if is_captured is not None:
        assert (svi.engine == "captured") == is_captured, svi.reason
    if svi.engine == "captured":
        assert not noted
    else:
        assert len(noted) == 1
        assert re.search(says, noted[0]), noted[0]
        assert "aten" not in noted[0]
