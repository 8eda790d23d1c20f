"""The linear probe: optima found another way, and choices that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zo_ds.evaluation.probe import STRENGTHS, Classifier, Sample, fit, linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def random_sample(examples: int, width: int, classes: int, seed: int = 0, noise: float = 1.0) -> Sample:
    """Features around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(examples) % classes
    return Sample(centres[labels] + noise * torch.randn(examples, width, generator=generator), labels)


def penalised(classifier: Classifier, sample: Sample, strength: float) -> Tensor:
    logits = sample.features.double() @ classifier.weight.T + classifier.bias
    each = logits.logsumexp(1) - logits.gather(1, sample.labels.unsqueeze(1)).squeeze(1)
    return each.mean() + strength / 2 * classifier.weight.pow(2).sum()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(
    ("examples", "width", "classes", "noise"),
    [(60, 4, 2, 1.0), (60, 5, 3, 2.0), (12, 40, 3, 1.0), (40, 3, 2, 0.01)],
    ids=["two", "three", "wide", "separable"],
)
def test_the_gradient_is_zero_and_the_minimum_a_minimum(
    examples: int, width: int, classes: int, noise: float, strength: float
) -> None:
    sample = random_sample(examples, width, classes, noise=noise)
    found = fit(sample, classes, strength)
    at = Classifier(found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_())
    penalised(at, sample, strength).backward()
    for gradient in (at.weight.grad, at.bias.grad):
        assert gradient is not None
        assert float(gradient.abs().max()) < 1e-7
    assert float(penalised(found, sample, strength)) < math.log(classes)
    # The bias alone is free; its sum is that of the start.
    assert float(found.bias.sum()) == pytest.approx(0.0, abs=1e-8)
    assert float(found.weight.sum(0).abs().max()) < 1e-7


def test_two_classes_by_newtons_method() -> None:
    """With W = (-w/2, w/2) the problem is that of one logit: mean softplus(-y (w x + b)) + strength / 4 * w^2."""
    x, y, strength = [-1.0, -0.2, 0.3, 0.5, 2.0], [0, 1, 0, 1, 1], 0.1
    w = b = 0.0
    for _ in range(50):
        shares = [1 / (1 + math.exp(-(w * value + b))) for value in x]
        slope = [
            sum((p - t) * v for p, t, v in zip(shares, y, x, strict=True)) / 5 + strength / 2 * w,
            sum(p - t for p, t in zip(shares, y, strict=True)) / 5,
        ]
        bends = [p * (1 - p) / 5 for p in shares]
        ww = sum(c * v * v for c, v in zip(bends, x, strict=True)) + strength / 2
        wb, bb = sum(c * v for c, v in zip(bends, x, strict=True)), sum(bends)
        determinant = ww * bb - wb * wb
        w -= (bb * slope[0] - wb * slope[1]) / determinant
        b -= (ww * slope[1] - wb * slope[0]) / determinant
    found = fit(Sample(torch.tensor(x).unsqueeze(1), torch.tensor(y)), 2, strength)
    # fp32 features are not the decimals above.
    assert found.weight.flatten().tolist() == pytest.approx([-w / 2, w / 2], abs=1e-6)
    assert found.bias.tolist() == pytest.approx([-b / 2, b / 2], abs=1e-6)


def test_a_symmetric_pair_has_the_weight_of_a_scalar_equation() -> None:
    """Features +-1 of classes 1, 0: no bias, and w = 2 / strength * sigmoid(-w) where W = (-w/2, w/2)."""
    strength, low, high = 0.01, 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 / strength / (1 + math.exp(middle)) > middle else (low, middle)
    found = fit(Sample(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])), 2, strength)
    assert found.weight.flatten().tolist() == pytest.approx([-low / 2, low / 2], rel=1e-7)
    assert found.bias.abs().max() < 1e-9


