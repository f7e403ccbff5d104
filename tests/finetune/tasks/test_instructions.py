import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import TASKS, Wanted


def test_both_templates_occur(data_root):
    for name in ("code_alpaca", "saferpaca"):
        examples = TASKS[name].examples(Wanted(split="train", data_root=data_root))
        with_input = [example for example in examples if "### Input:\nx = " in example.prompt]
        without = [example for example in examples if "### Input:" not in example.prompt]
        assert with_input
        assert without
        assert len(with_input) + len(without) == len(examples)
        assert all(example.answer.startswith("print(") for example in examples)


def test_both_protocols_are_alpacas(data_root):
    for name in ("code_alpaca", "saferpaca"):
        clean, paper = (
            {e.prompt: e for e in TASKS[name].examples(Wanted("train", protocol=protocol, data_root=data_root))}
            for protocol in ("clean", "paper")
        )
        assert clean
        assert all(paper[prompt] == example for prompt, example in clean.items())


def test_the_papers_protocol_trains_on_all_and_validates_on_nothing(data_root):
    count = {
        (split, protocol): len(TASKS["code_alpaca"].examples(Wanted(split, protocol=protocol, data_root=data_root)))
        for split, protocol in (("train", "clean"), ("validation", "clean"), ("train", "paper"))
    }
    assert count["train", "paper"] == count["train", "clean"] + count["validation", "clean"]
    with pytest.raises(ConfigError, match="code_alpaca: protocol paper trains on all there is"):
        TASKS["code_alpaca"].examples(Wanted("validation", protocol="paper", data_root=data_root))
