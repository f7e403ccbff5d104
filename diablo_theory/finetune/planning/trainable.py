"""What a method trains on given shapes, counted truly and as papers quote it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from diablo_theory import methods
from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.shapes import MATRICES, Shapes
from diablo_theory.finetune.planning.work import Work

#: LoRA's own step: these differ in start, scale or learning rate.
LORAS = ("lora", "rslora", "pissa", "olora", "lora-ga", "eva", "corda", "lora-plus")
#: Methods that train the targets' own weights.
WHOLE = ("full", "galore")
#: Methods whose products are derived from their code; others are counted by their parameters.
DERIVED = ("none", "full", "diablo", "diablo-additive", "lora-fa", "dora", "miss", *LORAS)
#: Methods whose peak memory the tests hold to 15% of a measured one; for others it is a rough figure.
DERIVED_MEMORY = ("none", "full", "diablo", "diablo-additive", *LORAS)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """One adapted matrix: its layer, its short name, its inputs and outputs, what it trains."""

    layer: int
    name: str
    m1: int
    m2: int
    parameters: int


@dataclass(frozen=True)
class Trained:
    """A method at its budget on a model.

    Attributes:
        method: Its name.
        label: With its knob, as in tables.
        knob: N, a rank, or 0 where there is none.
        targets: The adapted matrices.
        parameters: Trainable entries, counted on the true shapes.
        percent: Of the base model's parameters, adapters excluded.
        quoted_parameters: The same with key and value matrices counted as wide as the query's. The paper's
            percentages for LLaMA3-8B are these; with as many key as query heads the two agree.
        quoted_percent: Of the base model's parameters.
        additive: DiaBlo as a product of its own beside the frozen one, not inside it.
        moments: Entries of each of AdamW's two moments: the trainable ones, but for GaLore.
    """

    method: str
    label: str
    knob: int
    targets: tuple[Target, ...]
    parameters: int
    percent: float
    quoted_parameters: int
    quoted_percent: float
    additive: bool
    moments: int

    @property
    def is_inside(self) -> bool:
        """The update lies in the weights themselves, so the model's own products compute it."""
        return self.method in WHOLE or (self.method == "diablo" and not self.additive)

    @property
    def is_derived(self) -> bool:
        """Products and saved tensors follow from the method's code; otherwise they are a lower bound."""
        return self.method in DERIVED

    @property
    def memory_is_derived(self) -> bool:
        """The peak was checked against measured ones."""
        return self.method in DERIVED_MEMORY

    def of_layer(self, layer: int) -> dict[str, Target]:
        """The adapted matrices of one layer by short name."""
        return {target.name: target for target in self.targets if target.layer == layer}


def trained(shapes: Shapes, work: Work) -> Trained:
    """What the work's method trains.

    Raises:
        ConfigError: If a target matches nothing or is no matrix of a decoder layer, N or the rank does not fit, or
            an option does not go with the method: what a run refuses too.
    """
    try:
        layers = methods.target_layers(shapes.network, work.target_modules)
        methods.check_options(work.method, dropout=work.dropout)
        knob = methods.knob_of(work.method, layers, work.num_blocks, work.rank) or 0
        found = [_target(work, knob, name, layer) for name, layer in layers.items()]
        quoted = sum(_count(work, knob, *_quoted_size(shapes, target)) for target in found)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    parameters = sum(target.parameters for target in found)
    return Trained(
        method=work.method,
        label=methods.label_of(work.method, knob),
        knob=knob,
        targets=tuple(found) if work.method != "none" else (),
        parameters=parameters,
        percent=100 * parameters / shapes.parameters,
        quoted_parameters=quoted,
        quoted_percent=100 * quoted / shapes.parameters,
        additive=_is_additive(work),
        moments=sum(_family_count(work, knob, target.m1, target.m2) for target in found)
        if work.method == "galore"
        else parameters,
    )


def _is_additive(work: Work) -> bool:
    sharded = work.sharding == "fsdp" and work.devices > 1
    apart = work.dropout > 0 or sharded or work.stores_integers
    return work.method == "diablo-additive" or (work.method == "diablo" and apart)


def _count(work: Work, knob: int, m1: int, m2: int) -> int:
    if work.method == "none":
        return 0
    return m1 * m2 if work.method in WHOLE else _family_count(work, knob, m1, m2)


def _family_count(work: Work, knob: int, m1: int, m2: int) -> int:
    return methods.FAMILIES[work.method].count(knob, m1, m2)


def _target(work: Work, knob: int, name: str, layer: nn.Linear) -> Target:
    found, short = _LAYER.search(f".{name}"), name.rpartition(".")[2]
    if found is None or short not in MATRICES:
        raise ConfigError(f"target_modules: {name} is no matrix of a decoder layer ({', '.join(MATRICES)})")
    m1, m2 = layer.in_features, layer.out_features
    return Target(int(found[1]), short, m1, m2, _count(work, knob, m1, m2))


def _quoted_size(shapes: Shapes, target: Target) -> tuple[int, int]:
    return target.m1, shapes.heads * shapes.head_dim if target.name in ("k_proj", "v_proj") else target.m2
