"""The parts that can be swapped, each compared with an independent oracle."""

import copy
import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pvae
import pvae.crosscheck
import pvae.evaluate
from pvae import Conditional, captured, heads, priors
from pvae.builder import LIKELIHOODS, PRIORS, build
from pvae.closed_form import LinearGaussian
from pvae.flows import AFFINE, SPLINE, CouplingPrior, FlowPosterior, FlowPrior
from pvae.objectives import (
    OBJECTIVES,
    DReG,
    FreeBits,
    InfoVAE,
    MeanField,
    Renyi,
    inverse_multiquadric,
    mmd,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 255


# ---- likelihoods ----


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "name", [n for n, family in LIKELIHOODS.items() if family.data == "levels"]
)
def test_probabilities_of_the_levels_sum_to_one(name, spread):
    head = LIKELIHOODS[name].head((1,))
    p = head(spread * torch.randn(50, *head.param_shape, dtype=torch.float64))
    total = p.log_prob(LEVELS[:, None, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))
    # the mean is the sum over levels
    by_level = (p.log_prob(LEVELS[:, None, None]).exp() * LEVELS[:, None]).sum(0)
    torch.testing.assert_close(p.mean.squeeze(-1), by_level)


@pytest.mark.parametrize(
    "name", [n for n, family in LIKELIHOODS.items() if family.data == "levels"]
)
def test_draws_of_the_levels_follow_the_probabilities(name):
    """Of 20,000 draws, the share at or below level 127 is right within 4 standard errors."""
    head = LIKELIHOODS[name].head((1,))
    p = head(torch.randn(head.param_shape, dtype=torch.float64))
    below = p.log_prob(LEVELS[:128, None]).exp().sum()
    share = (p.sample((20_000,)) <= LEVELS[127]).double().mean()
    assert abs(share - below) < 4 * (below * (1 - below) / 20_000) ** 0.5


def test_the_laplace_density_integrates_to_one():
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    p = heads.Laplace((1,))(torch.tensor([0.3, 0.5], dtype=torch.float64))
    total = torch.trapezoid(p.log_prob(x[:, None]).exp(), x)
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_far_from_its_loc_a_level_still_has_a_gradient():
    """In float32 a difference of sigmoids would be 0, and its logarithm minus infinity."""
    h = torch.tensor([30.0, -3.0], requires_grad=True)
    log_p = heads.DiscretizedLogistic((1,))(h).log_prob(torch.tensor([0.2]))
    log_p.backward()
    assert log_p.isfinite()
    assert h.grad.isfinite().all()
    assert h.grad[0] != 0


def test_what_lies_between_two_levels_is_refused():
    p = heads.DiscretizedLogistic((2,))(torch.zeros(4))
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor([0.5, 0.0]))  # 0.5 is level 127.5
    with pytest.raises(ValueError, match="outside the likelihood's support"):
        build((1, 8, 8), 2, "mlp", "categorical").check(torch.rand(3, 1, 8, 8))


# ---- posteriors ----


def test_full_covariance_against_torch():
    h = torch.randn(5, 9, dtype=torch.float64)
    q = heads.FullCovariance((3,))(h)
    for i in range(5):
        lower = torch.diag(h[i, 3:6].exp())
        lower[1, 0], lower[2, 0], lower[2, 1] = h[i, 6:]
        truth = torch.distributions.MultivariateNormal(h[i, :3], lower @ lower.T)
        z = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(q.log_prob(z)[i], truth.log_prob(z))


def test_low_rank_against_torch():
    h = torch.randn(5, 12, dtype=torch.float64)
    q = heads.LowRankCovariance((3,), rank=2)(h)
    for i in range(5):
        factor = h[i, 6:].reshape(3, 2)
        covariance = factor @ factor.T + torch.diag(h[i, 3:6].exp())
        truth = torch.distributions.MultivariateNormal(h[i, :3], covariance)
        z = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(q.log_prob(z)[i], truth.log_prob(z))


