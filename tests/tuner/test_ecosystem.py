"""DiaBlo where LoRA is used today: peft's and transformers' ways of adding, training, saving, loading and merging."""

import copy

import pytest
import torch
from layers import randomise
from networks import IDS, KINDS, llama, output
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diablo_theory.tuner import DiaBloConfig, DiaBloLinear, mode_summary

MODES = ["additive", "merged"]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DiaBloLinear)]


def adapt(kind="decoder", mode="merged", num_blocks=3, **options):
    build, targets, task, inputs = KINDS[kind]
    model = build()
    expected = output(model, inputs)
    config = DiaBloConfig(num_blocks=num_blocks, target_modules=targets, task_type=task, mode=mode, **options)
    return get_peft_model(model, config).eval(), expected, inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_identity_then_change_then_disable_then_merge(kind, mode):
    model, expected, inputs = adapt(kind, mode)
    assert torch.equal(output(model, inputs), expected)
    randomise(model)
    changed = output(model, inputs)
    assert (changed - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), changed)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), changed, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():  # unmerges
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), changed)
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(output(unloaded, inputs), expected)
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    torch.testing.assert_close(output(plain, inputs), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_and_nothing_else(kind, mode):
    model, _, inputs = adapt(kind, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, **inputs).to_tuple()[0 if not inputs else 1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        learns = "diablo" in name or "modules_to_save" in name
        assert torch.equal(value, before[name]) is not learns, name


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_save_and_load(tmp_path, safe, low_memory):
    model, _, _ = adapt(num_blocks=5, init_weights=False)  # ragged: blocks and tails
    changed = output(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    names = {file.name for file in tmp_path.iterdir()}
    weights = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert names == {"README.md", "adapter_config.json", weights}
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(output(loaded), changed)
    assert not any(p.requires_grad for p in loaded.parameters())
    state = get_peft_model_state_dict(loaded)
    assert set(state) == set(get_peft_model_state_dict(model))
    assert any("diablo_tail" in key for key in state)
    set_peft_model_state_dict(loaded, {key: torch.zeros_like(value) for key, value in state.items()})
    assert torch.equal(output(loaded), output(llama()))


def test_auto_class_finds_base_and_adapter(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        DiaBloConfig(num_blocks=6, init_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(output(loaded), output(model))


def test_transformers_own_adapter_methods(tmp_path):
    model = llama()
    expected = output(model)
    model.add_adapter(DiaBloConfig(num_blocks=6, target_modules=["q_proj"], init_weights=False), adapter_name="one")
    one = output(model)
    assert not torch.equal(one, expected)
    model.disable_adapters()
    assert torch.equal(output(model), expected)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(output(other), one)
    other.load_adapter(str(tmp_path), adapter_name="second")
    other.set_adapter("second")
    assert other.active_adapters() == ["second"]
    assert torch.equal(output(other), one)
    other.delete_adapter("second")
    assert "merged (valid for this layer)" in mode_summary(model)


def test_several_adapters_add_set_combine_delete():
    model, expected, _ = adapt(init_weights=False)
    first = output(model)
    model.add_adapter("second", DiaBloConfig(num_blocks=4, target_modules=["q_proj", "k_proj"], init_weights=False))
    assert torch.equal(output(model), first)  # added, not active
    frozen = [p.requires_grad for n, p in model.named_parameters() if ".second" in n]
    assert frozen
    assert not any(frozen)
    model.set_adapter("second")
    second = output(model)
    assert not torch.equal(second, first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    model.base_model.set_adapter(["default", "second"])
    both = output(model)
    assert min((both - first).abs().max(), (both - second).abs().max()) > 1e-3
    modes = {layer.mode("default") for layer in layers_of(model) if "default" in layer.diablo_layout}
    assert ("additive", "several adapters are active") in modes
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(plain), both, rtol=1e-4, atol=1e-4)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    assert not any(".second" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")


def test_low_level_injection_and_head_that_is_saved_whole(tmp_path):
    model, _, _ = adapt("classifier", init_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    changed = output(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(KINDS["classifier"][0](), tmp_path).eval()
    assert torch.equal(output(again), changed)
    injected = inject_adapter_in_model(DiaBloConfig(num_blocks=6), llama(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in injected.named_parameters() if "diablo" in n} == {"meta"}


@pytest.mark.parametrize("bias", ["none", "all", "diablo_only"])
def test_biases_train_and_are_saved(bias, tmp_path):
    model, _, _ = adapt("conv1d", bias=bias)
    biases = {n for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    adapted = {n for n in biases if "base_layer" in n}
    assert bool(biases) == (bias != "none")
    assert (biases != adapted) == (bias == "all")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    changed = output(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(KINDS["conv1d"][0](), tmp_path).eval()
    torch.testing.assert_close(output(again), changed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_have_float32_adapters(dtype, mode):
    base = llama().to(dtype)
    model = get_peft_model(base, DiaBloConfig(num_blocks=6, init_weights=False, mode=mode)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "diablo" in n} == {torch.float32}
    out = output(model)
    assert out.dtype == dtype
    reference = get_peft_model(llama(), DiaBloConfig(num_blocks=6, init_weights=False)).eval()
    set_peft_model_state_dict(reference, get_peft_model_state_dict(model))
    exact = output(reference)
    assert ((out.float() - exact).norm() / exact.norm()) < 20 * torch.finfo(dtype).eps
    model.train()(input_ids=IDS).logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "diablo" in n)
    native = get_peft_model(llama().to(dtype), DiaBloConfig(num_blocks=6), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in native.named_parameters() if "diablo" in n} == {dtype}
    chosen = get_peft_model(llama(), DiaBloConfig(num_blocks=6, adapter_dtype="bfloat16"))
    assert {p.dtype for n, p in chosen.named_parameters() if "diablo" in n} == {torch.bfloat16}


def test_generate_merged_and_additive_agree():
    model, _, _ = adapt(init_weights=False)
    ours = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    for layer in layers_of(model):
        layer.diablo_mode["default"] = "additive"
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False), ours)


def test_gradient_checkpointing_and_accumulation_change_nothing():
    def gradients(checkpointing, pieces):
        model, _, _ = adapt(init_weights=False)
        model.train()
        torch.manual_seed(0)
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable()
        for part in IDS.split(len(IDS) // pieces):
            (model(input_ids=part, use_cache=False).logits.square().mean() / pieces).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(0)
    reference = gradients(False, 1)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(True, 1), reference, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(False, 2), reference, rtol=1e-5, atol=1e-6)


def test_counts_and_modes_are_printed(capsys):
    model, _, _ = adapt(mode="auto")
    next(iter(layers_of(model))).base_layer.register_forward_hook(lambda *_: None)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert "trainable params: 2,352 || all params:" in printed
    assert "DiaBlo 'default': 5 layers merged (valid for this layer)" in printed
    assert "DiaBlo 'default': 1 layer additive (the base layer has hooks" in printed
    assert "mode=merged (valid for this layer)" in str(model)
    get_peft_model(llama(), LoraConfig(r=2)).print_trainable_parameters()
    assert "DiaBlo" not in capsys.readouterr().out


def test_status_of_model_and_layers():
    model, _, _ = adapt(init_weights=False)
    status = model.get_model_status()
    assert status.peft_types == {"default": "DIABLO"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert status.num_adapter_layers == 6
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    next(iter(layers_of(model))).unmerge()
    assert model.get_model_status().merged_adapters == "irregular"


def test_a_second_adapters_unmatched_pattern_is_warned_of():
    model, _, _ = adapt()
    with pytest.warns(RuntimeWarning, match="num_blocks_pattern: 'q_proj' matches no adapted module"):
        model.add_adapter(
            "other", DiaBloConfig(num_blocks=4, target_modules=["k_proj"], num_blocks_pattern={"q_proj": 2})
        )
    names = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert names == {"q_proj", "v_proj", "down_proj", "k_proj"}


def test_deleting_a_merged_adapter_is_refused_and_deleting_leaves_nothing():
    model, _, _ = adapt(num_blocks=5, init_weights=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.add_adapter("other", DiaBloConfig(num_blocks=4, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="Setting active adapter to other|active which is now deleted"):
        model.delete_adapter("default")
    for layer in layers_of(model):
        for attribute in layer.adapter_layer_names + layer.other_param_names:
            assert "default" not in getattr(layer, attribute)


def test_modules_of_the_base_that_are_named_like_the_adapter_are_not_taken_for_it(tmp_path):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diablo_gate = torch.nn.Linear(6, 6)
            self.out = torch.nn.Linear(6, 4)

        def forward(self, x):
            return self.out(self.diablo_gate(x))

    model = get_peft_model(Named(), DiaBloConfig(num_blocks=2, target_modules=["out"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["base_model.model.out.diablo_blocks.default"]
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.out.diablo_blocks"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_input_of_another_dtype_is_an_error_as_in_the_base_layer(mode, bias):
    model = torch.nn.Sequential(torch.nn.Linear(10, 20, bias=bias).bfloat16())
    model = get_peft_model(model, DiaBloConfig(num_blocks=2, target_modules=["0"], mode=mode))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(3, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (torch.randn(3, 10), torch.randn(3, 10).bfloat16()):
            assert model(x).dtype == torch.bfloat16


def test_disabling_within_disabling():
    model, expected, inputs = adapt()
    randomise(model)
    changed = output(model, inputs)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), expected)
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), changed)
    assert {p.requires_grad for n, p in model.named_parameters() if "diablo_" in n} == {True}


def test_layers_that_were_switched_one_by_one_are_told_as_irregular():
    model, _, _ = adapt()
    model.add_adapter("second", DiaBloConfig(num_blocks=6, target_modules=["q_proj", "v_proj"]))
    first, *_ = layers_of(model)
    first.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    first.enable_adapters(True)
    first.set_adapter("second")
    assert model.get_model_status().active_adapters == "irregular"


def test_names_that_are_parts_of_each_other_are_kept_apart(tmp_path):
    model, expected, inputs = adapt()
    for name in ("def", "default.more", "other_default"):
        if "." in name:
            with pytest.raises((KeyError, ValueError), match=r"\."):
                model.add_adapter(name, DiaBloConfig(num_blocks=3, target_modules=["q_proj"]))
            continue
        model.add_adapter(name, DiaBloConfig(num_blocks=3, target_modules=["q_proj"], init_weights=False))
    before = output(model, inputs)
    assert torch.equal(before, expected)  # "default" is active, and zero
    model.save_pretrained(tmp_path, selected_adapters=["def"])
    model.set_adapter("def")
    saved = output(model, inputs)
    model.delete_adapter("other_default")
    assert torch.equal(output(model, inputs), saved)
    again = PeftModel.from_pretrained(llama(), tmp_path / "def").eval()
    assert torch.equal(output(again, inputs), saved)


def test_injection_from_a_state_dict_finds_the_layers_by_their_keys():
    model, _, inputs = adapt()
    randomise(model)
    changed = output(model, inputs)
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    config = DiaBloConfig(num_blocks=3, target_modules=["down_proj"])  # the keys are what counts
    again = inject_adapter_in_model(config, llama(), state_dict=state).eval()
    set_peft_model_state_dict(again, state)
    assert torch.equal(output(again, inputs), changed)


def test_loading_leaves_the_dictionary_as_it_was():
    model, _, _ = adapt()
    state = get_peft_model_state_dict(model)
    before = {key: value.clone() for key, value in state.items()}
    set_peft_model_state_dict(model, state)
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_adapters_in_one_batch_are_refused_with_a_reason():
    model, _, _ = adapt()
    with pytest.raises(ValueError, match="adapter_names: DiaBlo applies the same active adapters to the whole batch"):
        model(input_ids=IDS, adapter_names=["default"] * len(IDS))


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_merging_in_turn_and_at_once_agree(order):
    model, _, inputs = adapt()
    model.add_adapter("second", DiaBloConfig(num_blocks=6, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    at_once = copy.deepcopy(model).merge_and_unload(adapter_names=order)
    for name in order:
        model.merge_adapter([name])
    torch.testing.assert_close(output(model, inputs), output(at_once, inputs), rtol=1e-5, atol=1e-5)
