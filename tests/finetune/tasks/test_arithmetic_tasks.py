import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import TASKS, Wanted
from diablo_theory.finetune.tasks.arithmetic import gsm8k_example, letter_example, number_example, training_example
from diablo_theory.finetune.tasks.records import Record


def record(answer):
    return Record({"instruction": "How many hens?", "output": "The answer is 9.", "answer": answer}, "f", 4)


def options(answer, listed="(A) 60 m (B) 61 m (C) half of (A) (D) 63 m (E) 64 m"):
    return Record({"instruction": f"How long is it? Answer Choices: {listed}", "answer": answer}, "f", 4)


def wanted(protocol="clean"):
    return Wanted(split="test", protocol=protocol, scoring=True)


def test_the_papers_prompt_is_the_plain_alpaca_template():
    made = training_example(record("2.0"), wanted("paper"))
    assert made.prompt.endswith("request.\n\n### Instruction:\nHow many hens?\n\n### Response:\n")
    assert made.answer == "The answer is 9."


def test_the_clean_form():
    made = training_example(record("2.0"), wanted())
    assert made.prompt + made.answer == "How many hens?\n\nAnswer: The answer is 9."


@pytest.mark.parametrize(
    ("answer", "gold"), [("8.0", "8"), ("-15.0", "-15"), ("1.8333333333333335",) * 2, ("10", "10"), (" 3 ", "3")]
)
def test_a_test_set_answers_with_its_number_and_not_with_its_output(answer, gold):
    made = number_example(record(answer), wanted())
    assert (made.gold, made.answer) == (gold, f" The answer is {gold}.")


@pytest.mark.parametrize(
    ("answer", "message"),
    [("eight", "f, record 4: answer must be a number, got 'eight'"), ("1/2", "answer must be a number")],
)
def test_an_answer_of_another_kind_is_refused(answer, message):
    with pytest.raises(ConfigError, match=message):
        number_example(record(answer), wanted())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (options("F"), "f, record 4: the answer is 'F', the instruction lists A, B, C, D, E"),
        (options("AB"), "the answer is 'AB', the instruction lists A, B, C, D, E"),
        (options(""), "the answer is '', the instruction lists A, B, C, D, E"),
        (options("C", "(A) 1 (B) 2"), "the answer is 'C', the instruction lists A, B"),
        (record("A"), "the answer is 'A', the instruction lists none"),
    ],
)
def test_a_letter_that_the_instruction_does_not_list_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        letter_example(made, wanted())


@pytest.mark.parametrize(("protocol", "lead"), [("clean", " "), ("paper", "")])
def test_letters_are_also_chosen_by_likelihood(protocol, lead):
    made = letter_example(options("B"), wanted(protocol))
    assert made.choices == tuple(f"{lead}The answer is ({letter})." for letter in "ABCDE")
    assert (made.answer, made.gold) == (made.choices[1], "B")
    assert "(A) 60 m" in made.prompt
    assert letter_example(options("A", "(A) 1 (B) 2 (C) 3"), wanted(protocol)).choices == made.choices[:3]
    assert list(TASKS["aqua"].metrics) == ["exact", "lenient", "likelihood"]


@pytest.mark.parametrize(
    ("said", "clean", "paper", "lenient"),
    [
        ("The answer is 8 of 9", 1, 0, 0),
        ("The answer is 8.", 1, 1, 1),
        ("8", 0, 1, 1),
        ("The answer is 16/2", 1, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_judging_numbers(said, clean, paper, lenient):
    for name in ("svamp", "mawps", "gsm8k_math10k"):
        judge = TASKS[name].judge
        made = number_example(record("8.0"), wanted())
        assert judge["clean"](made, [said]) == {"exact": clean, "lenient": lenient}
        assert judge["paper"](made, [said]) == {"exact": paper, "lenient": lenient}


@pytest.mark.parametrize(
    ("said", "clean", "paper", "lenient"),
    [
        ("The answer is (B).", 1, 1, 1),
        ("Answer: B", 0, 0, 1),
        ("But it is not so. The answer is (A).", 0, 1, 0),
        ("The answer is B, not A", 1, 1, 0),
        ("b", 0, 0, 0),
    ],
)
def test_judging_letters(said, clean, paper, lenient):
    made = letter_example(options("B"), wanted())
    assert TASKS["aqua"].judge["clean"](made, [said]) == {"exact": clean, "lenient": lenient}
    assert TASKS["aqua"].judge["paper"](made, [said]) == {"exact": paper, "lenient": lenient}


def test_gsm8k_in_two_forms():
    hens = Record({"question": "How many hens?", "answer": "1+1 = <<1+1=2>>2.\n#### 2"}, "f", 1)
    assert gsm8k_example(hens, wanted()).answer == " 1+1 = 2.\nThe answer is 2."
    assert gsm8k_example(hens, wanted("paper")).answer == "1+1 = <<1+1=2>>2.\nThe answer is 2."
    assert "### Response:" in gsm8k_example(hens, wanted("paper")).prompt