def brute_force(logits, locs, scales, z):
    """Returns log sum_k w_k N(z; loc_k, scale_k), in a loop over components."""
    terms = [
        w
        + sum(torch.distributions.Normal(m, s).log_prob(v) for m, s, v in zip(*row, z, strict=True))
        for w, *row in zip(logits.log_softmax(0), locs, scales, strict=True)
    ]
    return torch.stack(terms).logsumexp(0)


def test_mixtures_against_a_brute_force_logsumexp():
    h, z = torch.randn(20, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    q = heads.MixtureOfNormals((2,), components=4)(h)
    locs, scales = h[4:12].reshape(4, 2), (h[12:] / 2).exp().reshape(4, 2)
    torch.testing.assert_close(q.log_prob(z), brute_force(h[:4], locs, scales, z))
    torch.testing.assert_close(q.mean, (h[:4].softmax(0)[:, None] * locs).sum(0))

    prior = priors.MixtureOfNormals(2, components=4).double()
    nn.init.normal_(prior.logits)
    nn.init.normal_(prior.log_scale)
    truth = brute_force(prior.logits, prior.loc, prior.log_scale.exp(), z)
    torch.testing.assert_close(prior().log_prob(z), truth)


@pytest.mark.parametrize("y", [None, torch.tensor([0, 1, 1])])
def test_the_vamp_prior_is_the_mixture_of_posteriors(y):
    classes = None if y is None else 2
    vae = build((1, 8, 8), 3, prior="vamp", components=4, hidden=8, num_classes=classes).double()
    prior, z = vae.model.prior, torch.randn(3, 3, dtype=torch.float64)
    nn.init.normal_(prior.logits)
    p = prior() if y is None else prior(y)
    u = prior.pseudo_inputs.sigmoid()
    for i in range(3):
        label = None if y is None else y[i].expand(4)
        terms = prior.logits.log_softmax(0) + vae.encode(u, label).log_prob(z[i])
        torch.testing.assert_close(p.log_prob(z)[i], terms.logsumexp(0))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", PRIORS)
def test_priors_broadcast_over_leading_dimensions(name, batch):
    """Both the labels and the latents that a prior scores may have leading dimensions."""
    vae = build((1, 8, 8), 3, "mlp", prior=name, hidden=8, num_classes=2)
    y, z = torch.randint(2, batch), torch.randn(5, *batch, 3)
    p = vae.model.prior(y)
    assert p.expand(batch).sample((5,)).shape == z.shape
    assert p.log_prob(z).shape == (5, *batch)
    for i in range(math.prod(batch)):  # each label alone gives the same density
        alone = vae.model.prior(y.reshape(-1)[i]).log_prob(z.reshape(5, -1, 3)[:, i])
        torch.testing.assert_close(p.log_prob(z).reshape(5, -1)[:, i], alone)


def test_a_vamp_prior_refuses_batch_norm():
    with pytest.raises(ValueError, match="has BatchNorm"):
        build((1, 28, 28), 3, "deep", prior="vamp")


# ---- flows ----


@pytest.mark.parametrize("kind", [AFFINE, SPLINE])
def test_flows_invert_and_their_densities_are_those_of_the_jacobian(kind):
    head = FlowPosterior((3,), kind=kind, context=2).double()
    h = torch.randn(8, dtype=torch.float64)
    q = head(h)
    e = torch.randn(3, dtype=torch.float64)

    def forward(e):
        for transform in head(h).transforms:
            e = transform(e)
        return e

    z = forward(e)
    jacobian = torch.autograd.functional.jacobian(forward, e)
    log_q = dist.Normal(torch.zeros(3).double(), 1.0).log_prob(e).sum() - jacobian.det().abs().log()
    torch.testing.assert_close(q.log_prob(z.clone()), log_q)  # a clone: the flow uses no cache
    back = z
    for transform in reversed(q.transforms):
        back = transform.inv(back.clone())
    torch.testing.assert_close(back, e)


@pytest.mark.parametrize("dim", [2, 5])
def test_the_density_of_a_coupling_flow_is_that_of_its_jacobian(dim):
    prior = CouplingPrior(dim, hidden=(8, 8)).double()
    for p in prior.parameters():
        nn.init.normal_(p, std=0.5)
    e = torch.randn(dim, dtype=torch.float64)

    def forward(e):
        for transform in prior().transforms:
            e = transform(e)
        return e

    z = forward(e)
    jacobian = torch.autograd.functional.jacobian(forward, e)
    assert (jacobian != 0).all()  # every dimension changes every other
    log_p = (
        dist.Normal(torch.zeros(dim).double(), 1.0).log_prob(e).sum() - jacobian.det().abs().log()
    )
    torch.testing.assert_close(prior().log_prob(z), log_p)
    # a draw has the same density with and without the cache of the transforms
    p = prior()
    draw = p.rsample((4,))
    torch.testing.assert_close(p.log_prob(draw), prior().log_prob(draw.clone()))


def test_a_coupling_flow_starts_at_the_standard_normal():
    z = 3 * torch.randn(7, 5)
    standard = priors.StandardNormal(5)().log_prob(z)
    torch.testing.assert_close(CouplingPrior(5)().log_prob(z), standard)


def test_new_parts_are_counted_without_memory():
    """Parts can be built on the meta device, because no constructor reads values."""
    with torch.device("meta"):
        vae = build((1, 28, 28), (300_000, 200_000), "resnet", guide="ladder", prior="coupling")
    assert sum(p.numel() for p in vae.parameters()) > 1e9


def test_a_coupling_flow_is_saved_without_constants_and_copied():
    prior = CouplingPrior(3, transforms=1)
    names = [f"nets.0.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert list(prior.state_dict()) == names
    prior().sample()
    z = torch.randn(2, 3)
    assert torch.equal(copy.deepcopy(prior)().log_prob(z), prior().log_prob(z))


@pytest.mark.parametrize(
    "prior", [partial(FlowPrior, kind=AFFINE), partial(FlowPrior, kind=SPLINE), CouplingPrior]
)
def test_a_flow_prior_is_normalized_and_draws_what_it_scores(prior):
    """On a grid the density sums to 1; the mean of draws is the grid's within 4 standard errors."""
    prior = prior(2).double()
    for p in prior.parameters():
        nn.init.normal_(p, std=0.1)
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = prior().log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    z = prior().sample((4000,))
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - (mass[:, None] * grid).sum(0)).abs() < 4 * error).all()


