"""The authors' files, adapter.chkpt: read, written, refused."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import delta, random_blocks
from networks import KINDS, Net, adapted_model, llama, output
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from test_blocks import layouts
from test_injection import fingerprint, same
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner import DiaBloConfig, chkpt, load_chkpt, save_chkpt
from diablo_theory.tuner.targets import diablo_layers

#: Integers of the same width, to compare bits.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def written(path, **entries):
    """An adapter.chkpt with these keys; two underscores stand for a dot."""
    torch.save({f"{name.replace('__', '.')}.block_A": value for name, value in entries.items()}, path)
    return path


@given(layouts(), st.sampled_from(list(BITS)))
def test_blocks_come_back_bit_for_bit_and_mean_what_the_authors_code_computes(tmp_path_factory, layout, dtype):
    folder = tmp_path_factory.mktemp("chkpt")
    whole = random_blocks(layout, dtype)
    whole[0, 0, 0] = -0.0
    written(folder / "in.chkpt", net__fc=whole)
    plain = Net(net__fc=(layout.in_features, layout.out_features))
    model = load_chkpt(plain, folder / "in.chkpt")
    # Their forward pass: inputs padded with zeros, a product for each block, outputs cut.
    D = torch.block_diag(*whole)[: layout.in_features, : layout.out_features]
    assert torch.equal(delta(model, "net.fc"), D)
    save_chkpt(model, folder / "out.chkpt")
    (key, back), *rest = torch.load(folder / "out.chkpt", weights_only=True).items()
    assert (key, rest) == ("net.fc.block_A", [])
    assert back.dtype == dtype
    assert torch.equal(back.view(BITS[dtype]), whole.view(BITS[dtype]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_round_trip_gives_the_same_outputs(kind, tmp_path):
    build, targets, task, inputs = KINDS[kind]
    model = adapted_model(build, target_modules=targets)
    expected = output(model, inputs)
    save_chkpt(model, tmp_path / "adapter.chkpt")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.chkpt"]
    task = None if task == "SEQ_CLS" else task  # for which peft would train the head, too
    again = load_chkpt(build(), tmp_path / "adapter.chkpt", "other", task_type=task).eval()
    assert isinstance(again, PeftModel)
    assert again.peft_config["other"].task_type == task
    assert set(again.state_dict()) == {key.replace(".default", ".other") for key in model.state_dict()}
    assert torch.equal(output(again, inputs), expected)
    save_chkpt(again, tmp_path / "again.chkpt", "other")
    assert (tmp_path / "again.chkpt").read_bytes() == (tmp_path / "adapter.chkpt").read_bytes()


def test_other_numbers_of_blocks_for_some_modules_and_names_that_contain_each_other(tmp_path):
    sizes = {"fc": (12, 18), "deep__fc": (13, 7), "deep__out": (6, 6), "out": (6, 6)}
    layouts = {"fc": BlockLayout(12, 18, 6), "deep__out": BlockLayout(6, 6, 2), "out": BlockLayout(6, 6, 6)}
    entries = {name: random_blocks(layout) for name, layout in layouts.items()}
    model = load_chkpt(Net(**sizes), written(tmp_path / "a.chkpt", **entries))
    layers = diablo_layers(model, "default")
    assert {name.replace(".", "__"): layer.diablo_layout["default"] for name, layer in layers.items()} == layouts
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(Net(**sizes), tmp_path / "saved")
    for name, whole in entries.items():
        layout = layouts[name]
        D = torch.block_diag(*whole)[: layout.in_features, : layout.out_features]
        assert torch.equal(delta(again, name.replace("__", ".")), D)
    with pytest.raises(ValueError, match="num_blocks cannot be given: the file decides it"):
        load_chkpt(Net(**sizes), tmp_path / "a.chkpt", num_blocks=3)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.", "module.", "module.base_model.model.model."])
def test_prefixes_do_no_harm(prefix, tmp_path):
    whole = random_blocks(BlockLayout(6, 4, 2))
    torch.save({f"{prefix}h.0.fc.block_A": whole}, tmp_path / "a.chkpt")
    assert torch.equal(
        delta(load_chkpt(Net(h__0__fc=(6, 4)), tmp_path / "a.chkpt"), "h.0.fc"), torch.block_diag(*whole)
    )
    if prefix != "module.":
        inner = Net(model__h__0__fc=(6, 4), fc=(6, 4))  # the longest of the names that fit
        assert torch.equal(delta(load_chkpt(inner, tmp_path / "a.chkpt"), "model.h.0.fc"), torch.block_diag(*whole))


def test_an_adapter_that_exists_is_filled_and_keeps_its_dtype(tmp_path):
    path, other = tmp_path / "a.chkpt", tmp_path / "b.chkpt"
    save_chkpt(adapted_model(), path)
    model = adapted_model()
    model.add_adapter("second", DiaBloConfig(num_blocks=5, adapter_dtype="bfloat16"))
    expected = get_peft_model_state_dict(model)
    assert load_chkpt(model, path, "second") is model
    second = get_peft_model_state_dict(model, adapter_name="second")
    assert all(torch.equal(second[key], value.bfloat16()) for key, value in expected.items())
    third = load_chkpt(model, path, "third")
    assert third is model
    assert all(
        torch.equal(value, expected[key])
        for key, value in get_peft_model_state_dict(model, adapter_name="third").items()
    )
    injected = inject_adapter_in_model(DiaBloConfig(num_blocks=5), llama())
    assert load_chkpt(injected, path) is injected
    save_chkpt(injected, other)
    assert other.read_bytes() == path.read_bytes()


def test_entries_outside_the_matrix_are_dropped_with_a_warning(tmp_path):
    layout = BlockLayout(10, 7, 4)  # the last block is cut on both sides
    whole = random_blocks(layout)
    odd = whole.clone()
    odd[3, 2, 1] = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = delta(load_chkpt(Net(fc=(10, 7)), written(tmp_path / "a.chkpt", fc=whole)), "fc")
    with pytest.warns(UserWarning, match=r"b.chkpt: 1 entries outside the matrices are not zero; they never had an"):
        model = load_chkpt(Net(fc=(10, 7)), written(tmp_path / "b.chkpt", fc=odd))
    assert torch.equal(delta(model, "fc"), expected)
    save_chkpt(model, tmp_path / "c.chkpt")
    assert torch.equal(torch.load(tmp_path / "c.chkpt", weights_only=True)["fc.block_A"], whole)


GOOD = random_blocks(BlockLayout(12, 18, 6))
NAN = GOOD.clone().index_fill_(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([GOOD], "must hold a dictionary of tensors named '....block_A', got a list"),
        ({}, "must hold a dictionary of tensors named '....block_A', got an empty dictionary"),
        ({"fc.weight": GOOD}, "unknown key 'fc.weight'; every key must end in '.block_A'"),
        ({"fcblock_A": GOOD}, "unknown key 'fcblock_A'"),
        ({3: GOOD}, "unknown key 3"),
        ({"fc.block_A": 1.0}, r"'fc.block_A' must be a tensor of shape \(blocks, inputs, outputs\), got a float"),
        ({"fc.block_A": GOOD[0]}, r"'fc.block_A' must be a tensor of shape .*, got one of shape \(2, 3\)"),
        ({"fc.block_A": GOOD.to_sparse()}, "'fc.block_A' must be a tensor of shape .*sparse"),
        ({"fc.block_A": GOOD.to("meta")}, "'fc.block_A' must be a tensor of shape .*meta"),
        ({"fc.block_A": GOOD.int()}, "'fc.block_A' must be one of float64, float32, .*, got torch.int32"),
        ({"fc.block_A": GOOD + 1j}, "'fc.block_A' must be one of float64, .*, got torch.complex64"),
        ({"fc.block_A": NAN}, "'fc.block_A' has entries that are not finite; every entry must be"),
        ({"fd.block_A": GOOD}, "'fd.block_A' names no module that could take it. Did you mean 'fc'?"),
        ({"xfc.block_A": GOOD}, "'xfc.block_A' names no module that could take it"),
        ({"a.fc.block_A": GOOD, "b.fc.block_A": GOOD}, "'a.fc.block_A' and 'b.fc.block_A' both mean the module fc"),
        ({"q.block_A": GOOD}, "'q.block_A' could mean one.q or two.q: it must name one module"),
        ({"fc.block_A": GOOD.mT}, r"has shape \(6, 3, 2\); N=6 blocks of the 12 x 18 matrix of fc need \(6, 2, 3\)"),
        ({"fc.block_A": GOOD[:5]}, r"'fc.block_A' has shape \(5, 2, 3\); N=5 blocks .* need \(5, 3, 4\)"),
        ({"fc.block_A": GOOD[:0]}, r"'fc.block_A' has shape \(0, 2, 3\): num_blocks must be at least 1, got 0"),
        ({"fc.block_A": torch.zeros(19, 1, 1)}, "num_blocks must be at most 18 for a 12 x 18 matrix, got 19"),
        ({"fc.block_A": GOOD, "norm.block_A": GOOD}, "'norm.block_A' names no module"),
        ({"fc.block_A": GOOD, "one.q.block_A": object()}, "is truncated, is not a file of torch.save, or holds more"),
    ],
)
def test_bad_content_is_named_and_the_model_is_as_before(state, message, tmp_path):
    model = Net(fc=(12, 18), one__q=(12, 18), two__q=(12, 18))
    model.norm = nn.LayerNorm(12)
    torch.save(state, tmp_path / "a.chkpt")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_chkpt(model, tmp_path / "a.chkpt")
    assert str(tmp_path / "a.chkpt") in str(caught.value)
    assert same(fingerprint(model), before)


def test_damaged_files_and_files_that_run_code_are_refused(tmp_path):
    path = written(tmp_path / "a.chkpt", fc=GOOD)
    whole = path.read_bytes()
    for content in (b"", b"text\n", whole[:40], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.chkpt is truncated, is not a file of torch.save, or holds more"):
            load_chkpt(Net(fc=(12, 18)), path)
    torch.save(Net(fc=(12, 18)), path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_chkpt(Net(fc=(12, 18)), path)
    with pytest.raises(FileNotFoundError, match=r"none.chkpt"):
        load_chkpt(Net(fc=(12, 18)), tmp_path / "none.chkpt")


def test_a_file_that_does_not_fit_the_adapter_leaves_it_as_it_was(tmp_path):
    model = get_peft_model(
        Net(fc=(12, 18), out=(6, 6)),
        DiaBloConfig(num_blocks=6, target_modules=["fc", "out"], adapter_dtype="float16", init_weights=False),
    )
    out, before = random_blocks(BlockLayout(6, 6, 6)), fingerprint(model)
    for entries, message in (
        ({"fc": GOOD}, "holds nothing for 1 of the 2 layers .* such as out: 'out.block_A' is needed"),
        ({"fc": GOOD, "out": out, "fd": out}, "'fd.block_A' names no module"),
        ({"fc": GOOD, "out": random_blocks(BlockLayout(6, 6, 3))}, r"shape \(3, 2, 2\); N=6 .* need \(6, 1, 1\)"),
        ({"fc": GOOD, "out": 1e9 * out}, "the blocks of out have entries too large for the adapter's torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            load_chkpt(model, written(tmp_path / "a.chkpt", **entries))
        assert same(fingerprint(model), before)
    good = written(tmp_path / "a.chkpt", fc=GOOD, out=out)
    with pytest.raises(ValueError, match="mode: only for a new adapter, and the model has an 'default'"):
        load_chkpt(model, good, mode="merged")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into fc.weight: unmerge it first"):
        load_chkpt(model, good)
    with pytest.raises(ValueError, match=r"too large for the adapter's torch.float16"):
        load_chkpt(Net(fc=(12, 18)), written(tmp_path / "a.chkpt", fc=1e9 * GOOD), adapter_dtype="float16")


def test_a_target_that_cannot_be_adapted_leaves_the_model_as_it_was(tmp_path):
    model = Net(fc=(12, 18), twin=(12, 18))
    model.twin.weight = model.fc.weight
    before = fingerprint(model)
    with pytest.raises(ValueError, match="fc: its weight is tied to"):
        load_chkpt(model, written(tmp_path / "a.chkpt", fc=GOOD))
    assert same(fingerprint(model), before)
    lora = get_peft_model(Net(fc=(12, 18)), LoraConfig(target_modules=["fc"]))
    before = fingerprint(lora)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        load_chkpt(lora, tmp_path / "a.chkpt", "other")
    assert same(fingerprint(lora), before)


def test_what_the_format_cannot_hold_is_not_written(tmp_path):
    path = tmp_path / "a.chkpt"
    path.write_text("before")
    for options, message in (
        ({"bias": "all"}, "holds blocks only, and adapter 'default' has bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            save_chkpt(adapted_model(**options), path)
    model = adapted_model()
    with pytest.raises(
        ValueError, match=r"adapter_name must name a DiaBlo adapter of the model \('default'\), got 'x'"
    ):
        save_chkpt(model, path, "x")
    with pytest.raises(ValueError, match=r"\(it has none\), got 'default'"):
        save_chkpt(llama(), path)
    name, layer = next(iter(diablo_layers(model, "default").items()))
    layer.diablo_blocks["default"].data[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{name}: adapter 'default' has entries that are not finite"):
        save_chkpt(model, path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.chkpt"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.chkpt"
    path.write_text("before")

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(chkpt.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_chkpt(adapted_model(), path)
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
