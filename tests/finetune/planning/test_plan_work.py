import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from llamas import work_on

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.datasets import DATASETS
from diablo_theory.finetune.planning.work import Scored, Work

PLAIN = {"model": "SmolLM2-135M", "examples": 100, "prompt_tokens": 50.0, "answer_tokens": 10.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 0}, "examples must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"eval_prompt_tokens": -1}, "eval_prompt_tokens must be at least 0, got -1"),
        ({"prompt_tokens": float("nan")}, "prompt_tokens must be at least 0, got nan"),
        ({"padding": 0.9}, "padding must be at least 1, got 0.9"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"epochs": float("inf")}, "epochs must be above 0, got inf"),
        ({"examples": 15, "drop_last": True}, "with drop_last examples must fill a batch of 16, got 15"),
        ({"dropout": 1.0}, "dropout must be below 1, got 1.0"),
        ({"prompt_tokens": 0, "answer_tokens": 0}, "prompt_tokens and answer_tokens together must be at least 1"),
        ({"max_tokens": 59}, r"max_tokens must be at least the mean computed length, 60.0 .*, got 59"),
        ({"devices": 20}, "batch_size must be at least devices = 20, got 16"),
        ({"micro_batch": 5}, r"batch_size must be a multiple of micro_batch \* devices = 5 \* 1, got 16"),
        ({"method": "lorra"}, r"method must be one of none, full, .*got 'lorra'.* Did you mean 'lora'"),
        ({"dtype": "bf16"}, r"dtype must be one of float64, float32, bfloat16, float16, got 'bf16'"),
        ({"sharding": "zero"}, "sharding must be one of ddp, fsdp, got 'zero'"),
        ({"logits": "some"}, "logits must be one of answers, all, got 'some'"),
    ],
)
def test_wrong_values_say_what_is_allowed(change, message):
    with pytest.raises(ConfigError, match=message):
        Work(**{**PLAIN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 0}, "items must be an integer of at least 1, got 0"),
        ({"samples": 1.5}, "samples must be an integer of at least 1, got 1.5"),
        ({"new_tokens": -1}, "new_tokens must be at least 0, got -1"),
    ],
)
def test_wrong_numbers_of_a_task_say_what_is_allowed(change, message):
    with pytest.raises(ConfigError, match=message):
        Scored(**{"items": 1, "new_tokens": 8, **change})


@given(
    examples=st.integers(1, 1000),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    devices=st.integers(1, 4),
    epochs=st.integers(1, 3),
    drop_last=st.booleans(),
)
def test_steps_and_batches(examples, micro, accumulation, devices, epochs, drop_last):
    batch = micro * accumulation * devices
    assume(not drop_last or examples >= batch)
    fields = {**PLAIN, "examples": examples, "batch_size": batch, "micro_batch": micro}
    work = Work(**fields, devices=devices, epochs=epochs, drop_last=drop_last)
    places = [place for _ in range(epochs) for place in range(examples - (examples % batch if drop_last else 0))]
    steps = len(range(0, len(places), batch))
    assert (work.total_steps, work.micro, work.accumulation) == (steps, micro, accumulation)
    assert dataclasses.replace(work, steps=7).total_steps == 7
    assert dataclasses.replace(work, method="none").total_steps == 0


def test_lengths():
    work = Work(**PLAIN, padding=1.5, max_tokens=180)
    assert (work.length, work.kept, work.longest, work.longest_kept) == (90, 16, 180, 32)
    everywhere = dataclasses.replace(work, logits="all", max_tokens=None)
    assert (everywhere.kept, everywhere.longest, everywhere.longest_kept) == (90, 90, 90)
    assert work.eval_prompt == 75
    assert dataclasses.replace(work, eval_prompt_tokens=20.0).eval_prompt == 30
    assert work.padded
    assert not dataclasses.replace(work, micro_batch=1).padded


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_makes_a_run_and_says_what_is_assumed(name):
    found, work = DATASETS[name], work_on(name, "LLaMA2-7B")
    assert work.max_tokens == found.max_tokens
    assert "Lengths: " in found.source
    assert "assumed" in found.source
