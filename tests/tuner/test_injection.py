"""Bad input when an adapter is put into a model: clear messages, and the model as it was, bit for bit."""

import copy

import peft
import pytest
import torch
from networks import IDS, gpt2, llama, output
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner import DiaBloConfig, DiaBloLinear
from diablo_theory.tuner import model as tuner_model


def fingerprint(model):
    """Structure, values and what trains."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [(name, type(module)) for name, module in model.named_modules()], state, flags


def same(one, other):
    return (
        one[0] == other[0]
        and one[2] == other[2]
        and all(torch.equal(value, other[1][k]) for k, value in one[1].items())
    )


class Bag(nn.Module):
    """One layer of every kind that somebody may point at."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(12, 18)
        self.embedding = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 24)
        self.tied = nn.Linear(12, 20, bias=False)
        self.tied.weight = self.embedding.weight
        self.once = nn.Linear(12, 12)
        self.twice = self.once
        self.small = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("targets", "options", "kind", "message"),
    [
        (
            ["embedding"],
            {},
            TypeError,
            "^embedding: is of type Embedding; DiaBlo adapts torch.nn.Linear and transformers",
        ),
        (["conv"], {}, TypeError, "^conv: is of type Conv2d; DiaBlo adapts"),
        (["norm"], {}, TypeError, "^norm: is of type LayerNorm; DiaBlo adapts"),
        (["tied"], {}, ValueError, "^tied: its weight is tied to embedding.weight and cannot be adapted alone"),
        (["once"], {}, ValueError, "^once: the same module is used as once and twice"),
        (["attention.out_proj"], {}, TypeError, "^attention.out_proj: nn.MultiheadAttention reads this weight"),
        (["encoder.linear1"], {}, ValueError, r"^encoder.linear1: nn.TransformerEncoderLayer reads .*set_fastpath"),
        (["small"], {"num_blocks": 6}, ValueError, "^small: num_blocks must be at most 4 for a 4 x 4 matrix, got 6"),
        (["small"], {"num_blocks_pattern": {"small": 9}}, ValueError, "^small: num_blocks must be at most 4"),
        (["conv"], {"parameter_budget": 9, "num_blocks": None}, TypeError, "is of type Conv2d"),
    ],
)
def test_a_bad_target_is_named_and_the_model_is_as_before(targets, options, kind, message):
    model = Bag()
    before = fingerprint(model)
    config = DiaBloConfig(**({"num_blocks": 3, "target_modules": ["good", *targets]} | options))
    kept = copy.deepcopy(config)
    with pytest.raises(kind, match=message):
        inject_adapter_in_model(config, model)
    assert same(fingerprint(model), before)
    assert config == kept
    with pytest.raises(kind, match=message):
        get_peft_model(model, config)
    assert same(fingerprint(model), before)


def test_a_failure_at_the_last_layer_undoes_all_layers(monkeypatch):
    model = get_peft_model(llama(), DiaBloConfig(num_blocks=6, modules_to_save=["lm_head"]))
    model.disable_adapter_layers()
    before, made = fingerprint(model), []
    real = tuner_model.DiaBloLinear.update_layer

    def failing(self, *args):
        made.append(1)
        if len(made) == 10:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(tuner_model.DiaBloLinear, "update_layer", failing)
    model.base_model.peft_config["other"] = DiaBloConfig(num_blocks=4)
    with pytest.raises(KeyboardInterrupt):
        model.base_model.inject_adapter(model.base_model.model, "other")
    assert len(made) == 10
    assert same(fingerprint(model), before)
    layers = [module for module in model.modules() if isinstance(module, DiaBloLinear)]
    assert all(list(layer.diablo_layout) == ["default"] and layer.active_adapters == ["default"] for layer in layers)