def test_flows_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions, not 1"):
        build((1, 8, 8), 1, guide="iaf")
    with pytest.raises(ValueError, match="at least 2 dimensions, not 1"):
        build((1, 8, 8), 1, prior="flow")
    with pytest.raises(ValueError, match="at least 2 dimensions, not 1"):
        build((1, 8, 8), 1, prior="coupling")
    with pytest.raises(ValueError, match=r"hidden must be .* one layer or more, not \(\)"):
        CouplingPrior(3, hidden=())


# ---- objectives ----

X = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.5).double()


def loss_and_gradients(vae, call):
    vae.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = call()
    return loss, {name: p.grad.clone() for name, p in vae.named_parameters()}


@pytest.mark.parametrize("alpha", [0, 0.5])
@pytest.mark.parametrize("vectorized", [True, False])
def test_the_differentiable_renyi_bound_is_pyros(alpha, vectorized):
    vae = build((1, 8, 8), 3, "mlp", hidden=8).double()
    elbo = RenyiELBO(alpha, 5, max_plate_nesting=1, vectorize_particles=vectorized)
    theirs, gradients = loss_and_gradients(
        vae, lambda: elbo.loss_and_grads(vae.model, vae.guide, X)
    )

    module = Renyi(alpha, 5, max_plate_nesting=1, vectorize_particles=vectorized)(
        vae.model, vae.guide
    )

    def ours():
        loss = module(X)
        loss.backward()
        return loss.item()

    loss, again = loss_and_gradients(vae, ours)
    assert loss == pytest.approx(theirs, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("dims", [pytest.param((3,), marks=pytest.mark.slow), (3, 2)])
def test_dreg_is_the_iwae_gradient_in_expectation_and_less_noisy(dims):
    """The means of 300 gradients of each agree within 4 standard errors in 10 random directions.

    The variance of DReG, summed over the directions, is smaller.
    """
    vae = build((1, 8, 8), dims, "mlp", hidden=8).double()
    with torch.no_grad():  # larger weights make posteriors narrow
        for p in vae.parameters():
            p.mul_(1.5)
    particles = 8
    objectives = (
        Renyi(0, particles, vectorize_particles=True, max_plate_nesting=1),
        DReG(particles),
    )
    parameters = list(vae.guide.parameters())
    directions = [[torch.randn_like(p) for p in parameters] for _ in range(10)]
    samples = []
    for elbo in objectives:
        rows = []
        for _ in range(300):
            gradients = torch.autograd.grad(
                elbo.differentiable_loss(vae.model, vae.guide, X[:2]), parameters
            )
            rows.append(
                [
                    sum((g * d).sum() for g, d in zip(gradients, ds, strict=True))
                    for ds in directions
                ]
            )
        samples.append(torch.tensor(rows))
    iwae, dreg = samples
    error = ((iwae.var(0) + dreg.var(0)) / 300).sqrt()
    assert ((iwae.mean(0) - dreg.mean(0)).abs() < 4 * error).all()
    assert dreg.var(0).sum() < 0.7 * iwae.var(0).sum()


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_dreg_has_the_models_gradient_of_iwae_and_its_value(dropout):
    """Also if the guide has dropout: a draw and its density use the same dropped elements."""
    vae = build((1, 8, 8), 3, "mlp", hidden=8, dropout=dropout).double()
    iwae = Renyi(0, 5, vectorize_particles=True, max_plate_nesting=1)
    one = loss_and_gradients(vae, lambda: iwae.loss_and_grads(vae.model, vae.guide, X))
    two = loss_and_gradients(vae, lambda: DReG(5).loss_and_grads(vae.model, vae.guide, X))
    assert two[0] == pytest.approx(one[0], rel=1e-12)
    for name, gradient in one[1].items():
        if name.startswith("model."):
            torch.testing.assert_close(two[1][name], gradient, msg=name)


def test_dreg_at_the_exact_posterior_has_no_variance():
    """There log w is the same for every z, so its derivative by z is 0."""
    w = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q * 1.7
    exact = LinearGaussian(w, torch.zeros(5, dtype=torch.float64), 0.3)
    variance = 1 / exact.precision.diagonal()
    decoder, encoder = nn.Linear(2, 5).double(), nn.Linear(5, 4).double()
    with torch.no_grad():
        decoder.weight.copy_(w)
        decoder.bias.zero_()
        encoder.weight.copy_(torch.cat([(w * variance / 0.3**2).T, torch.zeros(2, 5)]))
        encoder.bias.copy_(torch.cat([torch.zeros(2), variance.log()]))
    model = pvae.Model(
        priors.StandardNormal(2).double(),
        Conditional(decoder, heads.NormalFixedScale((5,), scale=0.3), event_dim=1),
    )
    guide = pvae.Guide(Conditional(encoder, heads.Normal((2,)), event_dim=1))
    x = torch.randn(4, 5, dtype=torch.float64)
    loss = DReG(6).differentiable_loss(model, guide, x)
    assert loss.item() == pytest.approx(-exact.log_evidence(x).sum().item(), rel=1e-9)
    for gradient in torch.autograd.grad(loss, list(encoder.parameters())):
        assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize(("dims", "guide"), [(3, "normal"), ((3, 2), "ladder")], ids=["1", "2"])
def test_free_bits_of_zero_are_the_mean_field_elbo(dims, guide):
    vae = build((1, 8, 8), dims, "mlp", guide=guide, hidden=8).double()
    mean_field = TraceMeanField_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    one = loss_and_gradients(vae, lambda: mean_field.loss_and_grads(vae.model, vae.guide, X))
    two = loss_and_gradients(vae, lambda: FreeBits(0.0, 4).loss_and_grads(vae.model, vae.guide, X))
    assert two[0] == pytest.approx(one[0], rel=1e-12)
    for name, gradient in one[1].items():
        torch.testing.assert_close(two[1][name], gradient, msg=name)


def test_below_the_floor_the_kl_is_the_floor_and_has_no_gradient():
    vae = build((1, 8, 8), 3, "mlp", hidden=8).double()

    def by_hand():
        z = vae.encode(X).rsample()
        loss = 3 * 1e3 * len(X) - vae.decode(z).log_prob(X).sum()
        loss.backward()
        return loss.item()

    one = loss_and_gradients(vae, lambda: FreeBits(1e3).loss_and_grads(vae.model, vae.guide, X))
    two = loss_and_gradients(vae, by_hand)
    assert one[0] == pytest.approx(two[0], rel=1e-12)
    for name, gradient in two[1].items():
        torch.testing.assert_close(one[1][name], gradient, msg=name)


def test_the_floor_is_that_of_each_unit_of_each_layer():
    vae = build((1, 8, 8), latent_dims=(3, 2), net="mlp", hidden=8, guide="ladder").double()
    floor = 5 * 1e3 * len(X)
    reconstruction = floor - FreeBits(1e3).loss(vae.model, vae.guide, X)
    assert -100 * len(X) < reconstruction < 0  # 64 pixels at about log 2 nats each


def test_info_vae_is_its_three_terms():
    vae = build((1, 8, 8), 3, "mlp", hidden=8).double()
    elbo = InfoVAE(mmd_weight=7.0, kl_weight=0.3)
    torch.manual_seed(1)
    loss = elbo.differentiable_loss(vae.model, vae.guide, X)
    torch.manual_seed(1)
    q = vae.encode(X)
    z = q.rsample()
    prior = vae.model.prior().expand((len(X),))
    kl = (q.log_prob(z) - prior.log_prob(z)).sum()
    distance = mmd(z, prior.sample(), inverse_multiquadric(math.sqrt(6)))
    by_hand = 0.3 * kl + 7.0 * len(X) * distance - vae.decode(z).log_prob(X).sum()
    torch.testing.assert_close(loss, by_hand)


def test_a_subsampled_plate_is_refused_by_the_bounds_per_image():
    """The plate's scale would enter the logarithm of the mean weight."""
    x = torch.randn(4, 2)

    def model(x):
        with pyro.plate("data", 8, subsample_size=4):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", 8, subsample_size=4):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match="lies in a subsampled plate"):
        DReG(3).differentiable_loss(model, guide, x)


# ---- latent layers ----


def two_layers(**parts):
    return build((1, 8, 8), (3, 2), "mlp", hidden=8, **parts).double()


def test_the_mean_field_elbo_is_wrong_on_two_layers_and_refused():
    vae = two_layers()
    with pytest.raises(ValueError, match="order z2, z1, the guide in the order z1, z2"):
        MeanField().loss(vae.model, vae.guide, X)
    with pyro.validation_enabled(False):  # then Pyro does not even warn
        trace = Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1)
        wrong = TraceMeanField_ELBO(4000, vectorize_particles=True, max_plate_nesting=1)
        right = torch.tensor([trace.loss(vae.model, vae.guide, X) for _ in range(5)])
        off = torch.tensor([wrong.loss(vae.model, vae.guide, X) for _ in range(5)])
    assert (right.mean() - off.mean()).abs() > 5 * (right.std() + off.std()) / 5**0.5