def test_without_features_the_bias_is_the_share_of_the_classes() -> None:
    found = fit(Sample(torch.zeros(4, 3), torch.tensor([0, 1, 1, 1])), 2, 0.1)
    assert found.bias.softmax(0).tolist() == pytest.approx([0.25, 0.75], abs=1e-8)
    assert torch.equal(found.weight, torch.zeros(2, 3, dtype=torch.float64))


def test_separable_samples_are_separated() -> None:
    parts = [random_sample(30, 8, 3, seed, noise=0.05) for seed in range(3)]
    found = linear_probe(*parts, 3)
    assert (found.accuracy, found.dev_accuracy) == (1.0, 1.0)
    assert torch.equal(found.predictions, parts[2].labels)


def test_the_same_twice_and_whatever_the_scale_of_a_feature() -> None:
    parts = [random_sample(40, 6, 2, seed, noise=2.0) for seed in range(3)]
    one, other = linear_probe(*parts, 2), linear_probe(*parts, 2)
    assert one.loss == other.loss
    assert torch.equal(one.predictions, other.predictions)
    stretch, shift = torch.tensor([1e3, 1.0, 1e-2, 1.0, 1.0, 5.0]), torch.tensor([0.0, 7.0, 0.0, -3.0, 0.0, 0.0])
    stretched = linear_probe(*(Sample(part.features * stretch + shift, part.labels) for part in parts), 2)
    assert stretched.strength == one.strength
    assert stretched.loss == pytest.approx(one.loss, rel=1e-3)


def test_the_strength_is_the_one_that_the_dev_sample_likes_best() -> None:
    train, dev, test = (random_sample(count, 20, 2, seed, noise=4.0) for seed, count in enumerate((24, 200, 200)))
    alone = {strength: linear_probe(train, dev, test, 2, [strength]) for strength in STRENGTHS}
    found = linear_probe(train, dev, test, 2)
    assert found.dev_accuracy == max(probe.dev_accuracy for probe in alone.values())
    assert found.accuracy == alone[found.strength].accuracy
    assert len({probe.dev_accuracy for probe in alone.values()}) > 1
    assert found.accuracy == float((found.predictions == test.labels).double().mean())


def test_between_equals_the_stronger_penalty() -> None:
    """Features that say nothing: every strength gives the same classifier."""
    train, dev = Sample(torch.ones(4, 2), torch.tensor([0, 1, 0, 1])), Sample(torch.ones(2, 2), torch.tensor([0, 1]))
    assert linear_probe(train, dev, dev, 2).strength == max(STRENGTHS)


def test_a_feature_that_is_constant_in_training_is_not_used() -> None:
    train = random_sample(20, 3, 2, noise=0.1)
    train.features[:, 1] = 0.1
    strange = Sample(train.features.clone(), train.labels)
    strange.features[:, 1] = 1e6
    assert linear_probe(train, train, strange, 2).loss == linear_probe(train, train, train, 2).loss


def test_a_class_without_examples_gets_none() -> None:
    train = random_sample(20, 3, 2, noise=0.1)
    found = linear_probe(train, train, train, 3)
    assert found.accuracy == 1.0


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 2), torch.tensor([0])),
        (torch.zeros(2), torch.tensor([0, 1])),
        (torch.zeros(2, 2), torch.tensor([0, 2])),
        (torch.zeros(2, 2), torch.tensor([-1, 1])),
        (torch.full((2, 2), math.nan), torch.tensor([0, 1])),
    ],
)
def test_what_is_no_sample_is_refused(features: Tensor, labels: Tensor) -> None:
    good = Sample(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"no sample|not finite"):
        fit(Sample(features, labels), 2, 0.1)
    with pytest.raises(ValueError, match=r"no sample|not finite"):
        linear_probe(good, Sample(features, labels), good, 2)


def test_strengths_that_cannot_be_are_refused() -> None:
    good = Sample(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not positive"):
        fit(good, 2, 0.0)
    with pytest.raises(ValueError, match="no strength"):
        linear_probe(good, good, good, 2, [])