def test_a_failure_after_the_base_was_frozen_thaws_it(monkeypatch):
    model = llama()
    before = fingerprint(model)

    def failing(**_):
        raise MemoryError("no room for a copy of the head")

    monkeypatch.setattr("peft.tuners.tuners_utils.set_additional_trainable_modules", failing)
    with pytest.raises(MemoryError, match="no room"):
        get_peft_model(model, DiaBloConfig(num_blocks=6, modules_to_save=["lm_head"]))
    assert same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (["q_porj"], "Did you mean 'q_proj'"),
        (["experts"], "Known: .*down_proj.*q_proj"),
        (".*nothing.*", "Known: "),
    ],
)
def test_targets_that_match_nothing_say_what_could(targets, hint):
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"not found in the base model.*{hint}"):
        get_peft_model(model, DiaBloConfig(num_blocks=6, target_modules=targets))
    assert same(fingerprint(model), before)


def test_a_model_without_any_linear_layer_says_so():
    with pytest.raises(ValueError, match="The model has no layer that DiaBlo can adapt"):
        inject_adapter_in_model(DiaBloConfig(target_modules=["x"]), nn.ModuleDict({"a": nn.Conv1d(1, 1, 1)}))


def test_one_misspelt_target_among_others_is_warned_of():
    with pytest.warns(RuntimeWarning, match="no adapted module is named 'vproj'"):
        get_peft_model(llama(), DiaBloConfig(num_blocks=6, target_modules=["q_proj", "vproj"]))
    with pytest.warns(RuntimeWarning, match="num_blocks_pattern: 'k_proj' matches no adapted module"):
        get_peft_model(
            llama(), DiaBloConfig(num_blocks=6, target_modules=["q_proj"], num_blocks_pattern={"k_proj": 3})
        )


def test_no_targets_for_an_unknown_architecture():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        inject_adapter_in_model(DiaBloConfig(), nn.Sequential(nn.Linear(4, 4)))


def test_a_taken_name_is_refused():
    model = llama()
    config = DiaBloConfig(num_blocks=6, target_modules=["q_proj"])
    inject_adapter_in_model(config, model, adapter_name="mine")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="adapter_name 'mine' is taken"):
        inject_adapter_in_model(config, model, adapter_name="mine")
    assert same(fingerprint(model), before)
    wrapped = get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="'default' already exists"):
        wrapped.add_adapter("default", config)


def test_layers_of_another_tuner_are_refused():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"q_proj: is already adapted by lora.Linear; merge that adapter or unload it"):
        inject_adapter_in_model(DiaBloConfig(num_blocks=6, target_modules=["q_proj"]), model)
    assert same(fingerprint(model), before)


def test_a_tied_head_is_refused_and_an_untied_one_works():
    with pytest.raises(ValueError, match=r"lm_head: its weight is tied to model.embed_tokens.weight"):
        get_peft_model(llama(tie_word_embeddings=True), DiaBloConfig(num_blocks=4, target_modules=["lm_head"]))
    get_peft_model(llama(), DiaBloConfig(num_blocks=4, target_modules=["lm_head"]))


def test_transformer_encoder_layers_work_with_the_fast_path_off():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        inject_adapter_in_model(
            DiaBloConfig(num_blocks=3, target_modules=["linear1", "linear2"], init_weights=False), model
        )
        with torch.no_grad():
            adapted = model(x)
            for layer in (model.linear1, model.linear2):
                layer.merge()
            merged = model(x)
        torch.testing.assert_close(adapted, merged)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_ragged_sizes_count_their_true_parameters():
    model = get_peft_model(llama(), DiaBloConfig(num_blocks=7, target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, DiaBloLinear)]
    assert len(layers) == 14
    expected = sum(BlockLayout(layer.in_features, layer.out_features, 7).num_parameters for layer in layers)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == expected == sum(int((layer_mask(layer) != 0).sum()) for layer in layers)
    assert total == expected + llama().num_parameters()
    assert model(input_ids=IDS).logits.shape == (2, 6, 64)


def layer_mask(layer):
    """Entries of the weight that training can change."""
    with torch.no_grad():
        for part in layer.parts("default"):
            if part is not None:
                part.fill_(1.0)
    return layer.get_delta_weight("default")


