"""Trains, calibrates, prunes, repairs, fine-tunes and compacts a network on several processes.

    torchrun --nproc-per-node=2 examples/finetune_ddp.py

Every process has a share of the digits. Which channels go, and what repair makes of the others, is
decided by sums over the images of all; `DistributedDataParallel` averages the gradients. On
machines with GPUs, leave out `backend` and move model and images to the process's own.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.distributed as dist
from quickstart import DigitNet, accuracy, load_data, size, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxlean


def main() -> None:
    """The whole way; the first process prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="of training, and after each step")
    parser.add_argument("--ratio", type=float, default=0.15, help="multiply-accumulates to keep")
    parser.add_argument("--steps", type=int, default=3, help="pruning steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(backend="gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    training, test = load_data()
    images, labels = (part[rank::count] for part in training)
    batches = list(images[:256].split(64))
    torch.manual_seed(0)
    model = DigitNet()
    whole = DistributedDataParallel(model)
    torch.manual_seed(rank)
    train(whole, (images, labels), options.epochs, peak_rate=0.01)

    def show(text: str, network: nn.Module) -> None:
        if rank == 0:
            print(f"{text}: {accuracy(network, test):.1%} right, {size(network):,} parameters")

    show("trained", model)
    reference, x = copy.deepcopy(model), images[:1]
    channels: dict[str, Any] = {"granularity": "channel", "of": "macs"}
    for ratio in fxlean.schedule(options.ratio, options.steps):
        fxlean.prune(model, ratio, x, method="relevance", calibration=batches, **channels)
        fxlean.repair(model, batches, reference, progress=False)
        show(f"repaired at {ratio:.0%} of the MACs", model)
        # Still wrapped: masks rename parameters, and gradients of the same objects are averaged.
        train(whole, (images, labels), options.epochs, peak_rate=0.003)
    show("fine-tuned", model)
    small = fxlean.compact(model.eval(), x)
    show("compacted", small)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
