"""Quantised bases: trained in additive mode, merged with the error that the warning says, unmerged bit for bit.

torchao comes with the extra ``quant``; the cases of bitsandbytes are skipped where it is not installed.
"""

import copy
import re
import warnings

import pytest
import torch
from layers import randomise
from networks import IDS, llama, output
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner import DiaBloConfig, DiaBloLinear
from diablo_theory.tuner.quantised import is_reordered

#: Sizes that every quantiser takes, bitsandbytes' 4-bit inference on CPUs included.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def torchao(bits, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra quant)")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(**options))
    groups = quantization.PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def bitsandbytes(bits, kind="nf4", double=False):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)


QUANTISERS = {
    "torchao int8": lambda: torchao(8),
    "torchao int4": lambda: torchao(4),
    "bitsandbytes int8": lambda: bitsandbytes(8),
    "bitsandbytes nf4": lambda: bitsandbytes(4),
    "bitsandbytes nf4 twice": lambda: bitsandbytes(4, double=True),
    "bitsandbytes fp4": lambda: bitsandbytes(4, kind="fp4"),
}
every_quantiser = pytest.mark.parametrize("quantiser", QUANTISERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(**SIZES).save_pretrained(path)
    return path


@pytest.fixture
def load(folder):
    def load(quantiser, dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=QUANTISERS[quantiser](), dtype=dtype
        ).eval()

    return load


@pytest.fixture
def adapt(load):
    def adapt(quantiser, dtype=torch.float32, **options):
        config = DiaBloConfig(**({"num_blocks": 6, "target_modules": TARGETS, "init_weights": False} | options))
        return get_peft_model(load(quantiser, dtype), config).eval()

    return adapt


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DiaBloLinear)]


