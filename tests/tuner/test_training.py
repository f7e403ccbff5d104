"""DiaBlo in transformers' Trainer and TRL's SFTTrainer: training, checkpoints, going on after an interruption."""

import json

import pytest
import torch
from networks import llama
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from trainers import trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from diablo_theory.tuner import DiaBloConfig, mode_summary

MODES = ["additive", "merged"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TRAINER_STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


class Stop(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def build(mode, **options):
    base = llama()
    return get_peft_model(base, DiaBloConfig(num_blocks=5, target_modules=TARGETS, mode=mode, **options))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "diablo" not in name}


def check_base(model, before):
    after = base_weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(("mode", "dropout"), [("merged", 0.0), ("additive", 0.2)])
def test_resumed_training_ends_where_undisturbed_training_does(tmp_path, mode, dropout):
    whole = trainer(build(mode, dropout=dropout), tmp_path / "whole")
    before = base_weights(whole.model)
    whole.train()
    expected = get_peft_model_state_dict(whole.model)
    assert all(value.abs().max() > 1e-3 for value in expected.values())
    assert losses(whole)[-1] < losses(whole)[0]
    check_base(whole.model, before)

    with pytest.raises(KeyboardInterrupt):
        trainer(build(mode, dropout=dropout), tmp_path / "cut", [Stop(5)]).train()
    assert {folder.name for folder in (tmp_path / "cut").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    resumed = trainer(build(mode, dropout=dropout), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_same(get_peft_model_state_dict(resumed.model), expected)
    assert losses(resumed)[-1] == losses(whole)[-1]
    check_base(resumed.model, before)
    assert mode_summary(resumed.model) == f"DiaBlo 'default': 6 layers {mode} (asked for)"


def test_checkpoints_are_peft_adapters(tmp_path):
    run = trainer(build("merged"), tmp_path)
    run.train()
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert {file.name for file in checkpoint.iterdir()} == ADAPTER | TRAINER_STATE
        assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "DIABLO"
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(run.model))
    run.save_model(tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {*ADAPTER, "training_args.bin"}
    assert_same(load_file(tmp_path / "final" / "adapter_model.safetensors"), get_peft_model_state_dict(run.model))


@pytest.mark.parametrize("mode", MODES)
def test_best_model_is_loaded_at_the_end(tmp_path, mode):
    """The loss falls, so that the checkpoint with the highest loss is the first and not the one already there."""
    run = trainer(
        build(mode),
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    before = base_weights(run.model)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = get_peft_model_state_dict(run.model)
    assert_same(state, load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    last = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert all(not torch.equal(state[name], last[name]) for name in state)
    check_base(run.model, before)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast(tmp_path, mode):
    run = trainer(build(mode), tmp_path, bf16=True, save_strategy="no")
    before = base_weights(run.model)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    check_base(run.model, before)


def sft(folder, tiny_model, mode, callbacks=()):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        max_length=16,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=True,  # TRL's default too, but under its old name, which transformers deprecates
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        train_dataset=Dataset.from_dict({"text": [f"{n} and {n} are {2 * n}." for n in range(12)]}),
        peft_config=DiaBloConfig(num_blocks=5, target_modules=TARGETS, task_type="CAUSAL_LM", mode=mode),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("mode", MODES)
def test_trl_trains_and_resumes(tmp_path, tiny_model, mode):
    whole = sft(tmp_path / "whole", tiny_model, mode)
    before = base_weights(whole.model)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    check_base(whole.model, before)
    with pytest.raises(KeyboardInterrupt):
        sft(tmp_path / "cut", tiny_model, mode, [Stop(5)]).train()
    resumed = sft(tmp_path / "cut", tiny_model, mode)
    resumed.train(resume_from_checkpoint=True)
    assert_same(get_peft_model_state_dict(resumed.model), get_peft_model_state_dict(whole.model))
    assert {file.name for file in (tmp_path / "cut" / "checkpoint-6").iterdir()} >= ADAPTER | TRAINER_STATE
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "cut" / "checkpoint-6"
    )
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(whole.model))
