"""What a plan says of a quantised base, by hand and, where torchao is installed (extra ``quant``), as measured."""

import dataclasses

import pytest
from llamas import MEDIUM, Case, measured_peak, planned, saved_bytes, work_on

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning import header, plan
from diablo_theory.finetune.planning.generation import decoding
from diablo_theory.finetune.planning.memory import memory
from diablo_theory.finetune.planning.quantised import stored_bytes
from diablo_theory.finetune.planning.shapes import model_shapes
from diablo_theory.finetune.planning.trainable import trained
from diablo_theory.finetune.planning.work import Scored
from diablo_theory.quantise import QuantiseConfig

INT4 = QuantiseConfig(method="torchao-int4", bits=4, group_size=16)
INT8 = QuantiseConfig(method="torchao-int8", bits=8)
RTN = QuantiseConfig(method="rtn", bits=4, group_size=16)
#: Of SmolLM2-135M: entries of a layer, its outputs, its inputs by groups of 16.
ENTRIES = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
OUTPUTS = 2 * 576 + 2 * 192 + 2 * 1536 + 576
GROUPS = ENTRIES // 16


def small(quantise, **changes):
    fields = {"quantise": quantise, "micro_batch": 4, "scored": (Scored(items=4, new_tokens=8),)} | changes
    return work_on("math_10k", "SmolLM2-135M", **fields)


def held(work):
    shapes = model_shapes(work.model)
    return memory(shapes, trained(shapes, work), work)


@pytest.mark.parametrize(
    ("quantise", "layer"),
    [(INT4, ENTRIES + GROUPS * (2 + 1)), (INT8, ENTRIES + OUTPUTS * (4 + 1)), (RTN, 2 * ENTRIES), (None, 2 * ENTRIES)],
)
def test_a_layer_holds_a_byte_a_weight_and_its_grids(quantise, layer):
    work = small(quantise)
    shapes = model_shapes(work.model)
    assert stored_bytes(shapes, work) == layer
    rest = 2 * (shapes.parameters - shapes.layers * ENTRIES)
    assert held(work).weights_bytes == rest + shapes.layers * layer


def test_simulated_bases_cost_what_floats_cost():
    shapes = model_shapes("SmolLM2-135M")
    plain, simulated = small(None), small(RTN)
    assert held(simulated) == held(plain)
    assert trained(shapes, simulated) == trained(shapes, plain)
    assert decoding(shapes, simulated) == decoding(shapes, plain)


def test_integers_keep_diablo_out_of_merged_mode():
    shapes = model_shapes("SmolLM2-135M")
    assert trained(shapes, small(INT8)).additive
    assert not trained(shapes, small(RTN)).additive
    assert not trained(shapes, small(INT8, method="lora")).additive


def test_training_keeps_the_dense_copies_that_gradients_go_through():
    integers, floats = held(small(INT8, method="lora")), held(small(None, method="lora"))
    # Nothing below the first layer's queries, keys, values asks for a gradient.
    first = 576 * 576 + 2 * 576 * 192
    assert integers.activations_bytes - floats.activations_bytes == 2 * (30 * ENTRIES - first)
    checkpointed = held(small(INT8, method="lora", gradient_checkpointing=True))
    plain = held(small(None, method="lora", gradient_checkpointing=True))
    assert checkpointed.activations_bytes == plain.activations_bytes
    # The peak is in the first layers' backward pass or in the logits, where no copy is held.
    assert 0 <= checkpointed.step_bytes - plain.step_bytes <= 2 * ENTRIES


def test_decoding_moves_integers_and_copies():
    shapes, answers = model_shapes("SmolLM2-135M"), {"method": "none", "scored": (Scored(items=16, new_tokens=7),)}
    integers, floats = small(INT8, **answers), small(None, **answers)
    more = decoding(shapes, integers).read_bytes - decoding(shapes, floats).read_bytes
    assert more == pytest.approx(7 * 30 * (stored_bytes(shapes, integers) + 2 * ENTRIES))
    long = {"prompt_tokens": 2000.0, "max_tokens": None}  # so that a layer is wider than the logits
    integers, floats = (held(dataclasses.replace(work, **long)) for work in (integers, floats))
    assert integers.decoding_bytes - floats.decoding_bytes == 2 * 576 * 1536


def test_sharded_integers_are_gathered_as_they_are():
    sharded = {"devices": 2, "sharding": "fsdp"}
    work = small(INT8, **sharded)
    whole, layer = held(small(INT8)).weights_bytes, stored_bytes(model_shapes(work.model), work)
    assert held(work).weights_bytes == whole // 2 + 2 * layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "method full cannot serve a base of torchao-int4: it trains the base weight itself"),
        ({"method": "pissa"}, "method pissa cannot serve a base of torchao-int4: its start rewrites the base weight"),
        (
            {"quantise": INT4.model_copy(update={"group_size": 50})},
            "group_size that divides the 576 inputs of layer 'q_proj', got 50",
        ),
    ],
)
def test_bases_that_the_run_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(dataclasses.replace(small(INT4), **changes), "L40")
    plan(small(INT4, method="none"), "L40")


@pytest.mark.parametrize(
    ("quantise", "how"), [(RTN, "floats on a grid in memory"), (INT4, "a byte for each weight"), (None, None)]
)
def test_the_plan_says_what_it_does_not_count(quantise, how):
    found = plan(small(quantise), "L40")
    table = found.table().set_index("quantity")
    if quantise is None:
        assert not {"base", "quantising the base"} & set(table.index)
        assert "quantising" not in header(found)
        return
    assert table["value"]["base"] == f"{quantise.method}, 4 bits"
    assert table["how"]["base"].startswith(how)
    assert table["value"]["quantising the base"] == "not counted"
    assert header(found).count(f"quantising the base ({quantise.method}, 4 bits) is not counted") == 1
    assert ("as integers" in table["how"]["weights"]) is (quantise is INT4)


def medium(folder, quantise, dtype, **fields):
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra quant)")
    kept = 64 if dtype == "bfloat16" else 16
    sizes = {"batch": 4, "length": 64, "kept": kept, "num_blocks": 8}
    return Case.make(folder, MEDIUM, dtype=dtype, quantise=quantise, **sizes, **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantise", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("method", ["diablo", "lora"])
def test_what_is_held_is_what_torchao_holds(method, quantise, dtype, tmp_path):
    case = medium(tmp_path, quantise, dtype, method=method)
    found = planned(case)
    parts = ("qdata", "scale", "zero_point")
    sizes = [
        sum(getattr(p, part).nbytes for part in parts) if hasattr(p, "qdata") else p.nbytes
        for p in case.network.parameters()
    ]
    assert found.weights_bytes + found.adapter_bytes == sum(sizes)
    final_norm, log_softmax = 4 * 4 * 64 * 256, found.logits_bytes // 3
    assert found.activations_bytes + final_norm + log_softmax == pytest.approx(saved_bytes(case), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantise", [INT4, INT8], ids=["int4", "int8"])
def test_the_peak_of_a_step_on_integers(quantise, checkpointing, tmp_path):
    case = medium(tmp_path, quantise, "float32", gradient_checkpointing=checkpointing)
    assert planned(case).step_bytes == pytest.approx(measured_peak(case)[0], rel=0.15)