@pytest.mark.parametrize("budget", [500, 1300, 5000, 1])
def test_a_budget_picks_the_nearest_block_count_and_writes_it_down(budget):
    def count(num_blocks):
        return sum(BlockLayout(36, m2, num_blocks).num_parameters for m2 in (36, 12)) * 2

    config = DiaBloConfig(parameter_budget=budget, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), config)
    chosen = model.peft_config["default"].num_blocks
    assert model.peft_config["default"].parameter_budget is None
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == count(chosen)
    assert abs(trainable - budget) == min(abs(count(n) - budget) for n in range(1, 37))


def test_a_budget_counts_what_the_pattern_takes_first():
    config = DiaBloConfig(
        parameter_budget=1000, num_blocks_pattern={"0.self_attn.q_proj": 2}, target_modules=["q_proj"]
    )
    model = get_peft_model(llama(), config)
    sizes = {
        name: module.diablo_layout["default"].num_blocks
        for name, module in model.named_modules()
        if isinstance(module, DiaBloLinear)
    }
    assert next(n for name, n in sizes.items() if ".0." in name) == 2
    rest = BlockLayout(36, 36, next(n for name, n in sizes.items() if ".1." in name)).num_parameters
    assert abs(648 + rest - 1000) == min(abs(648 + BlockLayout(36, 36, n).num_parameters - 1000) for n in range(1, 37))


def test_default_targets_are_the_papers_for_llama_and_pefts_elsewhere():
    def targets(model):
        return {
            name.rpartition(".")[2]
            for name, module in get_peft_model(model, DiaBloConfig(num_blocks=4)).named_modules()
            if isinstance(module, DiaBloLinear)
        }

    assert targets(llama()) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert targets(gpt2()) == {"c_attn"}


def test_selection_by_layer_pattern_exclusion_and_all_linear():
    def names(**options):
        model = inject_adapter_in_model(DiaBloConfig(num_blocks=3, **options), llama())
        return [name for name, module in model.named_modules() if isinstance(module, DiaBloLinear)]

    assert names(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert names(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers") == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert names(target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == ["model.layers.1.self_attn.q_proj"]
    assert names(target_modules=r".*\.1\..*k_proj") == ["model.layers.1.self_attn.k_proj"]
    assert len(names(target_modules="all-linear")) == 14


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(llama(), DiaBloConfig(num_blocks=6, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_adapter_for_other_shapes_is_refused(saved):
    with pytest.raises(
        RuntimeError, match=r"size mismatch for .*q_proj.diablo_blocks.default.*\[6, 6, 6\].*\[6, 8, 8\]"
    ):
        PeftModel.from_pretrained(llama(hidden_size=48), saved)


def test_a_saved_adapter_of_another_base_is_warned_of(saved, recwarn):
    model = llama()
    model.config._name_or_path = "somebody/llama"
    config = DiaBloConfig.from_pretrained(saved)
    config.base_model_name_or_path = "somebody/mistral"
    config.save_pretrained(saved)
    with pytest.warns(
        UserWarning, match="base_model_name_or_path is 'somebody/mistral', this model is 'somebody/llama'"
    ):
        PeftModel.from_pretrained(model, saved)


def test_a_truncated_file_leaves_the_model_alone(saved):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = llama()
    before, expected = fingerprint(model), output(model)
    with pytest.raises(ValueError, match="truncated"):
        PeftModel.from_pretrained(model, saved)
    assert same(fingerprint(model), before)
    assert torch.equal(output(model), expected)


def test_nan_in_one_layer_stops_a_merge_before_any_layer_is_changed(saved):
    model = PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1" in n and "diablo" in n)[0, 0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for act in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            act()
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items() if "diablo" not in name)
        assert not any(module.merged for module in model.modules() if isinstance(module, DiaBloLinear))


def test_peft_itself_is_not_changed_for_other_methods():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_type == peft.PeftType.LORA
