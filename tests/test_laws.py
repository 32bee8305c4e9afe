"""The laws of every combination: likelihood x guide x prior, conditional or not, and objectives."""

import itertools
import math
import random

import pyro
import pytest
import torch
from conftest import SHAPES, in_support
from pyro.infer import SVI

from pvae import SingleOptimizer, evaluate
from pvae.builder import GUIDES, LIKELIHOODS, PRIORS, build, compose
from pvae.data import load, observe
from pvae.evaluate.bounds import sum_sites, traces
from pvae.objectives import OBJECTIVES, latent_names
from pvae.train import Trainer

B, D, CLASSES = 16, 3, 2
STEPS = 30
TWO_LAYERS = "two layers"  # or three; the hierarchical pair is listed as a guide

LAYERED = (TWO_LAYERS, "ladder")
GUIDE_NAMES = [*GUIDES, TWO_LAYERS]
PRODUCT = list(itertools.product(LIKELIHOODS, GUIDE_NAMES, PRIORS, [False, True]))


# the baseline has a gradient only under this ELBO; the score function needs more than one draw
OBJECTIVE = {"score_function_baseline": "trace_graph_elbo"}
PARTICLES = {"score_function": 8}


def refusal(guide, prior, conditional):
    """Returns a part of the builder's error if a combination cannot work, else None."""
    if prior == "vamp" and guide == "per_datum":
        return "function of images"
    if prior == "vamp" and guide in LAYERED:
        return "with several latent layers the prior is that of the last"
    if prior == "conditional" and not conditional:
        return "it needs num_classes"
    return None


def make(likelihood, guide, prior, conditional, variant=0):
    """Returns a tiny pair; `variant` is the seed that chooses its shape and its net."""
    draw = random.Random(variant)
    shape, net = draw.choice(SHAPES), draw.choice(["mlp", "conv", "gated", "resnet"])
    return build(
        shape,
        draw.choice([(D, 2), (D, 4, 2)]) if guide in LAYERED else D,
        net,
        likelihood,
        "normal" if guide == TWO_LAYERS else guide,
        prior,
        hidden=16,
        num_classes=CLASSES if conditional else None,
        components=4 if PRIORS[prior].components else None,
        num_data=B if guide == "per_datum" else None,
    )


def data(vae, likelihood, conditional):
    """Returns noisy copies of two prototypes in the likelihood's support, labelled if asked."""
    shape = vae.recipe.event_shape
    y = torch.arange(B) % CLASSES
    prototypes = (torch.rand(CLASSES, *shape) > 0.5).float() * 0.8 + 0.1
    x = (prototypes[y] + 0.05 * torch.randn(B, *shape)).clamp(0, 1)
    x = in_support(likelihood, x)
    return (x, y) if conditional else (x,)


def programs(vae, guide):
    """Returns the model and a guide that needs only the data, also if it has per-datum factors."""
    if guide != "per_datum":
        return vae.model, vae.guide
    index = torch.arange(B)
    return vae.model, lambda x, y=None: vae.guide(x, y, index=index)


def draws_of_the_elbo(pair, args):
    """Returns the ELBO of each image at 10 fixed draws of the latents, `(10, B)`."""
    x, y = (*args, None)[:2]
    with evaluate.fixed_noise("cpu", 1), evaluate.evaluating(*pair):
        model_trace, guide_trace = traces(*pair, x, y, 10)
        names = [*model_trace.observation_nodes, *latent_names(model_trace)]
        log_p = sum_sites(model_trace, names, (10, B))
        return log_p - sum_sites(guide_trace, latent_names(guide_trace), (10, B))


def above(difference, errors):
    """Returns whether the mean of paired differences is above `errors` standard errors."""
    return difference.mean() > errors * difference.std() / len(difference) ** 0.5


def train(likelihood, vae, pair, elbo, args, steps=STEPS):
    # the rate of a count is exp(h), which a large step would change far too much
    rate = 3e-3 if LIKELIHOODS[likelihood].data == "counts" else 1e-2
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    adam = torch.optim.Adam(vae.parameters(), lr=rate)
    svi = SVI(*pair, SingleOptimizer(adam), elbo)
    for step in range(steps):
        # falls to 0: a learned scale that overshoots in the last step would hide the gain
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        assert math.isfinite(svi.step(*args))
    for name, p in vae.named_parameters():
        assert p.isfinite().all(), name
        assert (p != before[name]).any(), f"{name} did not move"


