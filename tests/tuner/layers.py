"""Layers and bounds that several tests of the tuner share."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_theory.tuner import DiaBloConfig, DiaBloLinear
from diablo_theory.tuner.targets import diablo_layers

#: Inputs, outputs, blocks: even, ragged both ways, more blocks than rows or columns, one block, single entries.
SHAPES = [(12, 18, 6), (13, 17, 4), (8, 3, 8), (3, 8, 5), (5, 7, 1), (7, 7, 7)]


def base(m1, m2, kind="linear", bias=True, dtype=torch.float64):
    """A frozen layer with its own random weight; Conv1D always has a bias."""
    layer = nn.Linear(m1, m2, bias=bias) if kind == "linear" else Conv1D(m2, m1)
    nn.init.normal_(layer.weight, std=m1**-0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


def adapted(m1, m2, num_blocks, *, kind="linear", bias=True, dtype=torch.float64, std=0.5, seed=0, **options):
    """A layer with random blocks, in the mode that the options ask for."""
    torch.manual_seed(seed)
    config = DiaBloConfig(num_blocks=num_blocks, **options)
    layer = DiaBloLinear(base(m1, m2, kind, bias, dtype), "default", num_blocks, config)
    if dtype in (torch.bfloat16, torch.float16):  # as peft does on a half-precision base
        layer.diablo_blocks.float()
        layer.diablo_tail.float()
    randomise(layer, std)
    return layer


def randomise(model, std=0.5):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".diablo_" in f".{name}":
                parameter.normal_(std=std)


def twin(layer, mode):
    """A copy with the same numbers in another mode."""
    other = copy.deepcopy(layer)
    other.diablo_mode = dict.fromkeys(other.diablo_mode, mode)
    return other


def pair(*shape, **options):
    merged = adapted(*shape, mode="merged", **options)
    return merged, twin(merged, "additive")


def dense(layer, name="default"):
    """W0 and D as inputs by outputs in float64."""
    weight, delta = layer.base_layer.weight.detach(), layer.get_delta_weight(name)
    if isinstance(layer.base_layer, nn.Linear):
        weight, delta = weight.T, delta.T
    return weight.double(), delta.double()


def rounding_bound(x, w0, delta, bias, dtype, adapter_dtype):
    """How far merged and additive outputs may lie apart, entry by entry.

    With u the unit roundoff of the layer's dtype, v that in which products are summed (float32 for half precision,
    otherwise u) and the usual gamma_n = n v: each sum of n terms is off by gamma_n times the sum of magnitudes; the
    merged weight is rounded once (u), each output once (u), and additive mode rounds three outputs (base, block
    product, sum).
    """
    u, v = torch.finfo(dtype).eps / 2, torch.finfo(adapter_dtype).eps / 2
    size = x.abs() @ (w0.abs() + delta.abs()) + (0 if bias is None else bias.abs())
    return (2 * (x.shape[-1] + 1) * v + 5 * u) * size


def random_blocks(layout, dtype=torch.float32, seed=0):
    """Blocks as the authors store them, with zeros outside the matrix, made without the code under test."""
    n, d1, d2 = layout.num_blocks, layout.block_rows, layout.block_cols
    dense = torch.zeros(n * d1, n * d2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    size = layout.in_features, layout.out_features
    dense[: size[0], : size[1]] = torch.randn(size, dtype=torch.float64, generator=generator)
    return torch.stack([dense[i * d1 : (i + 1) * d1, i * d2 : (i + 1) * d2] for i in range(n)]).to(dtype)


def delta(model, name, adapter_name="default"):
    """D of one layer, inputs by outputs."""
    layer = diablo_layers(model, adapter_name)[name]
    dense = layer.get_delta_weight(adapter_name)
    return dense.T if isinstance(layer.base_layer, nn.Linear) else dense
