"""Small runs of a tiny model."""

import pytest

from diablo_theory.finetune import runs
from diablo_theory.finetune.config import resolve

SMALL = {
    "num_blocks": 6,
    "steps": 5,
    "batch_size": 4,
    "warmup_steps": 2,
    "save_every": 2,
    "eval_items": 6,
    "eval_batch_size": 4,
    "learning_rate": 1e-2,
    "device": "cpu",
}


@pytest.fixture
def small():
    """Keys of a run of five steps."""
    return SMALL


@pytest.fixture
def do(tiny_model, tmp_path, board):
    """Does a small run with some keys changed, in a folder of its name; gives its metrics and the folder."""

    def run(name="run", **changes):
        config = resolve(SMALL, {"model": str(tiny_model)}, changes)
        return runs.execute(config, tmp_path / name, board), tmp_path / name

    return run
