"""What a run needs before it starts: its problems, and a model made ready for its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState

from diablo_theory import methods
from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.files import read_tensors, write_with
from diablo_theory.finetune.bases import layers_of, quantised_base
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.data import (
    IGNORED,
    Encoded,
    Ordered,
    collate,
    encode,
    length,
    number_of_steps,
    training_order,
)
from diablo_theory.finetune.folder import QUANTISED
from diablo_theory.finetune.models import LoadedModel, loading
from diablo_theory.finetune.tasks import TASKS, Example, Wanted
from diablo_theory.finetune.tasks.records import digest
from diablo_theory.finetune.train import WEIGHTS
from diablo_theory.quantise import QuantiseConfig

Load = Callable[[str, str, torch.dtype], LoadedModel]


class Board(Protocol):
    """Where progress is shown."""

    def piece(self, text: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show one piece of work of ``total`` units; yields what to call with each number of finished units."""


@dataclass(frozen=True)
class Problems:
    """What a run learns from and what it is scored on, read before anything is computed."""

    train: list[Example]
    score: dict[str, list[Example]]
    #: What tasks say of the conditions that they are scored under.
    conditions: dict[str, dict[str, bool]]

    def digests(self) -> dict[str, str]:
        """SHA-256 of what was read, by task: two runs saw the same problems, or they did not."""
        sets = {"train": self.train, **self.score}
        return {name: digest(map(dataclasses.asdict, examples)) for name, examples in sets.items()}


def read_problems(config: RunConfig, *, train: bool = True) -> Problems:
    """The examples of a run.

    Raises:
        ConfigError: If data are missing or damaged, or a task cannot be scored here.
    """
    ready = {name: check() for name in config.evaluate_on if (check := TASKS[name].ready)}
    options: dict[str, Any] = {"seed": config.seed, "protocol": config.protocol, "data_root": config.data_root}
    options["whole"] = config.scale == "full"
    wanted = Wanted("train", config.train_limit, **options)
    learning = TASKS[config.train_on].examples(wanted) if train and config.method != "none" else []
    score = {
        name: TASKS[name].examples(Wanted(config.eval_split, config.eval_items, scoring=True, **options))
        for name in config.evaluate_on
    }
    if empty := [name for name, examples in score.items() if not examples]:
        raise ConfigError(f"{empty[0]} has no {config.eval_split} problems")
    return Problems(learning, score, ready)


@dataclass(frozen=True)
class Setup:
    """A model made ready for a run; ``data`` is None where nothing is to be learnt."""

    loaded: LoadedModel
    prepared: methods.Prepared
    data: Ordered | None


#: Training examples that a start which looks at data sees, and how many at once.
CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 64, 8


def trained_model(
    config: RunConfig, folder: Path, board: Board, load: Load, learning: Sequence[Example], steps: int | None = None
) -> Setup:
    """:func:`set_up`, with what the run has learnt."""
    setup = set_up(config, folder, board, load, learning, steps)
    if config.method != "none":
        put_trained(setup.prepared, folder / WEIGHTS)
    return setup


def put_trained(prepared: methods.Prepared, file: Path) -> None:
    """Give a prepared model what a run has learnt.

    Raises:
        ResultsError: If the file is damaged, or of another run.
    """
    state = read_tensors(file)
    try:
        methods.load_trainable_state(prepared.model, state)
    except ValueError as error:
        raise ResultsError(f"{file} is of another run than the config.json beside it: {error}") from error


def set_up(
    config: RunConfig, folder: Path, board: Board, load: Load, learning: Sequence[Example], steps: int | None = None
) -> Setup:
    """A fresh model, quantised if the run says so, with exactly its method's parameters trainable.

    Args:
        config: The run.
        folder: Gets the table of a quantised base.
        board: Shows progress.
        load: Gives the model.
        learning: The training examples; none where nothing is learnt.
        steps: Of a run that was trained before, where ``learning`` is left out; methods may plan with their number.

    Raises:
        ConfigError: If the method, the base or the data do not fit together.
        ModelUnavailableError: If the model is not to be had.
    """
    with board.piece(loading(config.model), 1) as advance:
        loaded = load(config.model, config.device, getattr(torch, config.dtype))
        advance(1)
    if config.quantise is not None:
        _quantise(config, config.quantise, folder, board, loaded)
    data = training_data(config, learning, loaded.tokenizer) if learning else None
    adapter = methods.has_adapter(config.method)
    try:
        prepared = methods.prepare(
            loaded.model,
            config.method,
            config.num_blocks,
            config.target_modules,
            seed=config.seed,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            adapter_dtype=config.adapter_dtype if adapter else None,
            calibration=None if data is None else partial(_calibration, data, loaded.tokenizer.pad_token_id),
            steps=steps if data is None else len(data) // config.batch_size,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if not adapter:  # what trains is in the model, and gets the adapter's dtype there
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.adapter_dtype))
    return Setup(loaded, prepared, data)


def _calibration(data: Ordered, pad_id: int) -> list[dict[str, torch.Tensor]]:
    """The first examples as batches of tensors alone, with a label for every token."""
    batches = []
    for start in range(0, min(len(data.examples), CALIBRATION_EXAMPLES), CALIBRATION_BATCH):
        batch = collate(data.examples[start : start + CALIBRATION_BATCH], pad_id)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels[:, -batch.pop("logits_to_keep") :] = batch["labels"]
        batches.append(batch | {"labels": labels})
    return batches


def _quantise(config: RunConfig, how: QuantiseConfig, folder: Path, board: Board, loaded: LoadedModel) -> None:
    count = len(layers_of(loaded.model))
    with board.piece(f"quantise the base to {how.bits} bits ({how.method})", count) as advance:
        done = 0

        def progress(finished: int) -> None:
            nonlocal done
            advance(finished - done)
            done = finished

        report = quantised_base(loaded.model, loaded.tokenizer, config, how, progress)
    if PartialState().is_main_process:
        write_with(folder / QUANTISED, lambda path: report.to_csv(path, index=False))


def training_data(config: RunConfig, examples: Sequence[Example], tokenizer: Any) -> Ordered:
    """The examples of a run, encoded, in the order in which it meets them.

    Raises:
        ConfigError: If they do not fill a batch.
    """
    encoded: list[Encoded] = encode(examples, tokenizer, config.max_length)
    steps = config.steps or number_of_steps(
        len(encoded), config.epochs or 1, config.batch_size, drop_last=config.drop_last
    )
    try:
        order = training_order(
            list(map(length, encoded)),
            steps,
            config.batch_size,
            config.seed,
            by_length=config.batching == "by_length",
            drop_last=config.drop_last,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Ordered(encoded, order)
