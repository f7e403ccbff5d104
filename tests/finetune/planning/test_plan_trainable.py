import dataclasses

import pytest
from llamas import TINY, Case
from transformers import LlamaConfig, LlamaForCausalLM

from diablo_theory import methods
from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.shapes import MATRICES, model_shapes
from diablo_theory.finetune.planning.trainable import trained
from diablo_theory.finetune.planning.work import PAPER_TARGETS, Work


def counted(model, **fields):
    work = Work(model=model, examples=1, prompt_tokens=1, answer_tokens=1, batch_size=1, **fields)
    return trained(model_shapes(model), work)


# Source of the counts: the paper's quoted percentages and what reproduces them on the published shapes.
@pytest.mark.parametrize(
    ("model", "method", "knob", "targets", "true", "true_percent", "quoted", "quoted_percent"),
    [
        ("LLaMA2-7B", "diablo", 128, PAPER_TARGETS, 35_127_296, 0.5213, 35_127_296, 0.5213),
        ("LLaMA2-7B", "diablo", 32, PAPER_TARGETS, 140_509_184, 2.0852, 140_509_184, 2.0852),
        ("LLaMA2-7B", "diablo", 64, PAPER_TARGETS, 70_254_592, 1.0426, 70_254_592, 1.0426),
        ("LLaMA-13B", "diablo", 64, PAPER_TARGETS, 137_625_600, 1.0574, 137_625_600, 1.0574),
        ("LLaMA3-8B", "diablo", 64, PAPER_TARGETS, 71_303_168, 0.888, 83_886_080, 1.0446),
        ("LLaMA3-8B", "diablo", 64, MATRICES, 109_051_904, 1.358, 121_634_816, 1.5147),
        ("LLaMA3-8B", "lora", 32, PAPER_TARGETS, 56_623_104, 0.705, 62_914_560, 0.7835),
        ("LLaMA3-8B", "dora", 32, PAPER_TARGETS, 57_409_536, 0.715, 63_897_600, 0.7957),
        ("LLaMA3-8B", "lora", 32, MATRICES, 83_886_080, 1.0446, 90_177_536, 1.1230),
        ("LLaMA3-8B", "lora-fa", 32, MATRICES, 44_040_192, 0.5484, 50_331_648, 0.6268),
        ("LLaMA2-7B", "lora", 32, PAPER_TARGETS, 56_098_816, 0.8325, 56_098_816, 0.8325),
        ("LLaMA2-7B", "lora", 64, PAPER_TARGETS, 112_197_632, 1.6650, 112_197_632, 1.6650),
        ("LLaMA2-7B", "lora", 16, PAPER_TARGETS, 28_049_408, 0.4163, 28_049_408, 0.4163),
        ("LLaMA-13B", "lora", 32, PAPER_TARGETS, 87_818_240, 0.6747, 87_818_240, 0.6747),
    ],
)
def test_true_and_quoted_counts(model, method, knob, targets, true, true_percent, quoted, quoted_percent):
    fields = {"num_blocks": knob} if method == "diablo" else {"rank": knob}
    found = counted(model, method=method, target_modules=targets, **fields)
    assert (found.parameters, found.quoted_parameters) == (true, quoted)
    assert found.percent == pytest.approx(true_percent, abs=6e-4)
    assert found.quoted_percent == pytest.approx(quoted_percent, abs=6e-4)
    assert found.knob == knob


def test_full_counts_the_targets_weights_and_none_nothing():
    full = counted("LLaMA2-7B", method="full")
    assert full.parameters == 64 * counted("LLaMA2-7B").parameters
    assert full.label == "Full fine-tuning"
    none = counted("LLaMA2-7B", method="none")
    assert (none.parameters, none.targets, none.label) == (0, (), "Untouched model")


