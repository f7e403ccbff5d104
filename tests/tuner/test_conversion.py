"""DiaBlo to LoRA, where the best of its rank is expected, and SHiRA to DiaBlo, where every bit is."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import delta, random_blocks
from networks import IDS, KINDS, Net, adapted_model, gpt2, llama, llama_classifier, output
from peft import PeftModel, ShiraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora
from test_blocks import entry_mask, layouts
from test_injection import fingerprint, same
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner import DiaBloConfig, conversion, from_shira, save_adapter, to_lora
from diablo_theory.tuner.targets import diablo_layers


def products(state):
    """Layer to B A."""
    names = {key.rpartition(".lora_")[0] for key in state if ".lora_" in key}
    return {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names}


@given(layouts(), st.integers(1, 20), st.integers(0, 3))
def test_factors_are_the_best_of_their_rank(layout, rank, seed):
    D = torch.block_diag(*random_blocks(layout, torch.float64, seed))[: layout.in_features, : layout.out_features]
    rank = min(rank, *D.shape)
    (a, b), values = conversion.block_svd(layout, *layout.gather(D), rank)
    exact = torch.linalg.svdvals(D)
    assert a.shape == (rank, layout.in_features)
    padded = torch.zeros(max(len(exact), len(values)), dtype=torch.float64)
    torch.testing.assert_close(padded.index_copy(0, torch.arange(len(values)), values)[: len(exact)], exact)
    torch.testing.assert_close(torch.linalg.matrix_norm(D - (b @ a).T), exact[rank:].norm(), atol=1e-12, rtol=1e-9)
    gram = a @ a.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal().round()))


@pytest.mark.parametrize("rank", [1, 3, 24, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["decoder", "conv1d", "encoder-decoder", "classifier"])
def test_the_same_as_peft_for_fewer_operations(kind, rank):
    build, targets, task, _ = KINDS[kind]
    rank = min(rank, 12) if kind in ("decoder", "classifier") else rank
    model = adapted_model(build, target_modules=targets, task_type=task)
    before = fingerprint(model)
    config, state, table = to_lora(model, rank)
    assert same(fingerprint(model), before)
    theirs_config, theirs = convert_to_lora(model, rank)
    assert set(state) == set(theirs)
    ours = products(state)
    for name, product in products(theirs).items():
        torch.testing.assert_close(ours[name], product, rtol=1e-4, atol=1e-5)
    if rank != 1.0:  # all of the energy is a matter of rounding
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.items()}
    assert config.modules_to_save == theirs_config.modules_to_save
    assert config.task_type == task
    assert len(table) == len(ours)


def test_the_table_says_what_is_lost():
    model = adapted_model()
    _, state, table = to_lora(model, 3)
    ours = products(state)
    for row in table.itertuples():
        D = delta(model, row.layer).double()
        layout = diablo_layers(model, "default")[row.layer].diablo_layout["default"]
        assert (row.in_features, row.out_features, row.num_blocks) == (*D.shape, 5)
        assert (row.rank, row.rank_of_D) == (3, torch.linalg.matrix_rank(D))
        lost = float((D - ours[f"base_model.model.{row.layer}"].T).norm() / D.norm())
        assert row.relative_error == pytest.approx(lost, rel=1e-4)
        assert row.energy_kept == pytest.approx(1 - lost**2, rel=1e-4)
        assert (row.diablo_parameters, row.lora_parameters) == (layout.num_parameters, 3 * sum(D.shape))
    _, _, half = to_lora(model, 0.5)
    assert (half["energy_kept"] >= 0.5).all()
    _, _, fewer = to_lora(model, 1)
    assert ((fewer["energy_kept"] < 0.5) | (half["rank"] == 1)).all()
    zero = get_peft_model(llama(), DiaBloConfig(num_blocks=5))
    _, state, table = to_lora(zero, 0.9)
    assert not any(product.any() for product in products(state).values())
    assert list(table[["rank", "rank_of_D", "relative_error", "energy_kept"]].iloc[0]) == [1, 0, 0.0, 1.0]


@pytest.mark.parametrize("rank", [2, 0.6])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_outputs_are_those_of_the_base_plus_the_low_rank_part(build, rank, tmp_path):
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn", "c_proj"]
    model = adapted_model(build, target_modules=targets)
    config, state, _ = to_lora(model, rank)
    by_hand = build()
    for name, product in products(state).items():
        layer = by_hand.get_submodule(name.removeprefix("base_model.model."))
        layer.weight.data += product if isinstance(layer, nn.Linear) else product.T
    save_adapter(tmp_path / "lora", config, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    torch.testing.assert_close(output(loaded), output(by_hand), rtol=1e-4, atol=1e-4)
    assert (output(loaded) - output(build())).abs().max() > 1e-2
    config, state, table = to_lora(model, 1.0)
    assert (table["relative_error"] < 1e-5).all()
    exact = get_peft_model(build(), config).eval()
    set_peft_model_state_dict(exact, state)
    torch.testing.assert_close(output(exact), output(model), rtol=1e-3, atol=1e-3)


def test_peft_alone_loads_the_converted_folder(tmp_path):
    model = adapted_model(llama_classifier, task_type="SEQ_CLS", target_modules=["q_proj"])
    with torch.no_grad():
        model.get_submodule("base_model.model.score.modules_to_save.default").weight.normal_()
    save_adapter(tmp_path / "lora", *to_lora(model, 6)[:2])
    llama_classifier().save_pretrained(tmp_path / "base")
    code = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForSequenceClassification as Auto, PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Base\n"
        f"base = Base.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'lora')!r}).eval()\n"
        f"torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, {str(tmp_path / 'out.pt')!r})\n"
        "assert not any(name.startswith('diablo_theory') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = output(model)
    table = to_lora(model, 6)[2]
    assert (table["rank_of_D"] > 6).all()
    assert (out - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize(
    ("rank", "kind", "message"),
    [
        (0, ValueError, "rank must be at least 1, got 0"),
        (-2, ValueError, "rank must be at least 1, got -2"),
        (0.0, ValueError, "rank as a float is a share of energy and must be above 0 and at most 1, got 0.0"),
        (1.5, ValueError, "share of energy .* got 1.5"),
        (float("nan"), ValueError, "share of energy .* got nan"),
        (True, TypeError, "rank must be an integer or a float, got True of type bool"),
        ("4", TypeError, "rank must be an integer or a float, got '4' of type str"),
        (13, ValueError, r"rank must be at most 12 for model.layers.0.self_attn.k_proj \(36 x 12\), got 13"),
    ],
)
def test_bad_ranks_are_named(rank, kind, message):
    with pytest.raises(kind, match=message):
        to_lora(adapted_model(target_modules=["k_proj"]), rank)


def test_adapters_that_no_lora_equals_are_refused():
    with pytest.raises(ValueError, match=r"bias must be 'none' .*; adapter 'default' has 'all'"):
        to_lora(adapted_model(bias="all"), 2)
    with pytest.raises(ValueError, match=r"must name a DiaBlo adapter of the model \('default'\), got 'x'"):
        to_lora(adapted_model(), 2, "x")
    model = adapted_model(target_modules=["q_proj"])
    diablo_layers(model, "default")["model.layers.1.self_attn.q_proj"].diablo_tail["default"].data[:] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: adapter 'default' has entries that are not fin"):
        to_lora(model, 2)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    config, state, _ = to_lora(adapted_model(), 2)
    (tmp_path / "kept.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(ValueError, match=r"folder must be new or empty, got .*, which is there already"):
            save_adapter(place, config, state)
    assert (tmp_path / "kept.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_adapter(tmp_path / "empty", config, state)
    assert {file.name for file in (tmp_path / "empty").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def block_mask(num_blocks, share=1.0):
    """A SHiRA mask inside the diagonal blocks, with as many entries as peft asks for."""

    def mask(base_layer, r, **_):
        m2, m1 = base_layer.weight.shape
        places = entry_mask(BlockLayout(m1, m2, num_blocks)).T.flatten().nonzero().flatten()
        chosen = places[torch.randperm(len(places))[: r * (m1 + m2)]]
        return torch.zeros(m1 * m2).index_fill_(0, chosen, 1.0).view(m2, m1)

    return mask


def shira(build, targets, mask=None, r=1, **options):
    torch.manual_seed(2)
    config = ShiraConfig(r=r, target_modules=targets, init_weights=False, **options)
    if mask is not None:
        config.mask_fn = mask
    return get_peft_model(build(), config).eval()


def converted(build, conversion_, tmp_path):
    save_adapter(tmp_path / "diablo", *conversion_)
    return PeftModel.from_pretrained(build(), tmp_path / "diablo").eval()


@pytest.mark.parametrize("num_blocks", [2, 4, 5])
def test_a_block_diagonal_shira_becomes_the_same_diablo_bit_for_bit(num_blocks, tmp_path):
    targets = ["q_proj", "k_proj", "down_proj"]
    model = shira(llama, targets, block_mask(num_blocks), r=2)
    before, expected = fingerprint(model), output(model)
    result = from_shira(model)
    assert same(fingerprint(model), before)
    ours = converted(llama, result, tmp_path)
    layers = diablo_layers(ours, "default")
    assert {name.rpartition(".")[2] for name in layers} == set(targets)
    for name, layer in layers.items():
        sparse = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert torch.equal(layer.get_delta_weight("default"), sparse.to_dense())
        assert (
            layer.diablo_layout["default"].num_parameters
            <= BlockLayout(layer.in_features, layer.out_features, num_blocks).num_parameters
        )
    torch.testing.assert_close(output(ours), expected, rtol=1e-4, atol=1e-4)
    given, _ = from_shira(model, num_blocks=num_blocks)
    assert (given.num_blocks, given.num_blocks_pattern) == (num_blocks, None)


def test_full_blocks_give_their_own_number_and_layers_may_differ(tmp_path):
    def full(base_layer, r, **_):
        m2, m1 = base_layer.weight.shape
        count = {12: 4, 8: 2}[m1]
        return torch.block_diag(*[torch.ones(m2 // count, m1 // count)] * count)

    def build():
        return Net(fc=(12, 24), deep__fc=(12, 24), out=(8, 8))

    # peft wants r (m1 + m2) entries: 72 = 2 * 36 and 32 = 2 * 16.
    model = shira(build, ["fc", "out"], full, r=2)
    config, state = from_shira(model)
    assert config.num_blocks == 4
    assert config.num_blocks_pattern == {"^out": 2}
    ours = converted(build, (config, state), tmp_path)
    assert {name: x.diablo_layout["default"].num_blocks for name, x in diablo_layers(ours, "default").items()} == {
        "fc": 4,
        "deep.fc": 4,
        "out": 2,
    }


def test_a_random_mask_is_refused_layer_by_layer():
    model = shira(lambda: Net(fc=(12, 18), out=(8, 8)), ["fc", "out"], random_seed=0)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="SHiRA adapter 'default' is no DiaBlo adapter") as caught:
        from_shira(model)
    for name, module in (("fc", model.base_model.model.fc), ("out", model.base_model.model.out)):
        out, into = module.shira_indices["default"]
        outside = {
            n: int((into // -(-module.in_features // n) != out // -(-module.out_features // n)).sum())
            for n in range(2, module.in_features + 1)
        }
        fewest = min(outside.values())
        line = next(line for line in str(caught.value).splitlines() if line.startswith(f"  {name}: "))
        assert line.startswith(f"  {name}: {fewest} of {out.shape[0]} selected entries lie outside for N=")
        assert line.endswith(", which fits best")
    with pytest.raises(
        ValueError, match=r"  out: \d+ of 16 selected entries lie outside for N=8; for N=\d, which fits"
    ):
        from_shira(model, num_blocks=8)
    whole, _ = from_shira(model, num_blocks=1)
    assert whole.num_blocks == 1
    assert same(fingerprint(model), before)


def test_the_mask_decides_and_not_the_values():
    model = shira(lambda: Net(fc=(12, 18)), ["fc"], random_seed=0)
    with torch.no_grad():
        model.base_model.model.fc.shira_weight["default"].zero_()
    with pytest.raises(ValueError, match="is no DiaBlo adapter"):
        from_shira(model)


def test_scaling_is_part_of_the_update_and_modules_saved_whole_go_along(tmp_path):
    def build():
        return Net(fc=(12, 18), head=(4, 4))

    model = shira(build, ["fc"], block_mask(3), modules_to_save=["head"])
    model.base_model.model.fc.set_scale("default", 0.3)
    expected = model.base_model.model.fc.get_delta_weight("default").to_dense()
    head = copy.deepcopy(model.base_model.model.head.modules_to_save["default"])
    ours = converted(build, from_shira(model), tmp_path)
    assert torch.equal(delta(ours, "fc"), expected.T)
    assert torch.equal(ours.base_model.model.head.modules_to_save["default"].weight, head.weight)


def test_what_is_no_shira_is_named():
    with pytest.raises(ValueError, match=r"must name a SHiRA adapter of the model \(it has none\), got 'default'"):
        from_shira(adapted_model())
    model = shira(lambda: Net(fc=(12, 18)), ["fc"], block_mask(3))
    with pytest.raises(ValueError, match=r"\('default'\), got 'other'"):
        from_shira(model, "other")
    with pytest.raises(ValueError, match="fc: num_blocks must be at most 18 for a 12 x 18 matrix, got 19"):
        from_shira(model, num_blocks=19)
    with pytest.raises(TypeError, match=r"num_blocks must be an integer, got 3.0"):
        from_shira(model, num_blocks=3.0)
    with torch.no_grad():
        model.base_model.model.fc.shira_weight["default"][0] = float("nan")
    with pytest.raises(ValueError, match="fc: SHiRA adapter 'default' has entries that are not finite"):
        from_shira(model)