@pytest.mark.parametrize("dims", [(3, 2), (3, 2, 4), (3, 1, 2, 4)])
@pytest.mark.parametrize("name", ["trace_elbo", "iwae", "renyi"])
def test_layers_are_their_densities(name, dims):
    """Pyro's loss is the sum of the log densities of each conditional, one after another."""
    vae = build((1, 8, 8), dims, "mlp", hidden=8).double()
    elbo = OBJECTIVES[name].elbo(4)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({}), elbo)
    check = pvae.crosscheck.cross_check(svi, vae, X)
    assert check.relative < 1e-10
    assert check.kl_difference is None

    z = {f"z{number}": torch.randn(6, dim).double() for number, dim in enumerate(dims, 1)}
    top, *priors = [vae.model.top, *vae.model.between, vae.model.prior]
    log_p = {
        "x": vae.decode(z["z1"]).log_prob(X),
        f"z{len(dims)}": top().log_prob(z[f"z{len(dims)}"]),
    }
    for number, prior in enumerate(reversed(priors), 1):
        log_p[f"z{number}"] = prior(z[f"z{number + 1}"]).log_prob(z[f"z{number}"])
    log_q = {"z1": vae.encode(X).log_prob(z["z1"])}
    for number, q in enumerate([*vae.guide.between, vae.guide.top], 2):
        log_q[f"z{number}"] = q(z[f"z{number - 1}"]).log_prob(z[f"z{number}"])
    torch.testing.assert_close(vae.model.densities(X, z), log_p)
    torch.testing.assert_close(vae.guide.densities(X, z), log_q)


