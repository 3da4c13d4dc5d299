"""Parameters of element-wise operators are cut with the channels that they belong to."""

import pytest
import torch
from torch import nn

import fxlean
from tests.support.compare import worst_error

WIDTH, SIDE = 16, 8
DEAD = ([1, 2, 3, 8, 9], [1, 2, 3, 8, 9, 11, 12])


class Scale(nn.Module):
    """A learned factor, and where it is asked for, a term that is zero."""

    def __init__(self, *shape: int, term: bool = True):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))
        self.beta = nn.Parameter(torch.zeros(shape)) if term else None

    def forward(self, x):
        x = x * self.gamma
        return x if self.beta is None else x + self.beta


class ByHand(nn.Module):
    """A factor for every channel that is brought into shape first."""

    def __init__(self, bring):
        super().__init__()
        self.gamma, self.bring = nn.Parameter(torch.randn(WIDTH)), bring

    def forward(self, x):
        return x * self.bring(self.gamma)


class Computed(nn.Module):
    """Element-wise, by two constants that code computes from vectors of one element a channel.

    They are the scale and the shift of a batch norm, of which none moves zero away from it.
    """

    def __init__(self, scale, trained=True):
        super().__init__()
        vectors = {"weight": torch.rand(WIDTH) + 0.5, "mean": torch.randn(WIDTH)}
        vectors |= {"variance": torch.rand(WIDTH) + 0.5, "gain": torch.rand(1) + 0.5}
        for name, vector in vectors.items():
            setattr(self, name, nn.Parameter(vector) if trained else nn.Buffer(vector))
        self.register_buffer("bias", self.mean.detach() * scale(self).detach())
        self.scale = scale

    def forward(self, x):
        scale = self.scale(self)
        shift = self.bias - self.mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Returned(Scale):
    """Returns its factor as well, so that it must stay as it is."""

    def forward(self, x):
        return super().forward(x), self.gamma


def network(*layers):
    """Two convolutions with dead channels, and what follows each of them."""
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1),
        layers[0],
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        layers[-1],
        nn.Conv2d(WIDTH, 2, 1),
    ).eval()
    with torch.no_grad():
        for layer, dead in zip((model[0], model[2]), DEAD, strict=True):
            layer.weight[dead] = 0
            layer.bias[dead] = 0
    return model


def compacted(model, shape=(2, 3, SIDE, SIDE)):
    x = torch.randn(shape)
    small = fxlean.compact(model, x)
    with torch.no_grad():
        assert worst_error(small(x), model(x)) < 1e-5
    return small