def check_combination(number, likelihood, guide, prior, conditional):
    reason = refusal(guide, prior, conditional)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            make(likelihood, guide, prior, conditional)
        return
    vae = make(likelihood, guide, prior, conditional, number)
    args = data(vae, likelihood, conditional)
    pair = programs(vae, guide)
    start = draws_of_the_elbo(pair, args)
    train(
        likelihood,
        vae,
        pair,
        OBJECTIVES[OBJECTIVE.get(guide, "trace_elbo")].elbo(PARTICLES.get(guide, 1)),
        args,
    )

    # it learns: at the same draws, the mean over images rises by 5 standard errors
    end = draws_of_the_elbo(pair, args)
    assert above((end - start).mean(1), 5)
    # the ELBO is not above the tighter bound, in differences image by image
    with evaluate.fixed_noise("cpu", 1):
        iwae = evaluate.importance_weighted(*pair, *(*args, None)[:2], num_samples=50)
    assert not above(end.mean(0) - iwae, 5)

    # its samples have a finite density, and the same shapes in model and guide
    y = args[1] if conditional else None
    trace = pyro.poutine.trace(vae.model).get_trace(y=y, size=B)
    trace.compute_log_prob()
    assert all(trace.nodes[name]["log_prob"].isfinite().all() for name in trace.stochastic_nodes)
    assert trace.nodes["x"]["log_prob"].isfinite().all()
    drawn = pyro.poutine.trace(pair[1]).get_trace(*args)
    for name in drawn.stochastic_nodes:
        if name != "data":
            assert drawn.nodes[name]["value"].shape == trace.nodes[name]["value"].shape

    # a pair built from its recipe and its state is the same
    again = compose(vae.recipe)
    again.load_state_dict(vae.state_dict())
    assert (draws_of_the_elbo(programs(again, guide), args) == end).all()


def each_once(cases):
    """Selects about one case in forty, such that every value of every axis occurs."""
    seen: set[tuple[int, object]] = set()
    chosen = []
    for number, case in cases:
        if refusal(*case[1:]) is None and any(v not in seen for v in enumerate(case)):
            new = [v for v in enumerate(case) if v not in seen]
            if len(new) > 1 or case[0] == "bernoulli":
                chosen.append((number, case))
                seen |= set(enumerate(case))
    return chosen


@pytest.mark.parametrize(("number", "case"), each_once(list(enumerate(PRODUCT))))
def test_a_sample_of_the_product(number, case):
    check_combination(number, *case)


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "prior", "conditional"), sorted({case[1:] for case in PRODUCT}))
def test_the_full_product(guide, prior, conditional):
    for number, case in enumerate(PRODUCT):
        if case[1:] == (guide, prior, conditional):
            torch.manual_seed(number)
            check_combination(number, *case)


# ---- objectives, pairwise with each likelihood, guide and prior ----

PAIRWISE = sorted(
    {(p_x, "normal", "standard_normal", False) for p_x in LIKELIHOODS}
    | {("bernoulli", g, "standard_normal", False) for g in GUIDE_NAMES}
    | {("bernoulli", "normal", p, p == "conditional") for p in PRIORS}
)
NOT_REPARAMETERIZED = ("score_function", "score_function_baseline")
NO_UNIT_PRIOR = ("mixture", "vamp", "flow", "coupling")
NO_UNIT_KL = ("full_covariance", "low_rank", "mixture", "iaf", "spline")


def objective_refusal(objective, guide, prior):
    if objective not in ("trace_elbo", "trace_graph_elbo") and guide in NOT_REPARAMETERIZED:
        return "needs reparameterized draws"
    if objective == "info_vae" and guide in LAYERED:
        return "is for one latent site"
    if objective == "free_bits" and (guide in NO_UNIT_KL or prior in NO_UNIT_PRIOR):
        return "that factorize over the latent's units"
    if objective in ("trace_mean_field_elbo", "free_bits") and guide == TWO_LAYERS:
        return "would be wrong here"
    return None


def check_objective(objective, case):
    likelihood, guide, prior, conditional = case
    vae = make(*case)
    args, pair = data(vae, likelihood, conditional), programs(vae, guide)
    chosen = OBJECTIVES[objective]
    elbo = chosen.elbo(max(2, chosen.min_particles))
    reason = objective_refusal(objective, guide, prior)
    if reason is not None:
        for call in (elbo.loss, elbo.loss_and_grads):
            with pytest.raises(ValueError, match=reason):
                call(*pair, *args)
        return

    def losses():
        """Returns losses at 20 fixed seeds, so that differences between calls are paired."""
        values = []
        for seed in range(20):
            torch.manual_seed(seed)
            values.append(elbo.loss(*pair, *args))
        return torch.tensor(values)

    start = losses()
    if GUIDES.get(guide) is not None and GUIDES[guide].baseline and objective != "trace_graph_elbo":
        del vae.guide.baseline  # this objective does not train it
        vae.guide.baseline = None
    train(likelihood, vae, pair, elbo, args)
    assert above(start - losses(), 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("every", [84, pytest.param(1, marks=pytest.mark.slow)])
def test_objectives_with_each_other_part(objective, every):
    for case in PAIRWISE[::every]:
        torch.manual_seed(0)
        check_objective(objective, case)


def test_what_an_objective_cannot_train_is_refused_before_the_run():
    data = observe(load("digits"), "dynamic")
    vae = build((1, 28, 28), (3, 2), "mlp", hidden=8)
    adam = SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, OBJECTIVES["trace_mean_field_elbo"].elbo(1))
    with pytest.raises(ValueError, match="would be wrong here"):
        Trainer(vae, svi, data, epochs=1, batch_size=64)
