r"""What a trained model/guide pair is worth: bounds on `log p(x)` for each image, in nats, and what
says whether they are to be believed.

Works on any Pyro pair whose sites all lie in one data plate. Numbers are computed for each image
and averaged over images, never over batches; the noise comes from a fixed seed, and the global
random state is left as it was. `python -m pvae.evaluate RUN_DIR` prints them all for a run.
"""

from pvae.evaluate.annealed import (
    Annealed,
    Sandwich,
    Simulated,
    annealed,
    annealed_back,
    bidirectional,
    simulate,
    temperatures,
)
from pvae.evaluate.bounds import (
    Bound,
    Estimate,
    bits_per_dimension,
    elbo,
    estimate,
    fixed_noise,
    over,
)
from pvae.evaluate.diagnostics import (
    ACTIVE,
    Information,
    information,
    posterior_means,
    unit_variances,
)
from pvae.evaluate.factors import (
    Gaps,
    full_covariance_factors,
    gaps,
    one_factor_each,
    optimize_factors,
)
from pvae.evaluate.importance import (
    UNRELIABLE,
    Importance,
    ImportanceSampler,
    importance_sampling,
    importance_weighted,
    pareto_k,
)
from pvae.evaluate.posterior import nuts
from pvae.evaluate.probe import Probe, probe
from pvae.programs import evaluating

__all__ = [
    "ACTIVE",
    "UNRELIABLE",
    "Annealed",
    "Bound",
    "Estimate",
    "Gaps",
    "Importance",
    "ImportanceSampler",
    "Information",
    "Probe",
    "Sandwich",
    "Simulated",
    "annealed",
    "annealed_back",
    "bidirectional",
    "bits_per_dimension",
    "elbo",
    "estimate",
    "evaluating",
    "fixed_noise",
    "full_covariance_factors",
    "gaps",
    "importance_sampling",
    "importance_weighted",
    "information",
    "nuts",
    "one_factor_each",
    "optimize_factors",
    "over",
    "pareto_k",
    "posterior_means",
    "probe",
    "simulate",
    "temperatures",
    "unit_variances",
]