def test_another_method_takes_diablos_budget():
    lora, diablo = counted("LLaMA2-7B", method="lora"), counted("LLaMA2-7B")
    per_rank = counted("LLaMA2-7B", method="lora", rank=1).parameters
    assert abs(lora.parameters - diablo.parameters) <= per_rank / 2
    assert lora.label == f"LoRA r={lora.knob}"


@pytest.mark.parametrize("method", ["diablo", "lora", "full", "dora", "miss"])
def test_counts_are_those_of_a_prepared_model(method, tmp_path):
    case = Case.make(tmp_path, TINY, method=method, num_blocks=4)
    assert case.trained.parameters == sum(p.numel() for p in case.network.parameters() if p.requires_grad)


def test_a_target_of_one_layer_alone(tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    found = counted(str(tmp_path), target_modules=("layers.1.self_attn.q_proj",), num_blocks=4)
    assert [(target.layer, target.name) for target in found.targets] == [(1, "q_proj")]


@pytest.mark.parametrize(
    ("fields", "additive"),
    [
        ({}, False),
        ({"dropout": 0.05}, True),
        ({"method": "diablo-additive"}, True),
        ({"method": "lora", "dropout": 0.05}, False),
    ],
)
def test_dropout_keeps_diablo_out_of_merged_mode(fields, additive):
    assert counted("SmolLM2-135M", **fields).additive is additive


def test_sharding_keeps_diablo_out_of_merged_mode():
    work = Work(
        model="SmolLM2-135M", examples=1, prompt_tokens=1, answer_tokens=1, batch_size=2, devices=2, sharding="fsdp"
    )
    assert trained(model_shapes("SmolLM2-135M"), work).additive


def test_galore_trains_whole_weights_with_small_moments(monkeypatch):
    galore = dataclasses.replace(
        methods.FAMILIES["lora"], label="GaLore r={}", count=lambda r, m1, m2: r * max(m1, m2)
    )
    monkeypatch.setitem(methods.FAMILIES, "galore", galore)
    found, full = counted("SmolLM2-135M", method="galore", rank=4), counted("SmolLM2-135M", method="full")
    assert (found.parameters, found.label) == (full.parameters, "GaLore r=4")
    assert found.moments == 30 * 4 * (3 * 576 + 2 * 1536)
    assert full.moments == full.parameters
    assert found.is_inside
    assert not found.is_derived


def test_families_that_are_sized_by_blocks_take_n():
    found = counted("SmolLM2-135M", method="random-entries", num_blocks=32)
    assert (found.knob, found.label) == (32, "Random entries N=32")
    assert found.parameters == counted("SmolLM2-135M", num_blocks=32).parameters


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("diablo", {"rank": 8}),
        ("full", {"rank": 8}),
        ("random-rows", {"rank": 8}),
        ("c3a", {"rank": 7}),
        ("adalora", {"rank": 1}),
        ("bone", {"dropout": 0.1}),
        ("full", {"dropout": 0.1}),
        ("lora", {"num_blocks": 33}),
    ],
)
def test_what_a_run_refuses_the_plan_refuses_in_the_same_words(method, options, tmp_path):
    config = LlamaConfig(**TINY)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r".") as refused:
        methods.prepare(
            LlamaForCausalLM(config), method, target_modules=["q_proj"], seed=0, **{"num_blocks": 4} | options
        )
    with pytest.raises(ConfigError) as said:
        counted(str(tmp_path), method=method, target_modules=("q_proj",), **{"num_blocks": 4} | options)
    assert str(said.value) == str(refused.value)


def test_targets_that_match_nothing_or_the_wrong_thing():
    with pytest.raises(ConfigError, match=r"no module is named 'q_projj'.*Did you mean 'q_proj'"):
        counted("SmolLM2-135M", target_modules=("q_projj",))
    with pytest.raises(ConfigError, match="lm_head is no matrix of a decoder layer"):
        counted("SmolLM2-135M", target_modules=("lm_head",))
    with pytest.raises(ConfigError, match="num_blocks must be at most 576"):
        counted("SmolLM2-135M", target_modules=("q_proj",), num_blocks=577)
