"""On which inputs a candidate is held against the pruned model."""

import pytest
import torch
from torch import nn

from fxlean.compaction.verify import Check, trains


class Sum(nn.Module):
    """Adds up channels, and doubles the result for inputs that fit a condition."""

    def __init__(self, doubles=lambda x: False, accepts=lambda x: True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 3, 1))
        self.doubles, self.accepts = doubles, accepts

    def forward(self, x):
        if not self.accepts(x):
            raise ValueError("no such size")
        result = (x * self.weight).sum(1)
        return 2 * result if self.doubles(x) else result


def at_given_size(x):
    return x.shape[-1] == 8


CASES = {
    "at the given size": (at_given_size, torch.randn(1, 3, 8)),
    "at the given size, of zeros": (at_given_size, torch.zeros(1, 3, 8)),
    "at the given size, of ones": (at_given_size, torch.ones(1, 3, 8)),
    "at other sizes": (lambda x: not at_given_size(x), torch.randn(1, 3, 8)),
    "at other sizes than that of zeros": (lambda x: not at_given_size(x), torch.zeros(1, 3, 8)),
    "at other sizes than a large one": (lambda x: x.shape[-1] != 300, torch.randn(1, 3, 300)),
    "on ones": (lambda x: bool((x == 1).all()), torch.ones(1, 3, 8)),
    "on what is positive": (lambda x: bool((x > 0).all()), torch.rand(1, 3, 8) + 0.1),
    "on what is negative somewhere": (lambda x: bool((x < 0).any()), torch.rand(1, 3, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_difference_is_found(name):
    doubles, given = CASES[name]
    check = Check(Sum(), Sum(), (given,))
    assert not check.problem(Sum())
    assert "outputs differ" in check.problem(Sum(doubles))


@pytest.mark.parametrize("given", [torch.zeros(1, 3, 8), torch.rand(1, 3, 8)])
def test_the_masked_model_is_what_counts_also_where_zeros_hide_its_weights(given):
    masked = Sum()
    masked.weight.data *= 2
    assert "outputs differ" in Check(masked, Sum(), (given,)).problem(Sum())


@pytest.mark.parametrize(("given", "other"), [(8, 40), (100, 132), (224, 128), (513, 257)])
def test_the_other_size_is_cheap_and_leaves_the_same_remainder(given, other):
    seen = set()

    def note(x):
        seen.add(x.shape[-1])
        return True

    Check(Sum(accepts=note), Sum(), (torch.rand(1, 3, given),))
    assert seen == {given, other}


def test_wider_noise_is_tried_where_a_model_takes_nothing_narrower():
    def at_least_given(x):
        return x.shape[-1] >= 224

    check = Check(Sum(accepts=at_least_given), Sum(), (torch.rand(1, 3, 224),))
    assert not check.problem(Sum())
    assert "outputs differ" in check.problem(Sum(lambda x: x.shape[-1] == 256))


class Draws(Sum):
    """Adds a random number and how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + torch.rand(1) + self.calls


@pytest.mark.parametrize("given", [torch.zeros(1, 3, 8), torch.rand(1, 3, 8)])
def test_random_numbers_and_counters_are_the_same_for_a_candidate(given, monkeypatch):
    monkeypatch.setattr(Check, "_is_rounding", lambda *_: False)
    assert not Check(Draws(), Draws(), (given,)).problem(Draws())


@pytest.mark.parametrize("given", [torch.zeros(1, 3, 8), torch.rand(1, 3, 8)])
def test_noise_of_the_given_size_is_tried_where_there_is_no_other(given):
    check = Check(Sum(accepts=at_given_size), Sum(accepts=at_given_size), (given,))
    assert not check.problem(Sum(accepts=at_given_size))
    assert "outputs differ" in check.problem(Sum(lambda x: bool((x < 0).any()), at_given_size))


def test_one_sample_is_taken_twice_where_a_batch_norm_needs_more():
    def pooled(width):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(width, 2, 1))

    model = pooled(3)
    assert trains(model, (torch.rand(1, 3, 8, 8),))
    assert model[1].num_batches_tracked == 0
    assert not trains(pooled(4), (torch.rand(1, 3, 8, 8),))


class Codebook(nn.Module):
    """Keeps a running mean in a parameter, in training."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.add_(x.mean((0, 2, 3)))
        return x - self.mean[:, None, None]


def test_parameters_that_training_writes_are_put_back():
    model = Codebook()
    assert trains(model, (torch.rand(1, 3, 8, 8),))
    assert torch.equal(model.mean, torch.zeros(3))


def test_a_model_that_rejects_what_is_given_raises():
    with pytest.raises(ValueError, match="no such size"):
        Check(Sum(accepts=lambda x: False), Sum(), (torch.rand(1, 3, 8),))


class Boxes(nn.Module):
    """Images and boxes, which it looks at."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x, boxes):
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ValueError("no boxes")
        return self.layer(x).mean((2, 3)) + boxes


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)])
def test_boxes_beside_images_are_no_noise(images):
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 9.0, 9.0]])
    torch.manual_seed(0)
    model = Boxes()
    check = Check(model, model, (images, boxes))
    assert not check.problem(model)
    other = Boxes()
    other.layer.bias = model.layer.bias
    assert "outputs differ" in check.problem(other)  # which zeros alone would not tell


def test_what_a_model_is_given_is_enough_where_it_takes_no_noise():
    given = torch.tensor([[0.0, 0.0, 5.0, 5.0]])

    class Alone(nn.Module):
        def forward(self, boxes):
            return Boxes.forward(Boxes(), torch.zeros(1, 3, 8, 8), boxes) - boxes

    Check(Alone(), Alone(), (given,))
