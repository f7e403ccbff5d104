import json
import time

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, LlavaConfig, T5Config

from diablo_theory.errors import ConfigError, ModelUnavailableError
from diablo_theory.finetune.planning.shapes import KNOWN, model_shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("LLaMA2-7B", 6_738_415_616),
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
        ("LLaMA3-8B", 8_030_261_248),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_the_known_models_have_their_published_sizes(name, parameters):
    shapes = model_shapes(name)
    assert shapes.parameters == parameters
    products = shapes.layers * shapes.layer_products
    norms = (2 * shapes.layers + 1) * shapes.hidden
    assert products + norms + shapes.embedding * (1 if shapes.tied else 2) == parameters
    assert KNOWN[name].source in shapes.source


def test_grouped_queries_make_keys_and_values_narrow():
    shapes = model_shapes("LLaMA3-8B")
    assert shapes.matrices["k_proj"] == shapes.matrices["v_proj"] == (4096, 1024)
    assert shapes.matrices["q_proj"] == (4096, 4096)
    assert (shapes.heads, shapes.kv_heads) == (32, 8)


@pytest.mark.parametrize(
    ("alias", "name"), [(alias, name) for name, known in KNOWN.items() for alias in known.aliases]
)
def test_hub_ids_of_known_models_need_no_network(alias, name):
    assert model_shapes(alias).parameters == model_shapes(name).parameters


def test_the_largest_takes_no_time():
    model_shapes("LLaMA2-7B")  # importing transformers is not what is measured
    model_shapes.__globals__["_meta"].cache_clear()
    started = time.perf_counter()
    model_shapes("LLaMA-13B")
    assert time.perf_counter() - started < 3


def test_a_local_folder_is_read_without_its_weights(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    shapes = model_shapes(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shapes.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert (shapes.layers, shapes.heads, shapes.kv_heads, shapes.head_dim, shapes.tied) == (2, 6, 2, 6, True)
    assert (shapes.source, shapes.vocab) == ("local folder", loaded.config.vocab_size)
    assert all(parameter.is_meta for parameter in shapes.network.parameters())


def test_unknown_names_name_the_nearest():
    with pytest.raises(ConfigError, match=r"neither a known name.*Did you mean 'LLaMA3-8B'"):
        model_shapes("LLaMA3-8b")


def test_a_model_of_another_build_is_refused(tmp_path):
    GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\(gpt2\) is not built like Llama: 1 equal layers with one q_proj each"):
        model_shapes(str(tmp_path))


@pytest.mark.parametrize(("config", "kind"), [(T5Config, "t5"), (LlavaConfig, "llava")])
def test_a_model_that_is_no_causal_language_model_is_refused(config, kind, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"\({kind}\) is no causal language model built like Llama: ."):
        model_shapes(str(tmp_path))


def test_a_broken_configuration_is_said_to_be_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(ModelUnavailableError, match=r"the configuration of .* cannot be read: .*hidden_size"):
        model_shapes(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelUnavailableError, match=r"the configuration of .* cannot be read"):
        model_shapes(str(tmp_path))
