import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diablo_theory.finetune.data import encode
from diablo_theory.finetune.evaluate import answer_losses, choice_losses, complete, continuations, evaluate, measure
from diablo_theory.finetune.tasks import TASKS, Decoding, Example, Task, Wanted
from diablo_theory.finetune.tasks.base import in_both


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_scores_do_not_depend_on_how_items_are_batched(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    task = TASKS["word_problems"]
    examples = task.examples(Wanted("test", 7))
    done = []
    one, three = (evaluate(model.train(), tokenizer, task, examples, size, done.append) for size in (1, 3))
    assert done == [1] * 7 + [3, 3, 1]
    assert model.training
    torch.testing.assert_close(torch.tensor(one["loss_sum"]), torch.tensor(three["loss_sum"]), rtol=1e-4, atol=1e-4)
    assert one["tokens"].tolist() == [len(e["answer_ids"]) for e in encode(examples, tokenizer)]
    same = ["item", "cluster", "prompt", "answer", "tokens"]
    assert one[same].equals(three[same])


def test_an_even_model_loses_log_vocabulary_a_token(tiny_model):
    model, tokenizer = load(tiny_model)
    torch.nn.init.zeros_(model.lm_head.weight)  # tied to the embedding: every logit is zero
    encoded = encode(TASKS["word_problems"].examples(Wanted("test", 4)), tokenizer)
    losses, counts = answer_losses(model, encoded, pad_id=0)
    for loss, count in zip(losses, counts, strict=True):
        assert math.isclose(loss, count * math.log(model.config.vocab_size), rel_tol=1e-5)


def test_greedy_follows_the_model_and_hides_special_tokens(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    batch = TASKS["word_problems"].examples(Wanted("test", 3))
    ids = torch.tensor(encode(batch, tokenizer)[0]["prompt_ids"][None])
    expected = []
    with torch.no_grad():
        for _ in range(4):
            token = model(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            expected.append(int(token))
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    ((completion,), *_) = complete(model, tokenizer, batch, Decoding(max_new_tokens=4))
    assert completion == tokenizer.decode(expected)
    assert "<end>" not in completion


CHOICES = [
    Example("Is it so?", " true", "a", gold="true", choices=(" true", " false")),
    Example("Which of the three?", " answer2", "b", gold="answer2", choices=(" answer1", " answer2", " answer3")),
    Example("A longer question, is it?", " no", "c", gold="no", choices=(" yes", " no", " perhaps", " x")),
]


def test_choice_losses_are_those_of_each_choice_by_itself(tiny_model):
    """The shared reading of the prompt, with padding on both sides, against one plain pass a choice."""
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    for example, (losses, counts) in zip(CHOICES, choice_losses(model, tokenizer, CHOICES), strict=True):
        assert len(losses) == len(counts) == len(example.choices)
        for choice, loss, count in zip(example.choices, losses, counts, strict=True):
            ids = tokenizer(example.prompt + choice)["input_ids"] + [tokenizer.eos_token_id]
            answer = len(choice) + 1  # a token a byte, and the end
            logits = model(input_ids=torch.tensor([ids])).logits[0, -answer - 1 : -1]
            plain = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-answer:]), reduction="sum")
            assert math.isclose(loss, float(plain), rel_tol=1e-4)
            assert count == answer


