"""Making DiaBlo known to peft, which has no plug-in mechanism for a tuner from outside."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel, mapping

PREFIX = "diablo_"


class DiaBloPeftType(str, enum.Enum):  # noqa: UP042  peft reads str(member), which a StrEnum writes otherwise
    """The type under which peft looks DiaBlo up; equal to, hashed and stored as the string "DIABLO".

    peft's own enumeration cannot be extended, and a plain string lacks the ``value`` that transformers reads.
    """

    DIABLO = "DIABLO"


def register(config: type[Any], model: type[Any]) -> None:
    """Enter DiaBlo into peft's tables. Doing it twice changes nothing.

    Raises:
        RuntimeError: If something else already has the name, such as a DiaBlo of peft's own.
    """
    entries: dict[str, tuple[dict[Any, Any], Any]] = {
        "config": (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, config),
        "tuner": (mapping.PEFT_TYPE_TO_TUNER_MAPPING, model),
        "prefix": (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    }
    for what, (table, ours) in entries.items():
        theirs = table.get(DiaBloPeftType.DIABLO, ours)
        if theirs != ours:
            raise RuntimeError(
                f"peft already has a {what} named {DiaBloPeftType.DIABLO.value!r} ({theirs}): "
                "diablo_theory's tuner cannot be used beside it"
            )
    for table, ours in entries.values():
        table[DiaBloPeftType.DIABLO] = ours


def report_modes(summary: Callable[[Any], str]) -> None:
    """Let peft's ``print_trainable_parameters`` say below its counts in which mode DiaBlo's layers are, and why.

    peft prints from a method of its own that asks no tuner, so that method is extended; for other tuners it prints
    what it did. Doing it twice changes nothing.

    Args:
        summary: A DiaBlo model to its lines.
    """
    plain = PeftModel.print_trainable_parameters
    if hasattr(plain, "reports_diablo_modes"):
        return

    @functools.wraps(plain)
    def print_trainable_parameters(self: PeftModel) -> None:
        plain(self)
        if getattr(self.base_model, "prefix", None) == PREFIX:
            print(summary(self.base_model))

    print_trainable_parameters.reports_diablo_modes = True  # type: ignore[attr-defined]
    PeftModel.print_trainable_parameters = print_trainable_parameters
