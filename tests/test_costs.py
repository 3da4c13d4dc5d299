"""`Report` as a table and as plain data."""

import json
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxlean
from fxlean.nn import Selected
from tests.support.zoo import make


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def selected(inputs, outputs, reads):
    layer = nn.Conv2d(inputs, outputs, 1)
    return Selected(layer, torch.tensor(reads), None, outputs)


def large():
    """With a module of the user's that is called `layer`, as the one inside of `Selected` is."""
    return named(
        stem=nn.Conv2d(1, 4, 3),
        block=named(layer=nn.Conv2d(4, 4, 1)),
        extra=nn.Conv2d(4, 4, 1),
        head=nn.Conv2d(4, 1, 1),
    )


def small():
    """What `large` might become: two layers are wrapped, one is gone, and one is new."""
    return named(
        stem=nn.Conv2d(1, 3, 3),
        block=named(layer=selected(2, 3, [0, 2])),
        head=selected(2, 1, [0, 1]),
        more=nn.Conv2d(1, 1, 1),
    )


class Functional(nn.Module):
    """A convolution without a layer module: what it is part of gets rewritten."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight).relu()


IMAGE = torch.zeros(1, 1, 4, 4)
TABLE = """
                                  kernels                    parameters                          MACs
layer               before            now         before            now         before            now
stem                     4              3             36             27            144            108
block.layer             16              6             16              6             64             24
extra                   16              -             16              -             64              -
head                     4              2              4              2             16              8
more                     -              1              -              1              -              4
-----------------------------------------------------------------------------------------------------
all                     40             12             85             44            288            144

left: 51.8% of the parameters, 50.0% of the MACs
"""  # noqa: E501


def test_the_table_of_before_and_now():
    assert str(fxlean.report(small(), IMAGE, before=large())) == TABLE.strip("\n")


def last_line(found):
    return str(found).splitlines()[-1]


def cells(row):
    return [f"{number:,}" for number in (row.kernels, row.parameters, row.macs)]


def columns(found):
    """The printed numbers of every row: the first of each pair of columns, and the second."""
    rows = [line.split()[1:] for line in str(found).splitlines()[2:]]
    rows = [row for row in rows if len(row) == 6]
    return [row[::2] for row in rows], [row[1::2] for row in rows]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["functional", "nested", "u_net"])
def test_both_columns_are_those_of_a_report_of_one_model(name):
    model, inputs = make(name)
    dense = fxlean.report(model, inputs)
    fxlean.prune(model, 0.3, inputs, method="path")
    compacted = fxlean.compact(model, inputs)
    alone = fxlean.report(compacted, inputs)
    both = fxlean.report(compacted, inputs, before=model)
    old, new = columns(both)
    assert old == [cells(row) for row in (*dense.layers, dense)]
    assert new == [cells(row) for row in (*alone.layers, alone)]
    assert both.before == fxlean.report(model, inputs)
    assert alone.macs < dense.macs
    left = [alone.parameters / dense.parameters, alone.macs / dense.macs]
    printed = re.fullmatch("left: (.*)% of the parameters, (.*)% of the MACs", last_line(both))
    assert [float(number) for number in printed.groups()] == pytest.approx(
        [100 * fraction for fraction in left], abs=0.05
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_of_a_rewritten_model_meet_their_rows():
    torch.manual_seed(0)
    inner = nn.Sequential(Functional(3, 8), Functional(8, 8))
    model, inputs = nn.Sequential(inner, nn.Conv2d(8, 1, 1)), torch.randn(2, 3, 8, 8)
    fxlean.prune(model, 0.2, inputs, method="path")
    compacted = fxlean.compact(model, inputs)
    names = ["0.0", "0.1", "1"]
    assert [row.name for row in fxlean.report(compacted, inputs).layers] == ["0_0", "0_1", "1"]
    assert [row.name for row in fxlean.report(compacted, inputs, before=model).layers] == names


def test_every_layer_has_one_row_whatever_took_its_place():
    split = named(a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 4, 3))
    found = fxlean.report(named(stem=split), IMAGE, before=named(stem=nn.Conv2d(1, 4, 3)))
    assert [row.name for row in found.layers] == ["stem", "stem.b"]


def test_compiled_models_are_compared_by_what_is_inside():
    found = fxlean.report(torch.compile(small()), IMAGE, before=torch.compile(large()))
    assert str(found) == TABLE.strip("\n")


def test_models_without_layers_can_be_compared():
    found = fxlean.report(nn.ReLU(), IMAGE, before=nn.ReLU())
    assert last_line(found) == "left: 0.0% of the parameters, 0.0% of the MACs"


def test_plain_data_has_both_reports():
    old, new = fxlean.report(large(), IMAGE), fxlean.report(small(), IMAGE, before=large())
    data = json.loads(json.dumps(new.to_dict()))
    assert data["before"] == json.loads(json.dumps(old.to_dict()))
    assert data["before"]["before"] is None
    assert data["macs"] == new.macs < data["before"]["macs"] == old.macs
    assert [row["name"] for row in data["layers"]] == ["stem", "block.layer", "head", "more"]


@pytest.mark.parametrize(
    ("model", "before", "name"), [(3, None, "model"), (nn.ReLU(), 3, "before")]
)
def test_what_is_no_module_is_refused(model, before, name):
    with pytest.raises(fxlean.ArgumentError, match=rf"^{name} is a int\. Pass .*torch\.nn\.Module"):
        fxlean.report(model, IMAGE, before=before)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 3, 11)),
        (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 8)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 5, 6)),
        (nn.Linear(6, 5), (4, 6)),
        (nn.Linear(6, 5), (2, 7, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), (2, 3, 6, 6)),
    ],
)
def test_multiply_accumulates_are_half_of_the_operations_that_torch_counts(model, shape):
    x = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * shape[0] * fxlean.report(model, x).macs == counter.get_total_flops()


class TableFirst(nn.Module):
    """Takes a table of another length before the images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, table, x):
        return self.layers(x) + table.mean()


@pytest.mark.parametrize(
    ("model", "shapes", "samples"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), [(3, 12, 12)], 1),
        (nn.Conv3d(4, 2, 3), [(4, 6, 6, 6)], 1),
        (nn.Conv1d(6, 2, 3), [(6, 9)], 1),
        (TableFirst(), [(10, 2), (2, 3, 12, 12)], 2),
        (TableFirst(), [(10, 2), (3, 12, 12)], 1),
    ],
)
def test_costs_are_for_one_sample_whatever_comes_first(model, shapes, samples):
    given = tuple(torch.zeros(shape) for shape in shapes)
    with FlopCounterMode(display=False) as counter:
        model(*given)
    assert 2 * samples * fxlean.report(model, given).macs == counter.get_total_flops()


def test_a_vector_without_a_batch_is_one_sample():
    assert fxlean.report(nn.Linear(10, 5), torch.zeros(10)).macs == 50
