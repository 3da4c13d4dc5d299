"""`PruneResult` as a table and as plain data."""

import json
import re

import pytest

import fxlean
from fxlean.pruning.result import LayerCount, PruneResult
from tests.support.zoo import make


def result(**changes):
    fields = {
        "method": "lean",
        "kept": 1200,
        "total": 40000,
        "selected": 1300,
        "chains": 77,
        "layers": (LayerCount("stem", 200, 4000), LayerCount("body.0.conv", 1000, 36000)),
        "share": 0.125,
        "opaque_ops": {"aten.bmm.default": 2},
        "skipped": {"head": "ignored"},
        "timings": {"trace": 0.5, "norms": 1.25},
    }
    return PruneResult(**{**fields, **changes})


def test_the_table():
    assert str(result()).splitlines() == [
        "layer              kept       total    ratio",
        "stem                200       4,000    5.00%",
        "body.0.conv       1,000      36,000    2.78%",
        "-" * 44,
        "all               1,200      40,000    3.00%",
        "These kernels hold 12.5% of all parameters.",
        "",
        "lean selected 1,300 kernels in 77 chains; 100 redundant ones removed "
        "(trace 0.50 s, norms 1.25 s)",
        "opaque: aten.bmm.default (2 times), treated as reading and writing everything",
        "skipped: head: ignored",
    ]


def test_once_is_not_1_times():
    assert "bmm.default (once), treated" in str(result(opaque_ops={"aten.bmm.default": 1}))


def test_methods_without_chains_do_not_mention_them():
    assert "chains" not in str(result(chains=0))


@pytest.mark.parametrize("method", ["lean", "spectral"])
def test_the_numbers_add_up(method):
    model, inputs = make("u_net")
    found = fxlean.prune(model, 0.4, inputs, method=method)
    rows = re.findall(r"^(\S+) +([\d,]+) +([\d,]+) +([\d.]+)%$", str(found), re.MULTILINE)
    *layers, (name, kept, total, percent) = rows
    assert name == "all"
    assert int(kept) == found.kept == sum(int(row[1]) for row in layers)
    assert int(total) == found.total == sum(int(row[2]) for row in layers)
    assert float(percent) == pytest.approx(100 * found.ratio, abs=0.005)
    assert [row[0] for row in layers] == [layer.name for layer in found.layers]
    assert len({len(line) for line in str(found).splitlines()[: len(rows) + 2]}) == 1


def test_plain_data_says_all_that_the_result_does():
    model, inputs = make("residual")
    found = fxlean.prune(model, 0.5, inputs, ignore="0.0")
    data = json.loads(json.dumps(found.to_dict()))
    assert data.pop("ratio") == found.ratio == found.kept / found.total
    data["layers"] = tuple(LayerCount(**layer) for layer in data["layers"])
    assert PruneResult(**data) == found


def test_results_are_frozen():
    with pytest.raises(AttributeError):
        result().kept = 3
