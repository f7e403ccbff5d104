import math

import pytest
import torch

from diablo_theory.errors import ConfigError
from diablo_theory.theory.architectures import MLP, AttentionBlock
from diablo_theory.theory.arithmetic import gaussian, seeded

BY_HAND = {
    "tanh": math.tanh,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
}


def weights_of(*shapes):
    generator = seeded(0)
    return [gaussian(m1, m2, generator) / m1**0.5 for m1, m2 in shapes]


def times(row, weight):
    return [sum(x * float(weight[i, j]) for i, x in enumerate(row)) for j in range(weight.shape[1])]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("activation", BY_HAND)
def test_an_mlp_is_what_a_loop_over_entries_says(activation, head):
    weights = weights_of((3, 5), (5, 4), (4, 2))
    inputs = gaussian(6, 3, seeded(1))
    network = MLP(2, activation, head=True) if head else MLP(3, activation)
    output = network(inputs, lambda layer, X: X @ weights[layer])
    for row, found in zip(inputs.tolist(), output.tolist(), strict=True):
        hidden = [BY_HAND[activation](y) for y in times(row, weights[0])]
        last = times(hidden, weights[1])
        if not head:
            last = [BY_HAND[activation](y) for y in last]
        assert found == pytest.approx(times(last, weights[2]), rel=1e-12, abs=1e-12)


def attention_by_hand(sequence, weights, activation):
    """One sequence, token by token; each looks at itself and at those before it."""
    queries, keys, values = ([times(token, w) for token in sequence] for w in weights[:3])
    outputs = []
    for t, token in enumerate(sequence):
        scores = [sum(q * k for q, k in zip(queries[t], key, strict=True)) / len(key) ** 0.5 for key in keys[: t + 1]]
        total = sum(math.exp(score) for score in scores)
        mixed = [
            sum(math.exp(score) * value[j] for score, value in zip(scores, values, strict=False)) / total
            for j in range(len(values[0]))
        ]
        stream = [x + y for x, y in zip(token, times(mixed, weights[3]), strict=True)]
        hidden = [BY_HAND[activation](y) for y in times(stream, weights[4])]
        outputs.append([x + y for x, y in zip(stream, times(hidden, weights[5]), strict=True)])
    return outputs


@pytest.mark.parametrize("activation", BY_HAND)
def test_an_attention_block_is_what_a_loop_over_tokens_says(activation):
    weights = weights_of((4, 3), (4, 3), (4, 5), (5, 4), (4, 6), (6, 4))
    inputs = gaussian(6, 4, seeded(1))
    output = AttentionBlock(3, activation)(inputs, lambda layer, X: X @ weights[layer])
    for start in (0, 3):
        expected = attention_by_hand(inputs[start : start + 3].tolist(), weights, activation)
        torch.testing.assert_close(
            output[start : start + 3], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_an_architecture_applies_each_layer_once_and_in_order():
    for architecture in (MLP(3), MLP(2, "relu", head=True), AttentionBlock(2)):
        used = []

        def apply(layer, X, used=used):
            used.append(layer)
            return X

        architecture(torch.zeros(4, 3), apply)
        assert used == list(range(architecture.layers))


def test_names_say_what_differs():
    assert MLP(2).name == "tanh MLP"
    assert MLP(1, "relu", head=True).name == "relu MLP with a head"
    assert AttentionBlock(3).name == "gelu attention block of 3 tokens"


@pytest.mark.parametrize("make", [lambda: MLP(2, "tahn"), lambda: AttentionBlock(2, "tahn")])
def test_an_unknown_activation_names_the_nearest(make):
    with pytest.raises(ConfigError, match=r"unknown activation 'tahn'\. Did you mean 'tanh'\?"):
        make()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (4, 2), (4, 4)), "queries and keys must be as wide, got 3 and 2"),
        (((4, 3), (4, 3), (4, 5), (5, 3)), "a branch must have the width of its input, 4, got 3"),
        (((4, 3), (4, 3), (4, 5), (5, 1)), "a branch must have the width of its input, 4, got 1"),
        (((4, 3), (4, 3), (4, 5), (5, 4), (4, 6), (6, 5)), "a branch must have the width of its input, 4, got 5"),
    ],
)
def test_attention_widths_that_do_not_fit_are_named(shapes, message):
    weights = weights_of(*shapes)
    with pytest.raises(ValueError, match=message):
        AttentionBlock(3)(torch.zeros(6, 4).double(), lambda layer, X: X @ weights[layer])


def test_rows_that_are_no_whole_sequences_are_named():
    with pytest.raises(ValueError, match="inputs must hold whole sequences of 4 tokens, got 6 rows"):
        AttentionBlock(4)(torch.zeros(6, 4), lambda layer, X: X)
