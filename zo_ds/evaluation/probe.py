"""A linear probe: logistic regression on a frozen model's representations, the cheapest baseline that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the penalty, what `linear_probe` tries."""
_ITERATIONS = 2000
_GRADIENT = 1e-10
"""The largest entry of the gradient at which a fit has converged."""


class Sample(NamedTuple):
    """Representations with their labels.

    Attributes:
        features: fp32 [n, d].
        labels: int64 [n], from 0.
    """

    features: Tensor
    labels: Tensor


class Classifier(NamedTuple):
    """A linear classifier.

    Attributes:
        weight: fp64 [classes, d].
        bias: fp64 [classes].
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """fp64 [n, classes]."""
        return features.double() @ self.weight.T + self.bias


class Probe(NamedTuple):
    """What a linear probe found.

    Attributes:
        strength: of the penalty, the best on the dev sample.
        dev_accuracy: with it, 0..1.
        predictions: int64 [n], classes of the test sample.
        accuracy: on the test sample, 0..1.
        loss: mean cross-entropy on the test sample.
    """

    strength: float
    dev_accuracy: float
    predictions: Tensor
    accuracy: float
    loss: float


def fit(sample: Sample, classes: int, strength: float) -> Classifier:
    """Multinomial logistic regression: the minimum of mean cross-entropy + strength / 2 * |weight|^2.

    L-BFGS in fp64 from zero, so that the same sample gives the same classifier. The bias is not penalised.

    Args:
        sample: one example or more.
        classes: how many there are, whether or not the sample has all of them.
        strength: above 0, without which separable samples have no minimum.

    Raises:
        ValueError: the sample is empty, its parts do not fit each other, or strength is not positive.
    """
    count, labels = _checked(sample, classes), sample.labels
    if not strength > 0:
        raise ValueError(f"strength {strength} is not positive")
    features = sample.features.to(torch.float64, copy=True)
    parameters = torch.zeros(classes, features.shape[1] + 1, dtype=torch.float64, device=features.device)
    weight, bias = parameters[:, :-1], parameters[:, -1]
    targets = torch.nn.functional.one_hot(labels, classes).double()
    parameters.grad = torch.zeros_like(parameters)

    def closure() -> Tensor:
        logits = features @ weight.T + bias
        slope = (logits.softmax(1) - targets) / count
        assert parameters.grad is not None
        parameters.grad[:, :-1] = slope.T @ features + strength * weight
        parameters.grad[:, -1] = slope.sum(0)
        return torch.nn.functional.cross_entropy(logits, labels) + 0.5 * strength * weight.square().sum()

    optimizer: Any = torch.optim.LBFGS(
        [parameters],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=_GRADIENT,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return Classifier(weight.clone(), bias.clone())


def linear_probe(
    train: Sample, dev: Sample, test: Sample, classes: int, strengths: Sequence[float] = STRENGTHS
) -> Probe:
    """Fit a classifier on the training sample, its penalty chosen on the dev sample, and try it on the test sample.

    Every feature is shifted and scaled to mean 0 and standard deviation 1 on the training sample first: entries of a
    hidden state differ in size by orders, and one penalty has to serve them all. A feature that is constant there
    becomes 0.

    Args:
        train: what the classifier is fitted on.
        dev: decides the strength: by accuracy, then by loss; between equals the stronger penalty is taken.
        test: what it is tried on.
        classes: how many there are.
        strengths: to choose from, one or more.

    Raises:
        ValueError: a sample is empty, or its parts do not fit each other.
    """
    for sample in (train, dev, test):
        _checked(sample, classes)
    shift, scale = train.features.double().mean(0), train.features.double().std(0, correction=0)
    constant = (train.features == train.features[0]).all(0)
    factor = torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, scale))

    def scaled(sample: Sample) -> Sample:
        return Sample((sample.features.double() - shift) * factor, sample.labels)

    train, dev, test = scaled(train), scaled(dev), scaled(test)
    best: tuple[tuple[float, float], float, Classifier] | None = None
    for strength in sorted(strengths, reverse=True):
        classifier = fit(train, classes, strength)
        _, accuracy, loss = _tried(classifier, dev)
        if best is None or (accuracy, -loss) > best[0]:
            best = (accuracy, -loss), strength, classifier
    if best is None:
        raise ValueError("there is no strength to choose")
    (dev_accuracy, _), strength, classifier = best
    return Probe(strength, dev_accuracy, *_tried(classifier, test))


def _tried(classifier: Classifier, sample: Sample) -> tuple[Tensor, float, float]:
    """(predictions, accuracy, mean cross-entropy)."""
    logits = classifier.logits(sample.features)
    predictions = logits.argmax(1)
    right = (predictions == sample.labels).double().mean()
    return predictions, float(right), float(torch.nn.functional.cross_entropy(logits, sample.labels))


def _checked(sample: Sample, classes: int) -> int:
    """How many examples a sample has."""
    features, labels = sample
    if features.dim() != 2 or labels.shape != features.shape[:1] or not labels.numel():
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} are no sample")
    if not bool(features.isfinite().all()) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"a feature is not finite, or a label is not in 0..{classes - 1}")
    return labels.numel()
