"""transformers' Trainer as several tests of the tuner use it."""

import torch
from transformers import Trainer, TrainingArguments

ROWS = torch.randint(1, 64, (12, 9), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


def trainer(model, folder, callbacks=(), **options):
    """Accumulates gradients and recomputes activations; a checkpoint every other step."""
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": True,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **(arguments | options))
    return Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=list(callbacks))