def test_likelihood_takes_the_likeliest_choice_and_the_loss_is_the_right_ones(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    plain = Example("2 + 2 =", " 4", "d")
    mixed = [CHOICES[0], plain, *CHOICES[1:]]
    found = measure(model, tokenizer, mixed)
    assert "likelihood" not in found[1]
    assert math.isclose(found[1]["loss_sum"], answer_losses(model, encode([plain], tokenizer), 0)[0][0], rel_tol=1e-4)
    for example, row, (losses, _) in zip(
        CHOICES, [found[0], *found[2:]], choice_losses(model, tokenizer, CHOICES), strict=True
    ):
        right = example.choices.index(example.answer)
        assert row["loss_sum"] == losses[right]
        assert row["likelihood"] == float(losses[right] == min(losses))


def test_equally_likely_choices_are_no_choice(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    torch.nn.init.zeros_(model.lm_head.weight)
    (row,) = measure(model, tokenizer, [Example("Q?", " a", "e", choices=(" a", " b"))])
    assert row["likelihood"] == 0.0


def test_samples_are_as_many_as_wanted_and_those_of_the_seed(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    decoding = Decoding(max_new_tokens=5, samples=3, temperature=1.0, top_p=0.9)
    before = torch.random.get_rng_state()
    first = complete(model, tokenizer, CHOICES, decoding, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [len(texts) for texts in first] == [3, 3, 3]
    assert len(set(first[0])) > 1
    assert first == complete(model, tokenizer, CHOICES, decoding, seed=1)
    assert first != complete(model, tokenizer, CHOICES, decoding, seed=2)


def test_beams_and_samples_reach_the_model(tiny_model, monkeypatch):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or generate(**options))
    complete(model, tokenizer, CHOICES, Decoding(4, beams=4))
    complete(model, tokenizer, CHOICES, Decoding(4, samples=2, temperature=0.2, top_p=0.95))
    named = ("num_beams", "do_sample", "num_return_sequences", "temperature", "top_p")
    assert [[options.get(name) for name in named] for options in asked] == [
        [4, False, 1, None, None],
        [1, True, 2, 0.2, 0.95],
    ]


def test_completions_end_before_the_first_stop_text(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    ((whole,),) = complete(model, tokenizer, CHOICES[:1], Decoding(12))
    assert len(whole) > 3
    stop = whole[2]
    ((cut,),) = complete(model, tokenizer, CHOICES[:1], Decoding(12, stop=("never", stop)))
    assert cut == whole[: whole.index(stop)]


class Writer(torch.nn.Linear):
    """In place of a model: writes what it is told, whatever it reads, and keeps that."""

    def __init__(self, written):
        super().__init__(1, 1)
        self.written = written

    def generate(self, input_ids, **_):
        self.read = input_ids
        return torch.cat([input_ids, torch.tensor(self.written)], 1)


def goes_on(tokenizer, prompt, text):
    """The tokens of a text where it stands behind a prompt."""
    (head,) = encode([Example(prompt, "", "a")], tokenizer)
    return tokenizer(prompt + text)["input_ids"][len(head["prompt_ids"]) :]


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@given(st.text("  ab\n:x", max_size=12))
def test_completions_keep_their_blanks(metaspace, tiny_model, kind, text):
    """Llama 2's tokenizer takes a blank away where a text begins; a function's body would lose its indentation."""
    tokenizer = metaspace if kind == "metaspace" else AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["def f():\n", "Q:"]
    written = goes_on(tokenizer, prompts[0], text)
    assert written == goes_on(tokenizer, prompts[1], text)
    ended = [[*written, tokenizer.eos_token_id, tokenizer.pad_token_id]] * 2
    model = Writer(ended)
    batch = [Example(prompt, " 1", "a", bare=bare) for prompt, bare in zip(prompts, (False, True), strict=True)]
    assert complete(model, tokenizer, batch, Decoding(20)) == [[text], [text]]
    shown = tokenizer.batch_decode(model.generate(model.read), skip_special_tokens=True)
    assert shown == [prompt + text for prompt in prompts]


def test_a_letter_that_the_tokenizer_does_not_know_is_not_taken_away(metaspace, monkeypatch):
    monkeypatch.setattr("diablo_theory.finetune.evaluate._LEAD", "é")
    assert continuations(metaspace, torch.tensor([goes_on(metaspace, "Q:", "éa")])) == ["a"]
    assert continuations(metaspace, torch.tensor([goes_on(metaspace, "Q:", "a")])) == ["a"]


def test_a_bare_prompt_stays_bare_when_it_is_measured(metaspace):
    """With choices too, whose examples are made in the measuring."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(metaspace), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    example = Example("Q:", " a", "e", choices=(" a", " b"), bare=True)
    ((losses, _),) = choice_losses(model, metaspace, [example])
    alone, _ = answer_losses(model, encode([replace(example, choices=())], metaspace), metaspace.pad_token_id)
    other, _ = answer_losses(model, encode([replace(example, bare=False)], metaspace), metaspace.pad_token_id)
    assert math.isclose(losses[0], alone[0], rel_tol=1e-4)
    assert not math.isclose(losses[0], other[0], rel_tol=1e-4)


def test_private_texts_do_not_leave(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    examples = [Example("a secret prompt", " a secret answer", "secret cluster")]
    task = Task(
        "secret",
        lambda wanted: examples,
        {"exact": "never"},
        in_both(Decoding(3)),
        in_both(lambda example, completions: {"exact": 0.0}),
        private=True,
    )
    rows = evaluate(model, tokenizer, task, examples, 4, lambda units: None)
    assert "secret" not in rows.to_csv()
    assert rows["prompt"][0] == hashlib.sha256(b"a secret prompt").hexdigest()


def test_samples_do_not_depend_on_the_batch_or_the_place(tiny_model):
    model, tokenizer = load(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    decoding = Decoding(max_new_tokens=5, samples=2, temperature=1.0)
    task = Task("t", lambda wanted: [], {}, in_both(decoding), in_both(lambda example, texts: {}))
    examples = [Example(f"{n} and {n}?", " x", str(n)) for n in range(5)]
    whole, alone = (
        evaluate(model, tokenizer, task, part, size, lambda n: None, seed=3)["completion"].tolist()
        for part, size in ((examples, 4), (examples[2:], 1))
    )
    assert whole[2:] == alone
    assert len(set(whole)) > 1
