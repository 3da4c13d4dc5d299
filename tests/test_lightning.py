"""The callback for Lightning: steps, checkpoints, and what it shares with ModelPruning."""

import inspect

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import fxlean
from fxlean.lightning import PruningCallback
from fxlean.masking import masked
from tests.support.blocks import conv, conv_bn_relu

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.*LeafSpec.*:FutureWarning",
    "ignore:The dirpath has changed",
    "ignore:You defined a `validation_step` but have no",
)


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [conv_bn_relu(1, 8), conv(8, 6, bias=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3))
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)


def fit(callback, folder, epochs, module=None, checkpoint=None, validate=True, **options):
    module = module or Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback, ModelCheckpoint(folder, save_top_k=-1)],
        log_every_n_steps=1,
    )
    validation = loader() if validate else None
    trainer.fit(module, loader(), validation, ckpt_path=checkpoint, **options)
    return module, trainer


@pytest.mark.parametrize("at_training_end", [True, False])
def test_steps_follow_the_schedule(at_training_end, tmp_path):
    callback = PruningCallback(
        0.2, 3, prune_on_train_epoch_end=at_training_end, method="l1", redundancy=False
    )
    module, _ = fit(callback, tmp_path, 5)
    budgets = [int(ratio * (8 + 48)) for ratio in fxlean.schedule(0.2, 3)]
    assert [result.selected for result in callback.results] == budgets
    for name, mask in module.named_buffers():
        if name.endswith("_mask"):
            weight = module.get_parameter(f"{name.removesuffix('_mask')}_orig")
            assert mask.shape == weight.shape
    assert not module.model[1].weight[module.model[1].weight_mask == 0].any()


def test_a_run_that_was_broken_off_goes_on_to_the_same_network(tmp_path):
    whole = PruningCallback(0.2, 3, method="l1")
    module, _ = fit(whole, tmp_path / "whole", 4)
    fit(PruningCallback(0.2, 3, method="l1"), tmp_path / "first", 2)
    (checkpoint,) = (tmp_path / "first").glob("epoch=1*.ckpt")
    rest = PruningCallback(0.2, 3, method="l1")
    resumed, _ = fit(rest, tmp_path / "rest", 4, checkpoint=checkpoint)
    assert [step.kept for step in rest.results] == [step.kept for step in whole.results[2:]]
    for (name, left), right in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_second_network_is_pruned_as_the_first(tmp_path):
    callback = PruningCallback(0.25, 2, method="l1")
    for folder in ("first", "second"):
        fit(callback, tmp_path / folder, 2)
        assert len(callback.results) == 2


def test_batches_of_the_loader_calibrate_a_part_of_the_module(tmp_path):
    callback = PruningCallback(
        0.5, 1, module="model", calibration_batches=2, method="relevance", verbose=2
    )
    fit(callback, tmp_path, 1)
    (result,) = callback.results
    assert result.calibration == "batches"
    assert [layer.name for layer in result.layers] == ["0.0", "1"]


def test_permanent_masks_are_taken_off_at_the_end_and_epochs_can_be_chosen(tmp_path):
    callback = PruningCallback(
        0.3, 2, apply_pruning=lambda epoch: epoch == 1, make_pruning_permanent=True, method="l1"
    )
    module, _ = fit(callback, tmp_path, 3)
    assert len(callback.results) == 1
    assert not list(masked(module))
    assert not any("orig" in name for name in module.state_dict())
    assert (module.model[1].weight == 0).flatten(2).all(2).any()


def test_shared_arguments_have_the_names_and_defaults_of_lightning():
    theirs = inspect.signature(ModelPruning).parameters
    ours = inspect.signature(PruningCallback).parameters
    shared = {"apply_pruning", "prune_on_train_epoch_end", "make_pruning_permanent", "verbose"}
    assert shared <= set(theirs) & set(ours)
    for name in shared - {"make_pruning_permanent"}:
        assert ours[name].default == theirs[name].default


