"""Operations of the U-Net, against a count over its layers while it runs; the U-ViT's stand with the benchmarks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.diffusion.uvit import build_model
from shared.experiment.config import parse_experiment
from shared.training.flops import muon_flops, train_flops, training_flops
from shared.training.optimizer import MuonWithAdamW, make_optimizer

CROP = '[train]\nobjective = "msm"\n[mask]\nkind = "crop"\nratio = 0.75\n'


@pytest.mark.parametrize(("mask", "side"), [("", 16), (CROP, 8)])
def test_operations_of_the_unet_are_those_of_its_layers(mask, side):
    experiment = parse_experiment(f'[model]\nbackbone = "unet"\nimage_size = 16\n{mask}')
    model, counted = build_model(experiment), []

    def note(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            counted.append(2 * output.numel() * layer.weight[0].numel())
        elif isinstance(layer, nn.Linear):
            counted.append(2 * inputs[0].numel() * layer.out_features)

    for layer in model.modules():
        layer.register_forward_hook(note)
    visible = experiment.num_visible
    ids = torch.arange(16).view(4, 4)[: side // 4, : side // 4].reshape(1, -1)
    with torch.no_grad():
        model(torch.zeros(1, visible, 48), torch.zeros(1, dtype=torch.long), ids)
    # What is left is attention at a quarter of the side, which is next to nothing here.
    assert sum(counted) <= train_flops(experiment) / 3 <= 1.02 * sum(counted)


def test_operations_of_crops_are_the_mean_over_their_squares():
    def of(kind, ratio):
        objective = "dsm" if kind == "none" else "msm"
        return train_flops(
            parse_experiment(f'[train]\nobjective = "{objective}"\n[mask]\nkind = "{kind}"\nratio = {ratio}\n')
        )

    expected = 0.5 * of("none", 0.0) + 0.3 * of("crop", 0.75) + 0.2 * of("crop", 0.9375)
    assert of("crops", 0.4125) == pytest.approx(expected)


def test_operations_of_muon_are_those_that_torch_counts_in_a_step():
    experiment = parse_experiment('[train]\nbatch = 8\n[model]\nimage_size = 16\n[optim]\noptimizer = "muon"\n')
    model = build_model(experiment)
    optimizer = make_optimizer(model, experiment.optim)
    assert isinstance(optimizer, MuonWithAdamW)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon_flops(experiment) == counter.get_total_flops() > 0
    assert training_flops(experiment) == train_flops(experiment) + counter.get_total_flops() / 8


def test_adamw_has_no_matrix_products():
    experiment = parse_experiment("[model]\nimage_size = 16\n")
    assert muon_flops(experiment) == 0
    assert training_flops(experiment) == train_flops(experiment)