@pytest.mark.parametrize("dims", [(3, 2), (3, 4, 2)])
def test_the_layers_in_traces(dims):
    """The model draws the top layer first, the guide the bottom layer; layers differ in size."""
    vae = build((1, 8, 8), dims, "mlp", hidden=8, num_classes=2)
    sites = [f"z{number}" for number in range(1, len(dims) + 1)]
    y = torch.tensor([0, 1, 1, 0, 0, 1])
    drawn = poutine.trace(vae.guide).get_trace(X.float(), y)
    assert drawn.stochastic_nodes == ["data", *sites]
    trace = poutine.trace(poutine.replay(vae.model, drawn)).get_trace(X.float(), y)
    assert trace.stochastic_nodes == ["data", *reversed(sites)]
    for site, dim in zip(sites, dims, strict=True):
        assert trace.nodes[site]["value"].shape == (6, dim)


@pytest.mark.parametrize("guide", ["normal", "ladder"])
def test_three_layers_are_captured_saved_and_loaded(guide, tmp_path):
    vae = build((1, 8, 8), (3, 4, 2), "mlp", guide=guide, hidden=8, prior="coupling")
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-3))
    options = {"strict": True, "compiler": captured.as_traced}
    svi = captured.SVI(vae.model, vae.guide, adam, Trace_ELBO(), **options)
    before = copy.deepcopy(vae.state_dict())
    for _ in range(5):
        svi.step(X.float())
    assert svi.engine == "captured"
    assert all((t != before[name]).any() for name, t in vae.state_dict().items())
    pvae.save(vae, tmp_path / "three.pt")
    again = pvae.load(tmp_path / "three.pt")
    assert again.recipe.latent_dims == (3, 4, 2)
    torch.testing.assert_close(again.reconstruct(X.float()), vae.reconstruct(X.float()))
    assert pvae.evaluate.posterior_means(again.guide, X.float()).shape == (6, 3)  # the means of z1


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (pvae.HierarchicalModel, "below must be at least two"),
        (pvae.HierarchicalGuide, "above must"),
    ],
)
def test_one_layer_is_no_hierarchy(program, message):
    with pytest.raises(ValueError, match=message):
        program(*[nn.Identity()] * (2 if program is pvae.HierarchicalModel else 1))


