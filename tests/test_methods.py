import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from diablo_theory import methods

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.mark.parametrize("method", ["none", "full", *methods.FAMILIES])
def test_every_method_starts_as_the_untouched_model(model, method):
    ids = torch.arange(10)[None]
    before = model(input_ids=ids).logits
    prepared = methods.prepare(model, method, 6, TARGETS, seed=0)
    assert torch.equal(prepared.model(input_ids=ids).logits, before)
    assert prepared.trainable_params == sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)


def test_counts_labels_and_denominator(model):
    total = sum(p.numel() for p in model.parameters())
    full = methods.prepare(model, "full", 6, TARGETS, seed=0)
    # q 36x36, k and v 36x12, up and down 36x50, in two layers
    assert (full.label, full.trainable_params, full.total_params) == ("Full fine-tuning", 2 * 5760, total)


def test_lora_has_the_nearest_rank_to_diablos_budget(model):
    lora, layers = methods.FAMILIES["lora"], [nn.Linear(36, 36), nn.Linear(36, 50)]
    per_rank = 72 + 86
    assert methods.nearest_knob(lora, layers, 3 * per_rank) == 3
    assert methods.nearest_knob(lora, layers, 3 * per_rank + per_rank // 2 + 1) == 4
    assert methods.nearest_knob(lora, layers, 3 * per_rank + per_rank // 2 - 1) == 3
    assert methods.nearest_knob(lora, layers, 1) == 1
    prepared = methods.prepare(model, "lora", 6, TARGETS, seed=0)
    # per layer and rank: q 72, k and v 48 each, up and down 86 each = 340; DiaBlo N=6 has 216 + 144 + 2*(8*54+6*2...)
    assert prepared.label == f"LoRA r={prepared.trainable_params // 680}"


@pytest.mark.parametrize("method", methods.FAMILIES)
def test_counts_are_the_true_ones_and_the_nearest_to_the_budget(method, model):
    layers = list(methods.target_layers(model, TARGETS).values())
    budget = methods.prepare(copy.deepcopy(model), "diablo", 6, TARGETS, seed=0).trainable_params
    family = methods.FAMILIES[method]
    prepared = methods.prepare(model, method, 6, TARGETS, seed=0)
    knob = int(prepared.label.rpartition("=")[2])
    assert prepared.trainable_params == sum(family.count(knob, x.in_features, x.out_features) for x in layers)
    step = 2 if family.divides else 1
    for other in (knob - step, knob + step):
        if other >= 1 and not (family.divides and math.gcd(36, 12, 50) % other):
            count = sum(family.count(other, x.in_features, x.out_features) for x in layers)
            assert abs(prepared.trainable_params - budget) <= abs(count - budget)


def test_an_unknown_method_is_named(model):
    with pytest.raises(
        ValueError, match=r"method must be one of none, full, diablo.*got 'lorra'. Did you mean 'lora'"
    ):
        methods.prepare(model, "lorra", 6, TARGETS, seed=0)


def test_gradient_groups_cover_exactly_the_trainable_parameters(tiny_model):
    for method in ("full", "lora", "diablo"):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        prepared = methods.prepare(fresh, method, 6, TARGETS, seed=0)
        for name, parameter in prepared.model.named_parameters():
            if parameter.requires_grad:
                groups = [key for key, part in methods.GRADIENT_GROUPS[method].items() if part in f".{name}"]
                assert len(groups) == 1, name


def test_loras_random_start_depends_on_its_seed_alone(tiny_model):
    def start(seed):
        torch.rand(seed + 3)  # whatever was drawn before
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        return methods.trainable_state(methods.prepare(fresh, "lora", 6, TARGETS, seed).model)

    first, again, other = start(1), start(1), start(2)
    a = next(name for name in first if "lora_A" in name)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[a], other[a])


def test_trainable_state_round_trip_and_mismatch(model):
    prepared = methods.prepare(model, "diablo", 6, TARGETS, seed=0)
    state = methods.trainable_state(prepared.model)
    changed = {name: value + 1 for name, value in state.items()}
    methods.load_trainable_state(prepared.model, changed)
    assert all(torch.equal(v, changed[k]) for k, v in methods.trainable_state(prepared.model).items())
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"'{name}' is on one side only"):
        methods.load_trainable_state(prepared.model, {k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        methods.load_trainable_state(prepared.model, state | {name: torch.zeros(1)})