FORMS = {
    "prelu": lambda: nn.PReLU(WIDTH),
    "a factor and a term": lambda: Scale(WIDTH, 1, 1),
    "one for every position": lambda: Scale(1, WIDTH, SIDE, SIDE, term=False),
    "indexed": lambda: ByHand(lambda gamma: gamma[None, :, None, None]),
    "computed": lambda: Computed(lambda own: own.weight * (own.variance + 1e-5).rsqrt()),
    "computed from buffers": lambda: Computed(
        lambda own: own.gain * own.weight.exp() / own.variance.sqrt(), trained=False
    ),
    "viewed": lambda: ByHand(lambda gamma: gamma.view(1, -1, 1, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_live_channels_are_all_that_stays(form):
    torch.manual_seed(0)
    model = network(FORMS[form](), FORMS[form]())
    small = compacted(model)
    for layer, follower, dead in zip(small[0:3:2], small[1:4:2], DEAD, strict=True):
        assert layer.out_channels == WIDTH - len(dead)
        vectors = [tensor for tensor in follower.state_dict().values() if tensor.numel() > 1]
        assert vectors
        for vector in vectors:
            assert layer.out_channels in vector.shape
        assert all(parameter.requires_grad for parameter in follower.parameters())
    assert ("num_parameters=9" in str(small)) == (form == "prelu")


def test_a_parameter_that_is_used_twice_keeps_what_either_use_needs():
    torch.manual_seed(0)
    small = compacted(network(nn.PReLU(WIDTH)))
    both = set(DEAD[0]) & set(DEAD[1])
    assert small[1] is small[3]
    assert small[0].out_channels == small[2].out_channels == WIDTH - len(both)


def test_a_buffer_that_is_not_saved_stays_for_it_is_whole_where_a_model_is_loaded():
    torch.manual_seed(0)
    norm = Computed(lambda own: own.weight, trained=False)
    norm.register_buffer("variance", norm.variance, persistent=False)
    norm.register_buffer("weight", norm.weight, persistent=False)
    small = compacted(network(norm, nn.ReLU()))
    assert [small[0].out_channels, small[2].out_channels] == [WIDTH, WIDTH - len(DEAD[1])]
    assert small[1].bias.shape == (WIDTH,)


def test_a_parameter_that_is_used_in_another_way_stays():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(Returned(WIDTH, 1, 1), nn.ReLU())

        def forward(self, x):
            x, gamma = self.body[1](self.body[0](x))
            return self.body[2:](x), gamma

    small = compacted(Model().eval()).body
    assert small[0].out_channels == WIDTH
    assert small[2].out_channels == WIDTH - len(DEAD[1])


@pytest.mark.parametrize(
    "scale",
    [
        lambda own: own.weight / own.weight.norm(),
        lambda own: own.weight * own.weight.flip(0),
        lambda own: own.weight * torch.linspace(1, 2, WIDTH),
        lambda own: own.weight.roll(1),
    ],
    ids=["a norm of all", "another channel's", "numbers in the code", "another's alone"],
)
def test_constants_stay_where_an_element_is_not_computed_from_one_of_each(scale):
    torch.manual_seed(0)
    small = compacted(network(Computed(scale), nn.ReLU()))
    assert [small[0].out_channels, small[2].out_channels] == [WIDTH, WIDTH - len(DEAD[1])]
    assert small[1].weight.shape == (WIDTH,)


def test_a_size_in_the_code_does_not_keep_the_rest_from_being_cut():
    torch.manual_seed(0)
    written = ByHand(lambda gamma: gamma.view(1, WIDTH, 1, 1))
    small = compacted(network(written, nn.ReLU()))
    assert [small[0].out_channels, small[2].out_channels] == [WIDTH, WIDTH - len(DEAD[1])]


def test_a_factor_of_features_in_the_last_dimension_is_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, WIDTH), Scale(WIDTH), nn.Linear(WIDTH, 2)).eval()
    with torch.no_grad():
        model[0].weight[DEAD[0]] = 0
        model[0].bias[DEAD[0]] = 0
    assert compacted(model, (4, 3))[1].gamma.shape == (WIDTH - len(DEAD[0]),)


@pytest.mark.filterwarnings("ignore:.*keeps its size:fxlean.CompactionWarning")
@pytest.mark.parametrize("groups", [1, 4, WIDTH])
@pytest.mark.parametrize("shared", [False, True])
def test_group_norms_lose_the_groups_that_nothing_reads(groups, shared):
    torch.manual_seed(0)
    norms = [nn.GroupNorm(groups, WIDTH) for _ in range(1 if shared else 2)]
    model = network(*norms)
    unread = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14, 15])
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
            norm.bias.normal_()
        model[2].weight[:, unread] = 0
        model[4].weight[:, unread[:8] if shared else unread] = 0
    read = torch.ones(WIDTH, dtype=torch.bool)
    read[unread[:8] if shared else unread] = False
    left = read.reshape(groups, -1).any(1).sum().item()
    small = compacted(model)
    assert (small[1].num_groups, small[1].num_channels) == (left, left * WIDTH // groups)
    assert small[0].out_channels == left * WIDTH // groups
    assert model[1].num_channels == WIDTH


@pytest.mark.parametrize("form", FORMS)
def test_pruned_models_agree(form):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1),
        FORMS[form](),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        FORMS[form](),
        nn.Conv2d(WIDTH, 2, 1),
    ).eval()
    fxlean.prune(model, 0.05, torch.randn(1, 3, SIDE, SIDE), method="path")
    small = compacted(model)
    assert small[2].weight.numel() < model[2].weight.numel()
