import json

import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import TASKS, Wanted, commonsense
from diablo_theory.finetune.tasks.commonsense import ANY_LABEL, build, cluster
from diablo_theory.finetune.tasks.records import Record

INSTRUCTION = (
    "Please choose: where do hens live?\n\n"
    "Answer1: coop Answer2: sea Answer3: sky\n\n"
    "Answer format: answer1/answer2/answer3"
)
RECORD = Record({"instruction": INSTRUCTION, "output": "the correct answer is answer1", "answer": "answer1"}, "f", 1)


def example(protocol="clean", scoring=False, record=RECORD):
    return build("answer[1-5]", record, Wanted(split="test", protocol=protocol, scoring=scoring))


def test_the_clean_form():
    made = example()
    assert made.prompt == f"{INSTRUCTION}\n\nAnswer:"
    assert made.answer == " the correct answer is answer1"
    assert made.choices == tuple(f" the correct answer is answer{number}" for number in (1, 2, 3))
    assert made.gold == "answer1"


def test_the_papers_training_prompt_is_indented_and_its_scoring_prompt_is_bare():
    training, scoring = example("paper"), example("paper", scoring=True)
    lines = training.prompt.split("\n")
    assert lines[0].startswith("Below is an instruction")
    assert lines[2:4] == [" " * 16 + "### Instruction:", " " * 16 + "Please choose: where do hens live?"]
    assert training.prompt.endswith("\n" + " " * 16 + "### Response:\n" + " " * 16)
    assert scoring.prompt == INSTRUCTION + "\n"
    assert training.answer == scoring.answer == "the correct answer is answer1"
    assert scoring.choices == (
        "the correct answer is answer1",
        "the correct answer is answer2",
        "the correct answer is answer3",
    )


def test_llm_adapters_scores_with_the_prompt_of_training():
    training, scoring = example("llm_adapters"), example("llm_adapters", scoring=True)
    assert training == scoring == example("paper")
    assert scoring != example("paper", scoring=True)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("the correct answer is answer1", 1),
        ("answer1", 1),
        ("", 0),
        ("nothing", 0),
        ("answer2, so the correct answer is answer1", 0),
        ("answer12", 1),
        ("none\n### Response:\nanswer1", 0),
        ("answer1\n### Response:\nanswer2", 1),
    ],
)
def test_llm_adapters_takes_the_first_label_of_the_response(said, right):
    assert TASKS["arc_easy"].judge["llm_adapters"](example("llm_adapters", scoring=True), [said]) == {"exact": right}


def test_without_a_field_for_it_the_label_is_the_outputs():
    record = Record({"instruction": INSTRUCTION, "output": "the correct answer is answer2\n", "answer": ""}, "f", 1)
    assert example(record=record).gold == "answer2"


@pytest.mark.parametrize("gold", ["answer4", "true", ""])
def test_a_label_that_the_instruction_does_not_list_is_refused(gold):
    record = Record({"instruction": INSTRUCTION, "output": f"the correct answer is {gold}", "answer": gold}, "f", 7)
    with pytest.raises(ConfigError, match=f"f, record 7: the answer is '{gold}', the instruction lists answer1, ans"):
        example(record=record)


def test_an_instruction_without_labels_is_refused():
    with pytest.raises(ConfigError, match="lists no labels"):
        example(record=Record({"instruction": "Hens?", "output": "x", "answer": "answer1"}, "f", 7))


def test_all_label_sets_are_known_to_the_training_set():
    for _, labels, _ in commonsense.BENCHMARKS.values():
        head = labels.removesuffix("[1-5]").removesuffix("[1-4]").removesuffix("[12]")
        assert head in ANY_LABEL


SAID = [
    (" the correct answer is answer1", 1, 1),
    (" the correct answer is answer2", 0, 0),
    ("answer1", 1, 1),
    ("", 0, 1),
    ("nothing", 0, 1),
    ("answer2, so the correct answer is answer1", 0, 1),
    ("the correct answer is answer1 the correct answer is answer3", 1, 0),
    ("the correct answer is answer12", 0, 1),
]


@pytest.mark.parametrize(("said", "clean", "paper"), SAID)
def test_judging(said, clean, paper):
    """The paper's rule falls back on the prompt, whose first label is answer1: an empty completion is right here."""
    task = TASKS["arc_easy"]
    assert task.judge["clean"](example(scoring=True), [said]) == {"exact": clean}
    assert task.judge["paper"](example("paper", scoring=True), [said]) == {"exact": paper}


def test_decoding():
    assert TASKS["boolq"].decoding["paper"].beams == TASKS["boolq"].decoding["llm_adapters"].beams == 4
    assert TASKS["boolq"].decoding["clean"].beams == 1
    assert {choice.max_new_tokens for choice in TASKS["boolq"].decoding.values()} == {32}


def sentence(text, one="Sarah", two="Maria"):
    return f"Please fill in the given sentence: {text}\n\nOption1: {one} Option2: {two} Answer format: option1/option2"


def test_the_sentences_of_a_pair_are_one_cluster():
    easier = sentence("Sarah was a better surgeon than Maria so _ got the easier cases.")
    assert cluster(easier) == cluster(sentence("Sarah was a better surgeon than Maria so _ got the harder cases."))
    assert cluster(easier) == cluster(sentence("Sarah was a worse surgeon than Maria.", "Maria", "Sarah"))
    assert cluster(easier) != cluster(sentence("Sarah was a better surgeon than Maria so", "Sarah", "Ann"))
    assert cluster(easier) != cluster(sentence("Sarah was in the house of Maria."))


def test_a_question_is_one_cluster_whatever_its_options():
    assert cluster(INSTRUCTION) == cluster(INSTRUCTION.replace("sea", "lake")) == "Please choose: where do hens live?"


def test_flat_folders_are_read(tmp_path):
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy/test.json").write_text(json.dumps([dict(RECORD)]))
    (made,) = TASKS["arc_easy"].examples(Wanted(split="test", data_root=tmp_path))
    assert made.gold == "answer1"
