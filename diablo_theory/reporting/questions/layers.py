"""Questions to what was recorded of a real model's layers."""

from __future__ import annotations

from typing import Literal

from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.questions.base import Answer, Outcome, Pair, Question

LAYERS = "diagnosis/layers.csv"
Captured = Literal["diablo", "lora_set", "lora_tangent", "lora_frozen"]
_CAPTURED: dict[Captured, str] = {
    "diablo": "DiaBlo captures",
    "lora_set": "the best matrix of LoRA's rank captures",
    "lora_tangent": "LoRA's usual start captures",
    "lora_frozen": "LoRA with a frozen random A captures",
}


class Premise(Question):
    """Whether in all of a real model's layers every X_i has the rank of X."""

    kind: Literal["premise"]

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        layers = evidence.layers
        held = int(layers["premise_holds"].sum())
        short, count = layers["energy_rank"] / layers["block_rows"], layers["num_blocks"].iloc[0]
        text = (
            f"in {held} of {len(layers)} layers at N = {count}; 99% of the inputs' energy takes "
            f"{short.min():.2g} to {short.max():.2g} times as many directions as a block has rows"
        )
        outcome = Outcome.HOLDS if held == len(layers) else Outcome.FAILS
        return Answer(outcome, text, _where(evidence), LAYERS, rows=("layers",))


class Captures(Pair):
    """Whether one set of updates captures at least as much as another in more than half of a real model's layers."""

    kind: Literal["captures"]
    of: Captured
    over: Captured

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        layers = evidence.layers
        names = [f"capture_{name}" for name in (self.of, self.over)]
        most, least = layers[names[0]], layers[names[1]]
        wins = int((most >= least).sum())
        text = (
            f"{_CAPTURED[self.of]} {100 * most.median():.0f}% of what full fine-tuning does in the median layer, "
            f"{_CAPTURED[self.over]} {100 * least.median():.0f}%; the first at least as much in {wins} of "
            f"{len(layers)}"
        )
        outcome = Outcome.HOLDS if wins > len(layers) / 2 else Outcome.FAILS
        return Answer(outcome, text, _where(evidence), LAYERS, rows=("layers",), figures=("captures",))


def _where(evidence: Evidence) -> str:
    layers = evidence.layers
    return f"{evidence.layers_model}, {len(layers)} layers, {layers['tokens'].iloc[0]:,} tokens"