def test_bad_arguments_are_told_at_once():
    with pytest.raises(fxlean.ArgumentError, match="metod is no option"):
        PruningCallback(0.2, 3, metod="l1")
    with pytest.raises(fxlean.ArgumentError, match="ratio is 2"):
        PruningCallback(2, 3)
    with pytest.raises(fxlean.ArgumentError, match="steps is 0"):
        PruningCallback(0.5, 0)
    with pytest.raises(fxlean.ArgumentError, match="verbose is 3"):
        PruningCallback(0.5, 1, verbose=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lien"}, "method is 'lien'. Pass one of lean"),
        ({"norm": "l3"}, "norm is 'l3'"),
        ({"granularity": "layer"}, "granularity is 'layer'"),
        ({"at_least": 2}, "at_least is 2"),
        ({"redundancy": "no"}, "redundancy is 'no'"),
        ({"calibration_batches": -1}, "calibration_batches is -1. Pass a whole number"),
        ({"calibration_batches": 2}, "is 2, and method is 'lean', which looks at no data"),
        ({"apply_pruning": "yes"}, "apply_pruning is 'yes'"),
        ({"make_pruning_permanent": 1}, "make_pruning_permanent is 1"),
        ({"prune_on_train_epoch_end": None}, "prune_on_train_epoch_end is None"),
    ],
)
def test_options_of_prune_are_checked_at_once(options, message):
    with pytest.raises(fxlean.ArgumentError, match=message):
        PruningCallback(0.2, 3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "modle"}, r"module is 'modle', .*Classifier.* Did you mean model\?"),
        ({"module": "forward"}, "module is 'forward', .*one: model, or"),
        ({"ignore": "head"}, "'head'"),
        ({"at_least": {"head": 0.5}}, "'head'"),
    ],
)
def test_names_that_the_module_lacks_are_told_before_training(options, message, tmp_path):
    callback = PruningCallback(0.2, 3, method="l1", **options)
    with pytest.raises(fxlean.ArgumentError, match=message):
        fit(callback, tmp_path, 1)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_whose_masks_do_not_come_back_are_refused(strategy):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    module = Classifier()
    with pytest.raises(fxlean.ArgumentError, match=r"do not come back.*Pass strategy='ddp'"):
        PruningCallback(0.5, 1, method="l1").setup(trainer, module, "fit")
    assert not list(masked(module))
    PruningCallback(0.5, 1, make_pruning_permanent=True).setup(trainer, module, "fit")
    assert list(masked(module))


def test_any_method_with_lengths_from_data_sees_batches(tmp_path):
    callback = PruningCallback(0.5, 1, method="path", norm="share", calibration_batches=2)
    fit(callback, tmp_path, 1)
    assert [result.calibration for result in callback.results] == ["batches"]


def test_a_checkpoint_gives_its_masks_to_a_newly_built_network(tmp_path):
    callback = PruningCallback(0.5, 1, module="model", method="l1")
    module, trainer = fit(callback, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for other in (Classifier(), Classifier().model):
        fxlean.load(other, saved)
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(other.eval()(x), module.eval()(x))
        assert len(list(masked(other))) == len(list(masked(module)))


@pytest.mark.parametrize(
    ("epochs", "options", "message"),
    [
        (1, {}, "after 1 of 2 pruning steps, with 0.5 .* train for more epochs"),
        (2, {"prune_on_train_epoch_end": False}, "after 0 of 2 .* give Trainer.fit a validation"),
    ],
)
def test_a_run_that_ends_before_its_steps_are_done_warns(epochs, options, message, tmp_path):
    callback = PruningCallback(0.25, 2, method="l1", **options)
    with pytest.warns(fxlean.PruneWarning, match=message):
        fit(callback, tmp_path, epochs, validate=False)


def test_masks_outside_of_the_pruned_part_are_left_alone(tmp_path):
    module = Classifier()
    module.head = module.model[-1]
    module.model[-1] = nn.Identity()
    module.forward = lambda x: module.head(module.model(x))
    prune.l1_unstructured(module.head, "weight", 0.5)
    callback = PruningCallback(0.5, 1, module="model", make_pruning_permanent=True, method="l1")
    fit(callback, tmp_path, 1, module)
    assert [path for path, _, _ in masked(module)] == ["head."]
