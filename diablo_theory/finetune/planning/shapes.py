"""The true shapes of a causal language model, without its weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from diablo_theory.errors import ConfigError, ModelUnavailableError, brief, nearest

#: The matrices of one decoder layer, in the order in which a forward pass meets them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MATRICES = ATTENTION + MLP


@dataclass(frozen=True)
class Known:
    """What a published configuration says, and where.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the gated MLP.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocab: Rows of the embedding.
        tied: The output matrix is the embedding.
        max_positions: Longest context.
        source: Where these numbers stand.
        aliases: Hub ids of the same shapes.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    max_positions: int
    source: str
    aliases: tuple[str, ...]

    def config(self) -> Any:
        """The configuration of these shapes that transformers reads."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.max_positions,
        )


_LLAMA_1 = "arXiv 2302.13971, Table 2; config.json of huggyllama/"
_SMOL = "HuggingFaceTB/SmolLM2-135M"

#: The paper's models, and the small one that this project carries.
KNOWN: dict[str, Known] = {
    "LLaMA2-7B": Known(
        4096, 11_008, 32, 32, 32, 32_000, False, 4096,
        "arXiv 2307.09288; config.json of meta-llama/Llama-2-7b-hf",
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-hf"),
    ),
    "LLaMA3-8B": Known(
        4096, 14_336, 32, 32, 8, 128_256, False, 8192,
        "arXiv 2407.21783, Table 3; config.json of meta-llama/Meta-Llama-3-8B",
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ),
    "LLaMA-7B": Known(
        4096, 11_008, 32, 32, 32, 32_000, False, 2048, f"{_LLAMA_1}llama-7b", ("huggyllama/llama-7b",)
    ),
    "LLaMA-13B": Known(
        5120, 13_824, 40, 40, 40, 32_000, False, 2048, f"{_LLAMA_1}llama-13b", ("huggyllama/llama-13b",)
    ),
    "SmolLM2-135M": Known(
        576, 1536, 30, 9, 3, 49_152, True, 8192,
        f"config.json of {_SMOL}",
        ("SmolLM2-135M-Instruct", _SMOL, f"{_SMOL}-Instruct"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """A model built like Llama: equal decoder layers of seven matrices, RMS norms, rotary positions.

    Attributes:
        name: As asked for.
        source: Where the shapes were read.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the gated MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Rows of the embedding.
        max_positions: Longest context.
        tied: The output matrix is the embedding.
        parameters: All parameters, shared ones once.
        matrices: Name of each matrix of a layer to (inputs, outputs).
        network: The model on the meta device: shapes and names, no numbers.
    """

    name: str
    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    parameters: int
    matrices: dict[str, tuple[int, int]] = field(hash=False)
    network: nn.Module = field(repr=False, compare=False)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which multiply nothing."""
        return self.vocab * self.hidden

    @property
    def layer_products(self) -> int:
        """Entries of one layer's matrices: multiplications for one token."""
        return sum(m1 * m2 for m1, m2 in self.matrices.values())


def model_shapes(name_or_path: str) -> Shapes:
    """The shapes of a causal language model; nothing but a configuration is read.

    Args:
        name_or_path: A name in :data:`KNOWN` or one of its aliases (no network), a local folder in transformers'
            layout, or a hub id with a slash.

    Raises:
        ConfigError: If the name is unknown, or the model is not built like Llama.
        ModelUnavailableError: If the configuration is not to be had.
    """
    if (name := _known(name_or_path)) is not None:
        return _from_config(name_or_path, KNOWN[name].source, KNOWN[name].config())
    folder = Path(name_or_path)
    if not folder.is_dir() and (name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~"))):
        raise ConfigError(
            f"model {name_or_path!r} is neither a known name, nor a local folder, nor a hub id."
            + nearest(name_or_path, _names())
        )
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # a damaged file: transformers lets through what its parts say
        raise ModelUnavailableError(f"the configuration of {name_or_path!r} cannot be read: {brief(error)}") from error
    try:
        return _from_config(name_or_path, "local folder" if folder.is_dir() else "hub", config)
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # no such class, or other keys than Llama's
        said = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name_or_path!r} ({config.model_type}) is no causal language model built like Llama: {said}"
        ) from error


def _names() -> list[str]:
    return [*KNOWN, *(alias for known in KNOWN.values() for alias in known.aliases)]


def _known(name: str) -> str | None:
    return next((known for known, values in KNOWN.items() if name == known or name in values.aliases), None)


def _from_config(name: str, source: str, config: Any) -> Shapes:
    network = _meta(config.to_json_string(use_diff=False))
    layers = int(config.num_hidden_layers)
    matrices = _matrices(name, network, layers, str(config.model_type))
    hidden = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    return Shapes(
        name=name,
        source=source,
        layers=layers,
        hidden=hidden,
        intermediate=matrices["gate_proj"][1],
        heads=heads,
        kv_heads=matrices["k_proj"][1] // head_dim,
        head_dim=head_dim,
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        tied=bool(config.tie_word_embeddings),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        matrices=matrices,
        network=network,
    )


@functools.lru_cache(maxsize=8)
def _meta(config_json: str) -> nn.Module:
    values = json.loads(config_json)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        network: nn.Module = AutoModelForCausalLM.from_config(config)
    return network


def _matrices(name: str, network: nn.Module, layers: int, kind: str) -> dict[str, tuple[int, int]]:
    found: dict[str, list[tuple[int, int]]] = {matrix: [] for matrix in MATRICES}
    for full_name, module in network.named_modules():
        matrix = full_name.rpartition(".")[2]
        if matrix in found and isinstance(module, nn.Linear):
            found[matrix].append((module.in_features, module.out_features))
    for matrix, sizes in found.items():
        if len(sizes) != layers or len(set(sizes)) != 1:
            raise ConfigError(
                f"model {name!r} ({kind}) is not built like Llama: {layers} equal layers with one {matrix} each are "
                f"expected, found {len(sizes)} of {len(set(sizes))} sizes. Its cost cannot be computed here"
            )
    return {matrix: sizes[0] for matrix, sizes in found.items()}