@pytest.mark.parametrize("dims", [(3, 2), (3, 4, 2)])
def test_layers_sample_reconstruct_and_interpolate(dims):
    vae = build((1, 8, 8), dims, "mlp", hidden=8).double()
    assert vae.sample(5).shape == (5, 1, 8, 8)
    assert vae.reconstruct(X).shape == X.shape
    assert vae.interpolate(X[:2], X[2:4], steps=3).shape == (2, 3, 1, 8, 8)
    q = vae.encode(X)
    torch.testing.assert_close(vae.reconstruct(X), vae.decode(q.mean).mean)


# ---- labels and side vectors ----


@pytest.mark.parametrize(
    ("prior", "net"), list(itertools.product(["vamp", "conditional"], ["mlp", "conv"]))
)
def test_a_side_vector_conditions_a_pair(prior, net):
    """With the same weights, a pair for one-hot vectors equals a pair for labels."""
    side = build((1, 8, 8), 3, net, prior=prior, side_dim=2, hidden=8).double()
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    vector = torch.nn.functional.one_hot(y, 2).double()
    loss = Trace_ELBO().loss(side.model, side.guide, X, vector)
    assert math.isfinite(loss)
    assert side.sample(y=vector).shape == (6, 1, 8, 8)
    if prior == "vamp":  # here both pairs have the same parameters
        labelled = build((1, 8, 8), 3, net, prior=prior, num_classes=2, hidden=8)
        labelled.double().load_state_dict(side.state_dict())
        noise = torch.randn(6, 3, dtype=torch.float64)
        for a, b in zip(
            labelled.terms(X, {"z": noise}, y), side.terms(X, {"z": noise}, vector), strict=True
        ):
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 2, "side_dim": 3}, "two kinds of y"),
        ({"guide": "per_datum"}, "num_data must be the number of data, not None"),
        ({"latent_dim": 2.5}, r"latent_dims must be .*, not \(2.5,\)"),
        ({"image_shape": 64}, r"event_shape must be .*, not \(64,\)"),
        ({"mean_image": torch.zeros(1, 9, 9)}, r"mean_image must be floats of shape \(1, 8, 8\)"),
        ({"mean_image": torch.zeros(1, 8, 8).byte()}, r"floats of shape .*, not torch.uint8"),
        ({"mean_image": torch.zeros(1, 8, 8) / 0}, "mean_image must be finite"),
        ({"num_data": 5}, "has no use for it"),
        ({"guide": "mixture", "latent_dim": 1}, "at least 2 dimensions"),
        ({"guide": "low_rank", "latent_dim": 1}, "rank must be from 1"),
        ({"prior": "mixture", "components": 0}, "components must be a whole number of at least 1"),
        ({"latent_dim": (3, 0)}, r"latent_dims must be .*, not \(3, 0\)"),
        ({"guide": "score_function_baseline", "latent_dim": (3, 2)}, "one latent layer"),
        ({"guide": "ladder"}, r"two latent layers or more, not for latent_dims \(3,\)"),
        ({"latent_dims": 3}, r"latent_dims \(3\) and latent_dim \(3\) are one argument"),
        ({"net": "deep", "hidden": 8}, "hidden must be None, not 8: net 'deep'"),
        ({"components": 5}, "components must be None, not 5: prior 'standard_normal'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"image_shape": (1, 8, 8), "latent_dim": 3, **arguments})


def test_a_pair_with_one_factor_for_each_datum_says_that_new_images_have_none():
    vae = build((1, 8, 8), 3, guide="per_datum", num_data=6)
    with pytest.raises(ValueError, match="one factor for each datum"):
        vae.encode(X.float())
    index = torch.arange(6)
    assert Trace_ELBO().loss(vae.model, lambda x: vae.guide(x, index=index), X.float()) > 0
