"""How many samples batches hold, and errors of outputs of every form."""

import copy
import math

import pytest
import torch
from torch import nn

import fxlean
from fxlean.calibration.samples import output_error, relative_output_error, sample_counts
from tests.support.blocks import conv

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A network around which a function takes inputs apart and puts outputs together."""

    def __init__(self, form=lambda body, *given: body(*given), channels=3):
        super().__init__()
        torch.manual_seed(0)
        body = [conv(channels, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, channels, 1)]
        self.body, self._form = nn.Sequential(*body), form

    def forward(self, *given):
        return self._form(self.body, *given)


def stacked(body, images):
    return list(body(torch.stack(images)))


def frames(body, clips):
    return body(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


BATCHES = {
    "images": (Network(), (IMAGES,), 8),
    "one image": (Network(), (IMAGES[0],), 1),
    "a plane": (Network(lambda body, x: body(x[None, None])[0, 0], 1), (IMAGES[0, 0],), 1),
    "a list of images": (Network(stacked), (list(IMAGES),), 1),
    "a table beside images": (
        Network(lambda body, table, x: body(x) + table.mean()),
        (torch.randn(100, 2), IMAGES),
        8,
    ),
    "a template for all": (Network(lambda body, one, x: body(one * x)), (IMAGES[:1], IMAGES), 8),
    "clips": (Network(frames), (IMAGES.unflatten(0, (2, 4)),), 2),
    "as many as it was written for": (
        Network(lambda body, x: body(x).reshape(8, -1)),
        (IMAGES,),
        1,
    ),
    "no convolution": (nn.Linear(6, 2), (IMAGES[:, 0, 0],), 8),
}


@pytest.mark.parametrize("name", BATCHES)
def test_samples_are_counted(name):
    model, batch, expected = BATCHES[name]
    assert sample_counts(model, [batch, batch]) == [expected] * 2


@pytest.mark.parametrize("name", [name for name in BATCHES if name != "no convolution"])
def test_every_form_of_batch_is_held_out_of_repair_and_shrink(name):
    model, batch, size = BATCHES[name]
    batches = [batch] * 4
    small = fxlean.shrink(model, 0.9, batches, rounds=1, progress=False)
    assert fxlean.report(small, batch).macs < fxlean.report(model, batch).macs
    fxlean.prune(model, 0.7, batch, method="l1")
    result = fxlean.repair(model, batches)
    held = 8 if size == 8 else 2 * size
    assert (result.samples, result.held) == (4 * size - held, held)
    assert result.after < result.before < math.inf


def test_a_batch_that_cannot_be_divided_needs_another():
    model, batch, _ = BATCHES["a list of images"]
    with pytest.raises(fxlean.ArgumentError, match=r"takes only as a whole. Pass at least two"):
        fxlean.repair(model, [batch], Network(stacked))


@pytest.mark.parametrize(
    "form", [lambda y: y.mean((1, 2, 3)), lambda y: y.mean((1, 2, 3)).unsqueeze(1)]
)
def test_one_number_for_each_sample_is_an_output(form):
    model = Network(lambda body, x: form(body(x)))
    other = Network(lambda body, x: body(x).mean((1, 2, 3), keepdim=True))
    for network in (model, other):
        fxlean.prune(network, 0.5, IMAGES, method="l1")
    result, expected = (fxlean.repair(network, IMAGES) for network in (model, other))
    assert result.before == pytest.approx(expected.before, rel=1e-4)
    assert result.after == pytest.approx(expected.after, rel=1e-4)
    assert result.before > 0


def test_errors_by_brute_force():
    found, wanted = torch.randn(2, 3, 12, 4, 5, dtype=torch.float64)
    by_batch = ([[part] for part in values] for values in (found, wanted))
    squared, spread = output_error(*by_batch, [12] * 3, [0.25] * 3)
    held, target = found[:, 9:], wanted[:, 9:]
    assert squared == pytest.approx(float((held - target).square().sum()))
    mean = target.mean((0, 1, 3), keepdim=True)
    assert spread == pytest.approx(float((target - mean).square().sum()))


def test_errors_of_numbers_for_whole_batches():
    found, wanted = ([[torch.tensor(x)] for x in values] for values in ([1.0, 5.0], [2.0, 4.0]))
    assert output_error(found, wanted, [8, 8], [0.25, 0.25]) == (2.0, 2.0)
    assert output_error(found, wanted, [8, 8], [0.0, 1.0]) == (1.0, 0.0)


@pytest.mark.parametrize("form", [lambda y: y[:, 0], lambda y: {"map": y, "nothing": y[:0]}])
def test_images_of_several_sizes(form):
    model = Network(lambda body, x: form(body(x)))
    fxlean.prune(model, 0.6, IMAGES, method="l1")
    result = fxlean.repair(model, [IMAGES, torch.cat([IMAGES] * 2, 2)])
    assert result.after < result.before < math.inf


@pytest.mark.parametrize(
    "form", [lambda y: list(y.mean((2, 3))), lambda y: y.mean((2, 3)).T, lambda y: y.sum()]
)
def test_outputs_that_are_not_one_entry_for_each_sample(form):
    model = Network(lambda body, x: form(body(x)))
    fxlean.prune(model, 0.6, IMAGES, method="l1")
    result = fxlean.repair(model, list(IMAGES.split(4)))
    assert result.after <= result.before < math.inf


@pytest.mark.filterwarnings("ignore:no rule for aten.copy_:fxlean.PruneWarning")
def test_outputs_that_the_next_run_overwrites():
    class Kept(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(4, 3, 6, 6))

        def forward(self, x):
            return self.last.copy_(super().forward(x))

    model = Kept()
    fxlean.prune(model, 0.85, IMAGES[:4], method="l1", redundancy=False)
    before, reference = copy.deepcopy(model), Kept()
    result = fxlean.repair(model, list(IMAGES.split(4)), reference)
    with torch.no_grad():
        before, after, wanted = (
            torch.stack([network(part)[3].clone() for part in IMAGES.split(4)])
            for network in (before, model, reference)
        )
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    for found, reported in ((before, result.before), (after, result.after)):
        assert reported == pytest.approx(float(((found - wanted).square().sum() / spread).sqrt()))
    assert result.after < result.before


def test_what_is_infinite_in_the_reference_is_left_out():
    mask = torch.tensor([True, False, False])[:, None, None]
    model, other = (
        Network(lambda body, x, fill=fill: body(x).masked_fill(mask, fill))
        for fill in (-math.inf, 0.0)
    )
    for network in (model, other):
        fxlean.prune(network, 0.6, IMAGES, method="l1")
    result, expected = (fxlean.repair(network, IMAGES) for network in (model, other))
    assert (result.before, result.after) == (expected.before, expected.after)
    assert 0 < result.after < result.before


def test_errors_that_are_no_numbers():
    wanted = torch.randn(4, 2)
    assert relative_output_error([[wanted / 0 * 0]], [[wanted]]) == math.inf
    assert math.isnan(relative_output_error([[]], [[]]))
    assert math.isnan(relative_output_error([[wanted[:2]]], [[wanted]]))


def test_outputs_without_an_error_are_told():
    model = Network(lambda body, x: body(x).argmax(1))
    with pytest.raises(fxlean.ArgumentError, match=r"no floating-point tensor.*Pass a ratio"):
        fxlean.shrink(model, batches=IMAGES, tolerance=0.1)
    fxlean.prune(model, 0.5, IMAGES, method="l1")
    result = fxlean.repair(model, IMAGES)
    assert math.isnan(result.before)
    assert math.isnan(result.after)


def test_a_repair_that_is_worse_on_a_single_sample_is_undone_as_well(monkeypatch):
    # One value alone has no variance, so that relative errors are infinite.
    model = Network(lambda body, x: body(x).mean((1, 2, 3)))
    fxlean.prune(model, 0.5, IMAGES, method="l1")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def spoil(network, *_):
        with torch.no_grad():
            network.body[0].weight_orig += 1
        return [], {}

    monkeypatch.setattr("fxlean.calibration.repair_model._repair_all", spoil)
    result = fxlean.repair(model, IMAGES[:2])
    assert result.before == result.after == math.inf
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
