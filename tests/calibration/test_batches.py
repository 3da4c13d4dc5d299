"""Batches in every form that users have them in, and noise in their place."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxlean
from fxlean.calibration.batches import example_and_batches, read_batches, restartable
from fxlean.calibration.noise import input_range, noise_batches, spectral_noise
from fxlean.tracing.leaves import tensors_in
from tests.support.blocks import conv
from tests.support.compare import same_state, state

IMAGES, LABELS = torch.randn(6, 3, 8, 8), torch.arange(6)
MODEL = nn.Sequential(conv(3, 4), conv(4, 2))


class Two(nn.Module):
    """Takes two images, the second of which may be left out."""

    def __init__(self):
        super().__init__()
        self.layer = conv(3, 4)

    def forward(self, left, right=None):
        return self.layer(left) if right is None else self.layer(left + right)


def shapes(model, batches):
    return [[tuple(x.shape) for x in tensors_in(batch)] for batch in read_batches(model, batches)]


ONE = (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (IMAGES, [[(6, 3, 8, 8)]]),
        ((IMAGES,), [[(6, 3, 8, 8)]]),
        ({"input": IMAGES}, [[(6, 3, 8, 8)]]),
        ([IMAGES[:2], IMAGES[2:4]], [[ONE], [ONE]]),
        (iter([IMAGES[:2]]), [[ONE]]),
        (IMAGES.split(2), [[ONE]] * 3),
        (IMAGES.split([4, 2]), [[(4, 3, 8, 8)], [ONE]]),
        ([{"input": IMAGES[:2]}], [[ONE]]),
        ((IMAGES, LABELS), [[(6, 3, 8, 8)]]),
        (DataLoader(TensorDataset(IMAGES, LABELS), 4), [[(4, 3, 8, 8)], [ONE]]),
        (DataLoader(TensorDataset(IMAGES), 4), [[(4, 3, 8, 8)], [ONE]]),
    ],
)
def test_forms_of_batches(batches, expected):
    assert shapes(MODEL, batches) == expected


def test_two_arguments_that_the_model_takes_are_no_labels():
    assert shapes(Two(), (IMAGES, IMAGES)) == [[(6, 3, 8, 8)] * 2]
    assert shapes(Two(), {"right": IMAGES, "left": IMAGES}) == [[(6, 3, 8, 8)] * 2]
    assert shapes(Two(), DataLoader(TensorDataset(IMAGES, LABELS), 6)) == [[(6, 3, 8, 8)]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (3, r"batches is a int. Pass an iterable of batches, each a tensor"),
        (
            IMAGES.split(3),
            r"two tensors of one shape: two batches, or inputs and targets\? Pass a list",
        ),
        ([], r"batches is empty. Pass at least one"),
        (["images"], r"batch 0 is a str. Pass a tensor"),
        ([(IMAGES, LABELS, LABELS)], r"(?s)rejects batch 0.*drop them: \(images for images, lab"),
        (IMAGES[:, :2], r"(?s)Sequential rejects batch 0, \(6, 2, 8, 8\): RuntimeError"),
        ([IMAGES, LABELS], r"(?s)Sequential rejects batch 1, \(6,\): "),
        ({"image": IMAGES}, r"(?s)keys image, which Sequential.forward does not take.*Leave out"),
        (
            [IMAGES[:0]],
            r"batch 0 holds an empty tensor of shape \(0, 3, 8, 8\).*at least one sample",
        ),
        ([IMAGES, IMAGES / 0], r"batch 1 holds NaN or infinity. Leave such samples out"),
    ],
)
def test_batches_that_make_no_sense(batches, message):
    with pytest.raises(fxlean.ArgumentError, match=message):
        list(read_batches(MODEL, batches))


def test_arguments_that_can_only_be_passed_by_name():
    class Named(Two):
        def forward(self, left, *, right):
            return self.layer(left + right)

    (batch,) = read_batches(Named(), {"left": IMAGES, "right": IMAGES})
    assert list(batch) == ["left", "right"]
    model = Named()
    result = fxlean.prune(
        model,
        0.5,
        method="relevance",
        prune_outputs=True,
        calibration=dict(left=IMAGES, right=IMAGES),
    )
    assert result.calibration == "batches"


def test_a_bad_batch_leaves_the_model_as_it_was():
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    before = state(model)
    with pytest.raises(fxlean.ArgumentError, match="batch 1 holds NaN"):
        fxlean.prune(model, 0.5, method="relevance", calibration=[IMAGES, IMAGES * torch.nan])
    assert same_state(model.state_dict(), before)


def test_what_can_be_read_only_once_is_kept_in_a_list():
    assert restartable(iter([IMAGES])) == [IMAGES]
    loader = DataLoader(TensorDataset(IMAGES), 2)
    assert restartable(loader) is loader


def test_noise_has_the_form_of_the_arguments():
    mask = torch.ones(2, dtype=torch.int64)
    batches = list(noise_batches(MODEL, (IMAGES[:2].double(), [mask, "text"]), samples=6))
    assert len(batches) == 3
    assert not torch.equal(batches[0][0], batches[1][0])
    for image, (same, text) in batches:
        assert image.shape == ONE
        assert image.dtype == torch.float64
        assert same is mask
        assert text == "text"
    assert torch.equal(
        batches[0][0], next(noise_batches(MODEL, (IMAGES[:2].double(), [mask]), 6))[0]
    )


@pytest.mark.parametrize("size", [(), (64,), (16, 24), (8, 6, 10)])
def test_noise_has_unit_variance_and_falls_with_frequency(size):
    noise = spectral_noise((512, 2, *size), torch.Generator().manual_seed(0))
    assert noise.mean().abs() < 0.1
    assert noise.var().item() == pytest.approx(1, abs=0.1)
    if size:
        power = torch.fft.fft(noise.transpose(2, -1), dim=2).abs().square().mean((0, 1))
        power = power.reshape(len(power), -1).mean(1)
        assert power[1] > 2 * power[len(power) // 2]


def test_the_range_of_the_inputs_is_read_off_the_first_batch_norm():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(2)]
    model = nn.Sequential(conv(3, 8), norms[0], nn.ReLU(), conv(8, 2), norms[1])
    generator = torch.Generator().manual_seed(1)
    images = 0.4 * spectral_noise((256, 3, 16, 16), generator) + 3
    with torch.no_grad():
        model.train()(images)
    before = state(model)
    scale, offset = input_range(model, (images[:64],))
    assert scale == pytest.approx(0.4, rel=0.1)
    assert offset == pytest.approx(3, rel=0.1)
    noise = torch.cat([batch for (batch,) in noise_batches(model, (images[:64],))])
    assert noise.mean().item() == pytest.approx(3, rel=0.1)
    assert noise.std().item() == pytest.approx(0.4, rel=0.1)
    assert same_state(model.state_dict(), before)
    assert not any(norm._forward_pre_hooks for norm in norms)


@pytest.mark.parametrize("layers", [[], [nn.BatchNorm2d(2, track_running_stats=False)]])
def test_without_statistics_noise_has_unit_variance(layers):
    assert input_range(nn.Sequential(conv(3, 2), *layers), (IMAGES,)) == (1, 0)


def test_a_batch_norm_that_does_not_respond_tells_no_range():
    model = nn.Sequential(conv(3, 2), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.zero_()
    assert input_range(model, (IMAGES,)) == (1, 0)


def test_inputs_are_guessed_where_there_are_neither_inputs_nor_batches():
    example, batches = example_and_batches(MODEL, None, None)
    assert example[0].shape == (1, 3, 64, 64)
    assert next(batches)[0].shape == (64, 3, 64, 64)
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(fxlean.ArgumentError, match="Sequential accepts none of the inputs tried"):
        example_and_batches(model, None, None)


def test_nothing_takes_the_place_of_whole_numbers():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3))
            self.table = nn.Embedding(9, 4)

        def forward(self, words):
            return self.body(self.table(words).mT)

    words = torch.randint(9, (2, 8))
    model = Text()
    before = state(model)
    with pytest.raises(
        fxlean.ArgumentError, match=r"example_inputs, \(2, 8\), holds no float.*Pass"
    ):
        fxlean.prune(model, 0.5, words, method="relevance")
    assert same_state(model.state_dict(), before)
    assert fxlean.prune(model, 0.5, method="relevance", calibration=words).calibration == "batches"


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_batches_of_one_value_are_told(value):
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2, 1))
    constant = torch.full((2, 3, 8, 8), value)
    with pytest.warns(fxlean.PruneWarning, match="values of the batches are equal.*real batches"):
        fxlean.prune(model, 0.5, method="relevance", calibration=[constant, constant])
    fxlean.prune(model, 0.4, method="relevance", calibration=[constant, constant + 1])