def bits(model):
    """A copy of every tensor that the quantised weights consist of."""
    found = {}
    for index, layer in enumerate(layers_of(model)):
        weight = layer.base_layer.weight
        holders = [weight, getattr(weight, "quant_state", None), getattr(layer.base_layer, "state", None)]
        if "qdata" not in vars(weight):
            found[index, "data"] = weight.data.clone()
        for holder in holders:
            if holder is not None:
                tensors = ((name, value) for name, value in vars(holder).items() if isinstance(value, torch.Tensor))
                found.update({(index, name): value.clone() for name, value in tensors})
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def effective(layer, dtype=torch.float32):
    """The matrix that a layer without bias multiplies by, from what it makes of the identity."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=dtype)).T.double()


def quietly(action, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merging .* rounds it again")
        return action(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_quantiser
def test_training_lowers_the_loss_and_leaves_the_weight(quantiser, dtype, load):
    base = load(quantiser, dtype)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, DiaBloConfig(num_blocks=6, target_modules=TARGETS)).train()
    before = bits(model)
    learns = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learns} == {torch.float32}
    expected = sum(BlockLayout(la.in_features, la.out_features, 6).num_parameters for la in layers_of(model))
    assert model.get_nb_trainable_parameters()[0] == expected == sum(p.numel() for p in learns)
    optimizer = torch.optim.Adam(learns, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert same(bits(model), before)
    summary = model.base_model.mode_summary()
    assert re.fullmatch(r"DiaBlo 'default': 6 layers additive \(the base weight is quantised \(.*\)\)", summary)


@every_quantiser
def test_gradient_is_that_of_the_dequantised_model(quantiser, adapt):
    layer = layers_of(adapt(quantiser))[-1].train()
    x, g = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    x.requires_grad_()
    layer(x).backward(g)
    weight = effective(layer.base_layer.train()) + layer.get_delta_weight("default")
    torch.testing.assert_close(x.grad.double(), g.double() @ weight, rtol=1e-3, atol=1e-3)
    blocks, _ = layer.diablo_layout["default"].views(x.detach().T @ g)
    torch.testing.assert_close(layer.diablo_blocks["default"].grad, blocks)


@every_quantiser
def test_merged_mode_is_refused_with_the_reason(quantiser, load):
    model = load(quantiser)
    expected = output(model)
    message = r"q_proj: mode 'merged' is not valid here: the base weight is quantised \((torchao|bnb .bit)\)"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, DiaBloConfig(num_blocks=6, target_modules=TARGETS, mode="merged"))
    assert not layers_of(model)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_quantiser
def test_the_warning_says_the_error_that_the_layer_computes_with(quantiser, dtype, evaluated, adapt):
    model = adapt(quantiser, dtype)
    randomise(model, std=0.1)
    for layer in layers_of(model):
        # bitsandbytes computes in another way, with other numbers, once a layer was evaluated on some CPUs
        base = layer.base_layer.train(not evaluated)
        before, delta = effective(base, dtype), layer.get_delta_weight("default").double()
        with pytest.warns(UserWarning, match="merging 'default' into a quantised weight") as caught:
            layer.merge()
        lost = (effective(base, dtype) - (before + delta)).norm() / delta.norm()
        said = float(re.search(r"by ([\d.]+)% of its norm", str(caught[0].message)).group(1))
        assert said == pytest.approx(100 * float(lost), abs=0.7)
        assert 0 < said < 80


@every_quantiser
def test_unmerging_gives_back_every_bit_whatever_was_computed_in_between(quantiser, adapt):
    model = adapt(quantiser)
    model.add_adapter("second", DiaBloConfig(num_blocks=4, target_modules=["q_proj"], init_weights=False))
    changed = output(model)
    before = bits(model)
    for _ in range(2):
        quietly(model.merge_adapter)
        output(model)
        quietly(model.merge_adapter, adapter_names=["second"])
        merged = output(model)
        assert not torch.equal(merged, changed)
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        assert same(bits(model), before)
        assert torch.equal(output(model), changed)
        assert torch.equal(output(twin), merged)
        twin.unmerge_adapter()
        assert torch.equal(output(twin), changed)
    assert same(bits(model), before)


@every_quantiser
def test_a_layer_that_was_never_evaluated_is_unmerged_exactly_too(quantiser, adapt):
    model = adapt(quantiser).train()
    before = bits(model)
    parameters = list(model.state_dict())
    quietly(model.merge_adapter)
    model.unmerge_adapter()
    assert same(bits(model), before)
    assert list(model.state_dict()) == parameters
    model.to("cpu")  # an 8-bit or 4-bit weight that took itself for a plain one would be quantised here
    assert same(bits(model), before)


@pytest.mark.parametrize("when", ["before", "half-way", "after"])
@every_quantiser
def test_an_interrupted_merge_leaves_no_trace(quantiser, when, adapt, monkeypatch):
    model = adapt(quantiser)
    changed, before = output(model), bits(model)
    layer = layers_of(model)[0]
    write = layer.quantization_backend.set_base_weight

    def interrupted(*args):
        if when == "half-way":
            del layer.base_layer.weight
        elif when == "after":
            write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.quantization_backend, "set_base_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    monkeypatch.undo()
    assert not layer.merged
    assert same(bits(model), before)
    assert torch.equal(output(model), changed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_quantiser
def test_what_is_not_finite_is_refused_and_harms_nothing(quantiser, bad, adapt):
    model = adapt(quantiser)
    output(model)
    before = bits(model)
    with torch.no_grad():
        layers_of(model)[-1].diablo_blocks["default"][0, 0, 0] = bad
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
            action()
        assert same(bits(model), before)


def test_what_float16_cannot_hold_is_refused_where_the_quantiser_starts_from_it(adapt):
    model = adapt("bitsandbytes int8")
    before = bits(model)
    with torch.no_grad():
        layers_of(model)[-1].diablo_blocks["default"].fill_(1e5)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter()
    assert same(bits(model), before)


@every_quantiser
def test_an_adapter_of_zeros_merges_without_rounding(quantiser, adapt):
    model = adapt(quantiser, init_weights=True)
    expected, before = output(model), bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model))
    assert same(bits(model), before)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)


@every_quantiser
def test_save_load_disable_and_merge_and_unload(quantiser, adapt, load, tmp_path):
    model = adapt(quantiser)
    randomise(model, std=0.3)  # as large as the weights, so that 4 bits hold most of it
    expected, changed = output(load(quantiser)), output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(quantiser), tmp_path)
    assert torch.equal(output(loaded), changed)
    with pytest.warns(UserWarning, match="rounds it again"):
        loaded.merge_adapter()
    merged = output(loaded)
    assert (merged - changed).norm() < 0.5 * (changed - expected).norm()
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), expected)
    # Another one: a state dict, which saving takes, changes 4-bit weights that bitsandbytes reordered on this CPU.
    another = PeftModel.from_pretrained(load(quantiser), tmp_path)
    output(another)
    plain = quietly(another.merge_and_unload)
    assert not layers_of(plain)
    assert torch.equal(output(plain), merged)


def test_what_is_kept_aside_follows_a_merged_layer_to_another_dtype(adapt):
    model, twin = adapt("torchao int4"), adapt("torchao int4")
    twin.load_state_dict(model.state_dict())
    quietly(model.merge_adapter)
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    twin.to(torch.bfloat16)
    assert same(bits(model), bits(twin))


def test_torchao_without_transformers_trains_and_says_why_it_cannot_be_merged():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra quant)")
    model = llama(**SIZES)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(model, DiaBloConfig(num_blocks=6, target_modules=TARGETS, init_weights=False))
    before = bits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.diablo_blocks["default"].grad.abs().max() > 0 for layer in layers_of(model))
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            TypeError, match="quantised by torchao: how it was quantised is only known of a model that"
        ):
            action()
    assert same(bits(model), before)


def test_a_recipe_by_names_cannot_quantise_one_layer_again(folder):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra quant)")
    recipe = quantization.FqnToConfig({"re:.*proj": quantization.Int8WeightOnlyConfig()})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(recipe))
    model = get_peft_model(model, DiaBloConfig(num_blocks=6, target_modules=TARGETS, init_weights=False)).eval()
    changed, before = output(model), bits(model)
    with pytest.raises(TypeError, match="torchao cannot quantise the merged weight again"):
        model.merge_adapter()
    assert same(bits(model), before)
    assert torch.equal(output(model), changed)


def test_a_directly_built_4_bit_layer():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.float32)
    with pytest.raises(TypeError, match="bnb 4bit cannot dequantise this weight"):  # quantised only when it is moved
        adapter_on(base).merge()
    layer = adapter_on(base.to("cpu")).train()
    raw, x = layer.base_layer.weight.data.clone(), torch.randn(3, 64)
    before = layer(x)
    with pytest.warns(UserWarning, match="rounds it again"):
        layer.merge()
    assert not torch.equal(layer.base_layer.weight.data, raw)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight.data, raw)
    assert torch.equal(layer(x), before)


def test_no_gradient_is_lost_in_silence_after_evaluating_4_bits_on_a_cpu(adapt):
    model = adapt("bitsandbytes nf4")
    output(model)
    if not is_reordered(layers_of(model)[0].base_layer):
        pytest.skip("bitsandbytes does not reorder weights for inference on this CPU")
    with pytest.raises(RuntimeError, match="load the model again to train it"):
        model.train()(input_ids=IDS, labels=IDS)


def adapter_on(base, **options):
    return DiaBloLinear(base, "default", 3, DiaBloConfig(num_blocks=3, init_weights=False, **options))


class Packed(nn.Linear):
    """A quantised layer that nobody knows."""

    def __init__(self):
        super().__init__(6, 9)
        self.weight = nn.Parameter(torch.randint(-128, 127, (9, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)


def test_unknown_quantised_layers_train_if_they_are_linear_and_are_not_merged():
    layer = adapter_on(Packed())
    weight = layer.base_layer.weight.clone()
    assert layer.mode("default") == ("additive", "the base layer is a Packed with a forward pass of its own")
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T)
    with pytest.raises(TypeError, match=r"Packed stores its weight as torch.int8, in a form that peft does not know"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)

    class Stranger(nn.Module):
        in_features, out_features = 6, 9

    with pytest.raises(TypeError, match="is of type Stranger; DiaBlo adapts"):
        adapter_on(Stranger())


def test_backends_that_peft_can_only_compute_with_are_not_merged(monkeypatch):
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("diablo_theory.tuner.quantised.resolve_quantization_backend", lambda *_, **__: backend)
    layer = adapter_on(Packed())
    assert layer.mode("default") == ("additive", "the base weight is quantised (gptq)")
    with pytest.raises(TypeError, match="weight quantised by gptq: peft cannot write such weights"):
        layer.merge()
