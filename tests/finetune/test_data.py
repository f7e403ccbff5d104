import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo_theory.errors import ConfigError
from diablo_theory.finetune import data
from diablo_theory.finetune.data import (
    IGNORED,
    Ordered,
    collate,
    encode,
    length,
    number_of_steps,
    pad_left,
    training_order,
)
from diablo_theory.finetune.tasks import Example, Wanted, gsm8k
from diablo_theory.finetune.tasks.records import Record

EXAMPLES = [Example("Question: 2 + 2?\nAnswer:", " 4", "a"), Example("Q:", " forty-two", "b")]


def test_answers_end_in_the_end_token_and_prompts_do_not(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for example, encoded in zip(EXAMPLES, encode(EXAMPLES, tokenizer), strict=True):
        assert tokenizer.decode(encoded["prompt_ids"]) == example.prompt
        assert tokenizer.decode(encoded["answer_ids"]) == example.answer + "<end>"


def test_a_bare_prompt_has_no_token_for_its_beginning(metaspace):
    whole, bare, again = encode([EXAMPLES[0], replace(EXAMPLES[1], bare=True), EXAMPLES[1]], metaspace)
    assert [row["prompt_ids"][0] == metaspace.bos_token_id for row in (whole, bare, again)] == [True, False, True]
    assert again["prompt_ids"].tolist() == [metaspace.bos_token_id, *bare["prompt_ids"]]
    assert metaspace.decode(bare["prompt_ids"]) == "Q:"
    assert metaspace.bos_token_id not in {*whole["answer_ids"], *bare["answer_ids"]}


@pytest.mark.parametrize("scoring", [False, True])
def test_the_papers_gsm8k_is_bare_and_the_clean_one_is_not(metaspace, scoring):
    """As the authors' data processing and evaluator tokenise it."""
    record = Record({"question": "How many hens?", "answer": "Two.\n#### 2"}, "f", 1)
    clean, paper = (gsm8k.build(record, Wanted("test", protocol=name, scoring=scoring)) for name in ("clean", "paper"))
    first, second = encode([clean, paper], metaspace)
    assert first["prompt_ids"][0] == metaspace.bos_token_id
    assert metaspace.bos_token_id not in second["prompt_ids"]


def test_a_tokenizer_without_an_end_is_refused(metaspace):
    endless = copy.deepcopy(metaspace)
    endless.eos_token = None
    endless.name_or_path = "some/model"
    with pytest.raises(
        ConfigError, match=r"the tokenizer of 'some/model' has no end-of-sequence token.*set eos_token"
    ):
        encode(EXAMPLES, endless)


def test_cut_examples_are_counted(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = [*EXAMPLES, Example("A much longer prompt than the others, and", "", "c")]
    lengths = [length(row) for row in encode(examples, tokenizer)]
    for limit in (*lengths, min(lengths) - 1, max(lengths) + 1):
        encoded = encode(examples, tokenizer, limit)
        assert [row["cut"] for row in encoded] == [size > limit for size in lengths]
        assert Ordered(encoded, [0, 0, 1, 2, 0]).cut == sum(size > limit for size in lengths)
    assert Ordered(encode(examples, tokenizer), []).cut == 0


def test_pad_left():
    assert pad_left([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [9, 9, 4]]


def test_batch_loss_equals_the_mean_over_answer_tokens_computed_one_by_one(tiny_model):
    """The short cut (left padding, few logits) against plain full-length passes, in loss and in gradients."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    encoded = encode(EXAMPLES, tokenizer)
    batch = collate(encoded, pad_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["position_ids"].shape
    assert batch["labels"].shape == (2, batch["logits_to_keep"])
    assert (batch["labels"][:, 0] == IGNORED).all()
    loss = model(**batch).loss
    gradient = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0]

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in encoded:
        ids = torch.tensor([[*example["prompt_ids"], *example["answer_ids"]]], dtype=torch.int64)
        answer = len(example["answer_ids"])
        logits = model(input_ids=ids).logits[0, -answer - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, -answer:], reduction="sum")
        tokens += answer
    plain = torch.autograd.grad(total / tokens, model.model.layers[0].mlp.up_proj.weight)[0]
    # The model's own loss function works in float32 whatever the model's dtype.
    torch.testing.assert_close(loss.double(), total / tokens, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-8)


def test_everything_is_learnt_but_what_nothing_comes_before(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    encoded = encode(EXAMPLES, tokenizer)
    batch = collate(encoded, pad_id=0, everything=True)
    loss = model(**batch).loss
    losses = []
    for example in encoded:
        ids = torch.tensor([[*example["prompt_ids"], *example["answer_ids"]]], dtype=torch.int64)
        losses.append(
            torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        )
    torch.testing.assert_close(loss.double(), torch.cat(losses).mean(), rtol=1e-6, atol=0)
    assert (batch["labels"] != IGNORED).sum() == sum(length(row) - 1 for row in encoded)


@pytest.mark.parametrize(("limit", "prompt", "answer"), [(100, 24, 3), (26, 24, 2), (24, 23, 1), (2, 1, 1), (1, 1, 1)])
def test_what_is_too_long_loses_the_answers_end_first(tiny_model, limit, prompt, answer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (cut,) = encode(EXAMPLES[:1], tokenizer, limit)
    (whole,) = encode(EXAMPLES[:1], tokenizer)
    assert (len(cut["prompt_ids"]), len(cut["answer_ids"])) == (prompt, answer)
    assert cut["prompt_ids"].tolist() == whole["prompt_ids"].tolist()[-prompt:]
    assert cut["answer_ids"].tolist() == whole["answer_ids"].tolist()[:answer]


orders = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=60),
        "steps": st.integers(1, 30),
        "batch_size": st.integers(1, 7),
        "seed": st.integers(0, 3),
        "by_length": st.booleans(),
        "drop_last": st.booleans(),
    }
)


@given(orders)
def test_every_epoch_takes_every_example_once(want):
    assume(not want["drop_last"] or len(want["lengths"]) >= want["batch_size"])
    order = training_order(**want)
    assert order == training_order(**want)
    assert len(order) == want["steps"] * want["batch_size"]
    size = len(want["lengths"])
    epoch = size // want["batch_size"] * want["batch_size"] if want["drop_last"] else size
    if not want["by_length"]:
        for start in range(0, len(order), epoch):
            part = order[start : start + epoch]
            assert len(set(part)) == len(part)
        assert order[:epoch] == list(range(epoch))[: len(order)]
    counts = np.bincount(order, minlength=size)
    assert counts.max() <= -(-len(order) // epoch)


def test_batches_by_length_waste_less_and_lose_nothing():
    lengths = np.random.default_rng(0).integers(5, 200, 512).tolist()
    plain, gathered = (training_order(lengths, 64, 8, 0, by_length=by, drop_last=False) for by in (False, True))
    assert sorted(plain) == sorted(gathered)

    def padded(order):
        batches = np.array(lengths)[np.array(order)].reshape(-1, 8)
        return (batches.max(1) * 8).sum() / batches.sum()

    assert padded(gathered) < 1.05 < padded(plain)
    longest = np.array(lengths)[np.array(gathered)].reshape(-1, 8).max(1)
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.3  # not from short to long


@pytest.mark.parametrize(
    ("examples", "epochs", "size", "drop", "steps"),
    [(10, 1, 4, False, 3), (10, 1, 4, True, 2), (10, 3, 4, False, 8), (10, 3, 4, True, 6), (10, 0.1, 4, False, 1)],
)
def test_number_of_steps(examples, epochs, size, drop, steps):
    assert number_of_steps(examples, epochs, size, drop_last=drop) == steps


def test_too_few_examples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="3 training examples do not fill a batch of 4"):
        training_order([1, 2, 3], 2, 4, 0, by_length=False, drop_last=True)


def test_more_training_than_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(data, "MOST", 7)
    with pytest.raises(ValueError, match="2 steps of 4 examples are too many: at most 7 examples in all"):
        training_order([3] * 4, 2, 4, 0, by_length=False, drop_last=False)
    assert len(training_order([3] * 4, 1, 7, 0, by_length=False, drop_last=False)) == 7
