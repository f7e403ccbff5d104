import dataclasses

import pytest
import torch
from llamas import CPU, MEDIUM, TINY, Case, measured_peak, planned, saved_bytes
from transformers import DynamicCache

from diablo_theory.bench.measuring import peak_bytes
from diablo_theory.finetune.planning.memory import memory
from diablo_theory.finetune.planning.shapes import MATRICES, model_shapes
from diablo_theory.finetune.planning.trainable import trained
from diablo_theory.finetune.planning.work import Scored, Work

#: How far a planned peak may be from the measured one.
NEAR = 0.15


def medium(tmp_path, dtype="float32", **fields):
    # With logits for some positions alone a bfloat16 CPU copies the output matrix for every sequence; a GPU does not.
    kept = 64 if dtype == "bfloat16" else 16
    return Case.make(tmp_path, MEDIUM, batch=4, length=64, kept=kept, dtype=dtype, num_blocks=8, **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", ["diablo", "diablo-additive", "lora", "full", "lora-fa", "miss"])
def test_what_autograd_keeps(method, padded, dtype, tmp_path):
    case = medium(tmp_path, dtype, method=method, padded=padded)
    found = planned(case)
    final_norm, log_softmax = 4 * 4 * 64 * 256, found.logits_bytes // 3
    assert found.activations_bytes + final_norm + log_softmax == pytest.approx(saved_bytes(case), rel=0.005)


@pytest.mark.parametrize("targets", [("q_proj",), ("o_proj",), ("gate_proj",), ("down_proj",), MATRICES], ids=" ".join)
@pytest.mark.parametrize("method", ["diablo", "lora", "full"])
def test_what_autograd_keeps_for_other_targets(method, targets, tmp_path):
    case = medium(tmp_path, method=method, target_modules=targets)
    found = planned(case)
    final_norm, log_softmax = 4 * 4 * 64 * 256, found.logits_bytes // 3
    assert found.activations_bytes + final_norm + log_softmax == pytest.approx(saved_bytes(case), rel=0.005)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["diablo", "diablo-additive", "lora", "full"])
def test_the_peak_of_a_step_is_near_the_measured_one(method, checkpointing, dtype, tmp_path):
    case = medium(tmp_path, dtype, method=method, gradient_checkpointing=checkpointing)
    found = planned(case)
    measured, optimizer = measured_peak(case)
    assert found.step_bytes == pytest.approx(measured, rel=NEAR)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert found.optimizer_bytes == sum(t.nbytes for t in moments)
    still = sum(t.nbytes for t in case.network.parameters())
    assert found.weights_bytes + found.adapter_bytes == still


def test_gradients_of_earlier_micro_batches_wait(tmp_path):
    case = medium(tmp_path, method="full")
    work = dataclasses.replace(case.work, batch_size=8, micro_batch=4)
    found = memory(case.shapes, trained(case.shapes, work), work, foreach=False)

    def two_micro_batches():
        case.step().backward()
        case.step().backward()
        case.network.zero_grad()

    measured = peak_bytes(two_micro_batches, CPU)
    assert found.step_bytes == pytest.approx(measured, rel=NEAR)
    assert planned(case).step_bytes < measured * (1 - NEAR)  # so that the difference is seen


@pytest.mark.parametrize("method", ["diablo", "lora", "full"])
def test_the_peak_on_a_tiny_model(method, tmp_path):
    case = Case.make(tmp_path, TINY, batch=4, length=32, kept=8, method=method, num_blocks=4)
    assert planned(case).step_bytes == pytest.approx(measured_peak(case)[0], rel=NEAR)


def test_long_answers_are_paid_in_logits(tmp_path):
    wide = MEDIUM | {"vocab_size": 20_000, "num_hidden_layers": 2}
    case = Case.make(tmp_path, wide, batch=2, length=32, kept=32, num_blocks=8)
    found = planned(case)
    assert found.logits_bytes == 3 * 4 * 2 * 32 * 20_000
    assert found.logits_bytes > found.activations_bytes
    assert found.step_bytes == pytest.approx(measured_peak(case)[0], rel=NEAR)


def test_dropout_keeps_a_masked_input_for_each_target(tmp_path):
    case = medium(tmp_path, method="diablo")
    dropped = dataclasses.replace(case.work, dropout=0.05)
    more = memory(case.shapes, trained(case.shapes, dropped), dropped, foreach=False)
    per_token = 5 * (4 * 256 + 688) - 4 * (2 * 256 + 688)  # a float and a byte a target, for the inputs kept once
    assert more.activations_bytes - planned(case).activations_bytes == 6 * 4 * 64 * per_token


def test_the_cache_of_keys_and_values(tmp_path):
    scored = (Scored(items=3, new_tokens=0, beams=2, batch_size=2), Scored(items=1, new_tokens=0))
    case = Case.make(tmp_path, TINY, num_blocks=4, scored=scored, eval_prompt_tokens=8)
    cache = DynamicCache(config=case.network.base_model.model.config)
    case.network(input_ids=torch.zeros(4, 8, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert planned(case).cache_bytes == held
    assert planned(case).decoding_bytes > held


def large(**fields):
    work = Work(model="LLaMA3-8B", examples=64, prompt_tokens=200, answer_tokens=56, **fields)
    shapes = model_shapes("LLaMA3-8B")
    return memory(shapes, trained(shapes, work), work)


def test_ddp_holds_everything_and_fsdp_divides():
    one = large(batch_size=4, method="diablo-additive")
    ddp = large(batch_size=32, devices=8, method="diablo-additive")
    fsdp = large(batch_size=32, devices=8, method="diablo-additive", sharding="fsdp")
    assert (ddp.weights_bytes, ddp.optimizer_bytes) == (one.weights_bytes, one.optimizer_bytes)
    assert ddp.gradients_bytes == 2 * one.gradients_bytes
    layer = 2 * model_shapes("LLaMA3-8B").layer_products
    assert fsdp.weights_bytes == one.weights_bytes // 8 + 2 * layer
    assert fsdp.optimizer_bytes == one.optimizer_bytes // 8
    assert fsdp.activations_bytes == one.activations_bytes


def test_accumulation_saves_activations_and_full_training_costs_moments():
    whole, split = large(batch_size=16), large(batch_size=16, micro_batch=4)
    assert whole.activations_bytes == 4 * split.activations_bytes
    full = large(batch_size=1, method="full", adapter_dtype="bfloat16")
    assert full.optimizer_bytes == 2 * full.gradients_bytes
    assert full.training_bytes - full.step_bytes == full.weights_bytes + full.optimizer_bytes
    autocast = large(batch_size=1, method="full")
    assert autocast.weights_bytes == full.weights_bytes + 2 * full.gradients_bytes


def test_updating_all_tensors_at_once_takes_a_copy():
    shapes = model_shapes("SmolLM2-135M")
    work = Work(
        model="SmolLM2-135M",
        examples=1,
        batch_size=1,
        prompt_tokens=1,
        answer_tokens=1,
        method="full",
        dtype="float32",
    )
    each, together = (memory(shapes, trained(shapes, work), work, foreach=way) for way in (False, True))
    assert together.step_bytes == 2 * together.gradients_bytes
    assert each.step_bytes < together.step_bytes


def test_an_untouched_model_trains_nothing():
    found = large(method="none", scored=(Scored(items=10, new_tokens=16),))
    assert (found.step_bytes, found.optimizer_bytes, found.gradients_bytes) == (0, 0, 0)
    assert found.peak_bytes == found.weights_bytes + found.decoding_bytes
