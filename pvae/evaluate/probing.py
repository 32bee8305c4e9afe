"""How well two simple classifiers find the labels from posterior means, the codes."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from pvae.evaluate.bounds import Estimate, estimate


class Probe(NamedTuple):
    """Test accuracies, between 0 and 1, with their standard errors over test images.

    They say how much a linear map or the nearest neighbours find of the labels in the codes. They
    do not measure the generative model: a worse bound may come with a better probe.
    """

    nearest_neighbours: Estimate
    logistic_regression: Estimate


def probe(
    train_means: Tensor,
    train_labels: Tensor,
    test_means: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 5,
) -> Probe:
    """Fits both classifiers to training codes `(N, D)` with labels `(N,)`, and tests them.

    Each unit is standardized by the training codes. All other settings are scikit-learn's defaults.

    Raises:
        ValueError: the training labels are all the same, or fewer than `neighbours`.

    >>> import torch
    >>> codes, labels = torch.arange(20.0)[:, None], torch.arange(20) // 10
    >>> probe(codes, labels, codes, labels).logistic_regression.mean
    1.0
    """
    # imported here: scikit-learn takes a second to import, and few runs need it
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not can_probe(train_labels, neighbours):
        raise ValueError(
            f"train_labels must be at least {neighbours} of at least two classes, not "
            f"{len(train_labels)} of {len(train_labels.unique())}"
        )
    x, y = _numpy(train_means), _numpy(train_labels)

    def accuracy(classifier: object) -> Estimate:
        fitted = make_pipeline(StandardScaler(), classifier).fit(x, y)
        right = fitted.predict(_numpy(test_means)) == _numpy(test_labels)
        return estimate(test_means.new_tensor(right))

    return Probe(
        accuracy(KNeighborsClassifier(neighbours)), accuracy(LogisticRegression(max_iter=1000))
    )


def can_probe(labels: Tensor, neighbours: int = 5) -> bool:
    """Whether both classifiers can be fitted to these labels: at least `neighbours` labels, of at
    least two classes.

    >>> import torch
    >>> can_probe(torch.tensor([0, 0, 0, 0, 1])), can_probe(torch.zeros(5))
    (True, False)
    """
    return len(labels) >= neighbours and len(labels.unique()) > 1


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
