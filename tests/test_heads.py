"""Laws of every head, prior and Conditional."""

import math

import pytest
import torch
from conftest import SHAPES, tiny
from torch import nn
from torch.distributions import constraints

from pvae import Conditional, heads, ignore_label
from pvae.builder import GUIDES, LIKELIHOODS
from pvae.conditional import Masked
from pvae.priors import StandardNormal
from pvae.programs import mean_of

HEADS = {
    **{name: family.head for name, family in LIKELIHOODS.items()},
    **{name: family.head for name, family in GUIDES.items()},
}
EVENTS = [(4,), *SHAPES]
CASES = [(name, (4,)) for name in HEADS] + [
    (name, shape) for name in LIKELIHOODS for shape in SHAPES
]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("name", "event"), CASES)
def test_broadcasting_and_own_samples(name, event, batch):
    head = HEADS[name](event)
    p = head(torch.randn(*batch, *head.param_shape))
    assert p.batch_shape == batch
    assert p.event_shape == event
    x = p.sample((5,))
    assert x.shape == (5, *batch, *event)
    assert p.log_prob(x).shape == (5, *batch)
    assert p.log_prob(x).isfinite().all()
    assert mean_of(p).shape == (*batch, *event)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", HEADS)
def test_each_element_has_its_own_parameters(name, batch):
    """A batch of parameters gives the same densities as its parameters one by one."""
    head = HEADS[name]((4,))
    h = torch.randn(*batch, *head.param_shape)
    x = head(h).sample()
    together = head(h).log_prob(x).flatten()
    one_by_one = [
        head(a).log_prob(b)
        for a, b in zip(h.reshape(-1, *head.param_shape), x.reshape(-1, 4), strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_raw_mean_gives_that_mean(name, event):
    head = LIKELIHOODS[name].head(event)
    mean = torch.rand(event) * 0.9 + 0.05
    # means over 256 levels are less exact, because levels are clipped at 0 and 1
    atol = 0.1 if LIKELIHOODS[name].data == "levels" else 1e-4
    torch.testing.assert_close(head(head.raw_mean(mean)).mean.detach(), mean, rtol=0, atol=atol)
    for extreme in (torch.zeros(event), torch.ones(event)):
        assert head.raw_mean(extreme).isfinite().all()


LOC, RAW = torch.tensor([0.3, -2.0]), torch.tensor([0.5, -1.0])


@pytest.mark.parametrize(
    ("head", "h", "scale"),
    [
        (heads.Normal((2,)), torch.cat([LOC, RAW]), (RAW / 2).exp()),
        (heads.Normal((2,), min_scale=0.1), torch.cat([LOC, RAW]), (RAW / 2).exp() + 0.1),
        (heads.Normal((2,), link=heads.from_log_scale), torch.cat([LOC, RAW]), RAW.exp()),
        (heads.NormalFixedScale((2,), scale=0.3), LOC, torch.tensor([0.3, 0.3])),
        (heads.NormalSharedScale((2,), scale=0.3), LOC, torch.tensor([0.3, 0.3])),
    ],
)
def test_normals_against_torch(head, h, scale):
    x = torch.randn(5, 2)
    truth = torch.distributions.Normal(LOC, scale).log_prob(x).sum(-1)
    torch.testing.assert_close(head(h).log_prob(x), truth)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_head_says_of_itself_whether_it_is_normalized(name):
    """`normalized` is True only if a pixel's density integrates, or probabilities sum, to 1."""
    head = LIKELIHOODS[name].head((1,))
    p = head(head.raw_mean(torch.tensor([0.3])))
    if LIKELIHOODS[name].data == "continuous":
        ends = (0, 1) if isinstance(head, (heads.ContinuousBernoulli, heads.Bernoulli)) else (-9, 9)
        x = torch.linspace(*ends, 100_001)
        total = torch.trapezoid(p.log_prob(x[:, None]).exp(), x)
    else:
        values = {"binary": 2, "levels": heads.LEVELS, "counts": 1000}[LIKELIHOODS[name].data]
        x = torch.linspace(0, values - 1 if LIKELIHOODS[name].data == "counts" else 1, values)
        total = p.log_prob(x[:, None]).exp().sum()
    assert head.normalized is (abs(total.item() - 1) < 1e-3)


def test_bernoulli_sums_to_one():
    head = heads.Bernoulli((3,))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    total = head(torch.randn(3)).log_prob(corners).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_grey_bernoulli_is_the_cross_entropy_with_validation_on():
    h, x = torch.randn(4), torch.rand(4)
    p = heads.GreyBernoulli((4,))(h)
    truth = -nn.functional.binary_cross_entropy_with_logits(h, x, reduction="sum")
    torch.testing.assert_close(p.log_prob(x), truth)
    torch.testing.assert_close(p.expand((2,)).log_prob(x), truth.expand(2))
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((4,), 1.5))
    assert p.base_dist.support is constraints.unit_interval


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli"])
def test_values_outside_the_support_are_refused(name):
    with pytest.raises(ValueError, match="support"):
        LIKELIHOODS[name].head((2,))(torch.zeros(2)).log_prob(torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.Bernoulli(()), r"event_shape must be sizes of at least 1, not \(\)"),
        (lambda: heads.Bernoulli((1, 0, 3)), r"event_shape .* not \(1, 0, 3\)"),
        (lambda: heads.Normal((2,), min_scale=-1.0), r"min_scale must be at least 0, not -1"),
        (lambda: heads.Normal((2,), min_scale=math.nan), r"min_scale must be at least 0, not nan"),
        (lambda: heads.NormalFixedScale((2,), scale=0.0), r"scale must be above 0, not 0"),
        (
            lambda: heads.NormalSharedScale((2,), scale=0.1, min_scale=0.2),
            r"below the scale 0\.1, not 0\.2",
        ),
        (lambda: StandardNormal(0), "latent_dim must be at least 1, not 0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_standard_normal_follows_dtype_and_is_not_saved():
    prior = StandardNormal(2).double()
    assert prior().sample().dtype == torch.float64
    assert prior.state_dict() == {}
    assert prior().log_prob(torch.zeros(2)).item() == pytest.approx(-math.log(2 * math.pi))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_conditional_folds_leading_dimensions_through_convolutions(batch):
    vae = tiny()
    z = torch.randn(*batch, 3)
    raw = vae.model.likelihood.raw(z)
    assert raw.shape == (*batch, 1, 8, 8)
    one_by_one = torch.cat([vae.model.likelihood.raw(v[None]) for v in z.reshape(-1, 3)])
    torch.testing.assert_close(raw.reshape(-1, 1, 8, 8), one_by_one)


def add(v, y):
    return v + y[..., None]


def test_one_factor_for_each_datum_is_an_embedding():
    posterior = Conditional(nn.Embedding(10, 4), heads.Normal((2,)), event_dim=0)
    assert posterior(torch.tensor([3, 3, 9])).batch_shape == (3,)


def test_labels_are_never_dropped_or_missed_silently():
    net, head, v, y = nn.Linear(2, 2), heads.Bernoulli((2,)), torch.zeros(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match="takes no labels"):
        Conditional(net, head, event_dim=1)(v, y)
    with pytest.raises(ValueError, match="y is missing"):
        Conditional(net, head, event_dim=1, join=add)(v)
    joined = Conditional(net, head, event_dim=1, join=add)
    torch.testing.assert_close(joined.raw(v, y), net(v + 1))
    ignoring = Conditional(net, head, event_dim=1, join=ignore_label)
    torch.testing.assert_close(ignoring.raw(v, y), net(v))


def test_modules_say_of_themselves_whether_they_take_y():
    plain = Conditional(nn.Linear(2, 4), heads.Bernoulli((4,)), event_dim=1)
    joined = Conditional(nn.Linear(2, 4), heads.Bernoulli((4,)), event_dim=1, join=ignore_label)
    assert (plain.takes_y, joined.takes_y, Masked(plain).takes_y) == (False, True, True)


def test_a_net_of_the_wrong_width_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"net returns \(5,\).*param_shape \(4,\)"):
        Conditional(nn.Linear(2, 5), heads.Normal((2,)), event_dim=1)(torch.zeros(3, 2))
