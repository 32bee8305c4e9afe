r"""Evaluates a trained pair: bounds on `log p(x)` for each image, in nats, and their diagnostics.

The functions work on any Pyro pair whose sites are all in one data plate. Numbers are computed for
each image and averaged over images, never over batches. `over` takes its noise from a fixed seed
and does not change the global random state. `python -m pvae.evaluate RUN_DIR` prints all numbers of
a run.
"""

from pvae.evaluate.annealed import (
    Annealed as Annealed,
    Annealer as Annealer,
    Sandwich as Sandwich,
    Simulated as Simulated,
    simulate as simulate,
    temperatures as temperatures,
)
from pvae.evaluate.bounds import (
    Bound as Bound,
    Estimate as Estimate,
    bits_per_dimension as bits_per_dimension,
    elbo as elbo,
    estimate as estimate,
    fixed_noise as fixed_noise,
    not_finite as not_finite,
    over as over,
)
from pvae.evaluate.calibrating import (
    CALIBRATED as CALIBRATED,
    Calibration as Calibration,
    calibration as calibration,
)
from pvae.evaluate.diagnostics import (
    ACTIVE as ACTIVE,
    Information as Information,
    active_units as active_units,
    information as information,
    posterior_means as posterior_means,
    unit_variances as unit_variances,
)
from pvae.evaluate.factors import (
    Gaps as Gaps,
    full_covariance_factors as full_covariance_factors,
    gaps as gaps,
    one_factor_each as one_factor_each,
    optimize_factors as optimize_factors,
)
from pvae.evaluate.importance import (
    UNRELIABLE as UNRELIABLE,
    Importance as Importance,
    ImportanceSampler as ImportanceSampler,
    importance_weighted as importance_weighted,
    pareto_k as pareto_k,
)
from pvae.evaluate.posterior import nuts as nuts
from pvae.evaluate.probing import Probe as Probe, can_probe as can_probe, probe as probe
from pvae.programs import evaluating as evaluating
