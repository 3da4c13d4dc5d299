"""The examples, at a size that takes seconds."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import circle_square
import generate_cs_data
import prune_msd
import prune_segmentation
import train_msd
import training
from circle_square import CLASSES, SCALES, Scale, draw_image

from adapters.msd import MSD

ROOT = Path(__file__).resolve().parents[1]
TINY = Scale(
    size=32,
    objects=4,
    side=8,
    noise=0.5,
    images=(6, 2, 3),
    depth=4,
    epochs=3,
    rate=1e-2,
    batch=2,
    ratio=0.3,
    steps=2,
    tuning=1,
)
pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SCALES, "small", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def interrupt(monkeypatch, module, name: str, after: int) -> None:
    """Makes a function raise KeyboardInterrupt at one call, and work again afterwards."""
    function, calls = getattr(module, name), iter(range(after + 1))

    def interrupted(*args, **kwargs):
        if next(calls, None) == after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_image_holds_whole_objects_of_the_four_shapes(scale):
    scale = SCALES[scale]
    clean, labels = draw_image(np.random.default_rng(0), scale)
    assert clean.shape == labels.shape == (scale.size, scale.size)
    each = scale.objects // 4
    counts = np.bincount(labels.ravel(), minlength=CLASSES)
    assert counts[1] == counts[2] == each * scale.side**2
    assert counts[3] == counts[4]
    assert counts[3] == pytest.approx(each * np.pi / 4 * scale.side**2, rel=0.05)
    bright = [clean[(labels == label) & (clean > 0)] for label in range(CLASSES)]
    assert len(bright[0]) == 0
    assert len(bright[1]) == counts[1]
    assert len(bright[2]) == counts[2] * 3 / 4
    assert len(bright[3]) == counts[3]
    assert 0.65 * counts[4] < len(bright[4]) < 0.85 * counts[4]
    for values in bright[1:]:
        assert len(np.unique(values)) <= each
        assert values.min() >= np.float32(0.2)
        assert values.max() <= 1


def test_data_is_written_as_tiff_and_the_same_for_the_same_seed(tmp_path, capsys):
    generate_cs_data.main(["--folder", str(tmp_path / "a")])
    generate_cs_data.main(["--folder", str(tmp_path / "b")])
    first = files(tmp_path / "a")
    assert first == files(tmp_path / "b")
    assert len(first) == 3 * sum(TINY.images) + 1
    clean, noisy, label = (
        tifffile.imread(tmp_path / "a" / "data" / "train" / f"{kind}_0005.tif")
        for kind in ("clean", "noisy", "label")
    )
    assert (clean.dtype, noisy.dtype, label.dtype) == (np.float32, np.float32, np.uint8)
    assert np.std(noisy - clean) == pytest.approx(TINY.noise, rel=0.1)
    assert "6 + 2 + 3 images" in capsys.readouterr().out
    generate_cs_data.main(["--folder", str(tmp_path / "a")])
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        generate_cs_data.main(["--folder", str(tmp_path / "a"), "--seed", "1"])
    assert files(tmp_path / "a") == first


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    interrupt(monkeypatch, tifffile, "imwrite", after=10)
    with pytest.raises(KeyboardInterrupt):
        generate_cs_data.main(["--folder", str(tmp_path)])
    assert not files(tmp_path)
    generate_cs_data.main(["--folder", str(tmp_path)])
    assert len(files(tmp_path)) == 3 * sum(TINY.images) + 1


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for name in ("whole", "stopped"):
        generate_cs_data.main(["--folder", str(tmp_path / name)])
    train_msd.main(["--folder", str(tmp_path / "whole")])
    interrupt(monkeypatch, training, "train_epoch", after=1)
    with pytest.raises(KeyboardInterrupt):
        train_msd.main(["--folder", str(tmp_path / "stopped")])
    stopped = torch.load(tmp_path / "stopped" / "msd.pt")
    assert stopped["epoch"] == 1
    train_msd.main(["--folder", str(tmp_path / "stopped")])
    whole, resumed = (torch.load(tmp_path / n / "msd.pt") for n in ("whole", "stopped"))
    assert whole["epoch"] == resumed["epoch"] == TINY.epochs
    assert whole["accuracy"] == resumed["accuracy"]
    for key, value in whole["best"].items():
        assert torch.equal(value, resumed["best"][key])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split(":")[-1] == second.split(":")[-1]


def test_pruning_runs_from_nothing_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    methods = ["--methods", "lean", "random"]
    prune_msd.main(["--folder", str(tmp_path / "whole"), *methods])
    table = capsys.readouterr().out
    assert "lean" in table
    assert "random" in table
    interrupt(monkeypatch, training, "_prune_step", after=3)
    with pytest.raises(KeyboardInterrupt):
        prune_msd.main(["--folder", str(tmp_path / "stopped"), *methods])
    prune_msd.main(["--folder", str(tmp_path / "stopped"), *methods])
    whole, resumed = (tmp_path / name / "pruned_msd" for name in ("whole", "stopped"))
    assert (whole / "results.csv").read_text() == (resumed / "results.csv").read_text()
    assert {f.name for f in whole.iterdir()} == {f.name for f in resumed.iterdir()}
    assert (whole / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    rows = training.read_rows(whole / "results.csv")
    assert [(row.method, row.step) for row in rows] == [
        (method, step) for method in ("lean", "random") for step in (0, 1, 2)
    ]
    last = rows[2]
    assert last.ratio <= TINY.ratio
    model = MSD(1, CLASSES, TINY.depth)
    training.load_weights(model, torch.load(whole / training.file_name(last))["weights"])
    data = circle_square.load_data(tmp_path / "whole" / "data", "test", TINY)
    assert training.pixel_accuracy(model, data) == pytest.approx(last.accuracy)


def test_pruning_again_shows_the_results_and_other_settings_are_refused(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--methods", "l1"]
    prune_msd.main(arguments)
    table, before = capsys.readouterr().out, files(tmp_path / "pruned_msd")
    prune_msd.main(arguments)
    assert capsys.readouterr().out == table
    assert files(tmp_path / "pruned_msd").keys() == before.keys()
    with pytest.raises(SystemExit, match="other settings"):
        prune_msd.main([*arguments, "--seed", "1"])


@pytest.mark.parametrize("network", ["fcn_resnet50", "unet4"])
def test_segmentation_networks_are_trained_and_pruned(tmp_path, network, capsys):
    prune_segmentation.main(["--folder", str(tmp_path), "--networks", network, "--methods", "lean"])
    rows = training.read_rows(tmp_path / f"pruned_{network}" / "results.csv")
    assert [row.step for row in rows] == [0, 1]
    assert rows[-1].ratio < 0.35
    assert network in capsys.readouterr().out


def test_paper_scale_refers_to_the_script_that_trains(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "paper", TINY)
    arguments = ["--folder", str(tmp_path), "--scale", "paper"]
    with pytest.raises(SystemExit, match="generate_cs_data"):
        prune_msd.main(arguments)
    generate_cs_data.main(arguments)
    with pytest.raises(SystemExit, match=r"train_msd\.py --scale paper"):
        prune_msd.main(arguments)


def test_bad_files_are_named(tmp_path):
    arguments = ["--folder", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"no images in .*train.*generate_cs_data\.py"):
        train_msd.main(arguments)
    generate_cs_data.main(arguments)
    image = tmp_path / "data" / "validation" / "noisy_0001.tif"
    good = image.read_bytes()
    tifffile.imwrite(image, np.zeros((16, 16), dtype=np.float32))
    with pytest.raises(SystemExit, match=r"noisy_0001\.tif has shape \(16, 16\).*\(32, 32\)"):
        train_msd.main(arguments)
    image.write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"noisy_0001\.tif is no TIFF"):
        train_msd.main(arguments)
    image.write_bytes(good)
    label = image.with_name("label_0001.tif")
    label.unlink()
    with pytest.raises(SystemExit, match=r"label_0001\.tif is missing"):
        train_msd.main(arguments)


def test_other_checkpoints_are_refused_and_kept(tmp_path, monkeypatch):
    arguments = ["--folder", str(tmp_path)]
    generate_cs_data.main(arguments)
    train_msd.main(arguments)
    before = files(tmp_path)
    monkeypatch.setitem(SCALES, "small", replace(TINY, depth=6))
    for script in (train_msd, prune_msd):
        with pytest.raises(SystemExit, match=r"MS-D of depth 4, .* needs MS-D of depth 6"):
            script.main(arguments)
    assert files(tmp_path) == before
    (tmp_path / "msd.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="is no checkpoint"):
        train_msd.main(arguments)


def started(*command: str) -> str:
    """What a script prints that runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_several_processes_prune_repair_and_tune_together():
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script = str(ROOT / "examples" / "finetune_ddp.py")
    output = started(*launch, script, "--epochs", "1", "--steps", "1")
    lines = [line for line in output.splitlines() if "right" in line]
    assert [line.split(":")[0] for line in lines][-2:] == ["fine-tuned", "compacted"]
    tuned, compacted = (line.split()[1] for line in lines[-2:])
    assert tuned == compacted


def test_a_sweep_runs_what_is_missing_on_two_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # other tests are running beside it
    script = (str(ROOT / "examples" / "sweep.py"), "--folder", str(tmp_path), "--workers", "2")
    small = ("--ratios", "0.3", "--seeds", "0", "--epochs", "1", "--steps", "1", "--methods")
    assert "0 of 1 combinations are done" in started(*script, *small, "lean")
    (first,) = (tmp_path / "rows").iterdir()
    before = first.stat().st_mtime_ns
    output = started(*script, *small, "lean", "relevance", "l1")
    assert "1 of 3 combinations are done" in output
    assert first.stat().st_mtime_ns == before
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = output[output.rindex("method  ") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["lean", "relevance", "l1"]
    assert not any("±" in line for line in table)  # of one seed
    assert started(*script, *small, "lean", "relevance", "l1").endswith("\n".join(table) + "\n")
