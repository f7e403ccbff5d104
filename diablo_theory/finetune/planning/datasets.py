"""Sizes of the data of full runs: counts as stated where they are, else assumed, and lengths assumed; each says so."""

from __future__ import annotations

from dataclasses import dataclass

from diablo_theory.finetune.tasks import Protocol


@dataclass(frozen=True)
class Dataset:
    """Training data.

    Attributes:
        examples: Published training examples; all protocols but the clean one take them all. An assumption where the
            task itself does not know how many there are (``Task.sizes``), so that a run could not tell.
        prompt_tokens: Mean tokens of a prompt with its template, assumed.
        answer_tokens: Mean tokens of an answer, assumed.
        padding: Computed positions over real ones at a batch of 16, assumed.
        max_tokens: The protocol's cut-off.
        source: Of the counts, and of the lengths.
        clean: What the clean protocol leaves of the examples, where it was counted.
    """

    examples: int
    prompt_tokens: float
    answer_tokens: float
    padding: float
    max_tokens: int
    source: str
    clean: int | None = None

    def trained_on(self, protocol: Protocol) -> int | None:
        """Examples of one epoch, or None where only the data themselves tell."""
        return self.clean if protocol == "clean" else self.examples


_ASSUMED = "Lengths: assumed"

#: By the name of the training data. Lengths were measured with SmolLM2's tokenizer where data was at hand.
DATASETS: dict[str, Dataset] = {
    "commonsense_170k": Dataset(
        170_420, 130, 7, 1.4, 256,
        "170,420 as commonly documented. "
        "Lengths: measured on five of the eight tests' instructions (31 to 88, answer 7), template assumed",
    ),
    "metamathqa": Dataset(395_000, 130, 170, 1.5, 2048, f"395K as stated. {_ASSUMED}"),
    "gsm8k": Dataset(
        7473, 90, 126, 1.6, 512,
        "7,473 in the published file, 6,686 of them outside the validation cut. Lengths: question 60 and answer 126 "
        "measured, template assumed; padding 1.8 measured without a template",
        clean=6686,
    ),
    "code_alpaca": Dataset(20_022, 60, 70, 1.8, 512, f"20,022 as commonly documented. {_ASSUMED}"),
    "saferpaca": Dataset(22_000, 50, 80, 1.8, 512, f"assumed of 20k Alpaca and 2,000 safety items. {_ASSUMED}"),
    "math_10k": Dataset(10_000, 100, 110, 1.6, 512, f"assumed by its name. {_ASSUMED}"),
}  # fmt: skip
