import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.recording import linear_layers, record


def network(*modules, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(*modules).to(dtype)


def square(model, batch):
    return model(batch).square().sum()


def some(*shape, seed=0):
    return gaussian(math.prod(shape[:-1]), shape[-1], seeded(seed)).reshape(shape)


def cross_of(sums):
    return np.ldexp(sums.cross.numpy(), sums.x_exponent + sums.r_exponent)


def accumulated(model, batches, loss):
    """Every weight's gradient, as autograd adds it up over the batches."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    found = {name: layer.weight.grad for name, layer in linear_layers(model).items()}
    model.zero_grad()
    return {name: grad.double().numpy() for name, grad in found.items() if grad is not None}


def assert_gradients(model, batches, loss, rtol=1e-10, **kwargs):
    expected = accumulated(model, batches, loss)
    sums = record(model, batches, loss, **kwargs)
    assert sums
    for name, layer in sums.items():
        scale = np.abs(expected[name]).max()
        assert scale > 0
        np.testing.assert_allclose(-cross_of(layer).T, expected[name], rtol=rtol, atol=rtol * scale, err_msg=name)
    return sums


class Gated(nn.Module):
    """Writes into parts of a layer's output."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(5, 6)

    def forward(self, x):
        both = self.both(x)
        both[..., :3].mul_(3)
        both[..., 4] = 1.0
        return both


class Twice(nn.Module):
    """One layer used twice in a forward pass, another known by two names, a third on a branch without gradients."""

    def __init__(self):
        super().__init__()
        self.loop = nn.Linear(5, 5)
        self.first = nn.Linear(5, 5, bias=False)
        self.second = self.first
        self.target = nn.Linear(5, 5)

    def forward(self, x):
        h = self.second(self.loop(torch.tanh(self.loop(x)))) + self.first(x)
        with torch.no_grad():
            aim = self.target(x) + self.loop(x)
        return h - aim


NETWORKS = {
    "bias": lambda: network(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    "no bias": lambda: network(nn.Linear(5, 7, bias=False), nn.GELU(), nn.Linear(7, 3, bias=False)),
    "in-place": lambda: network(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3), nn.ReLU(inplace=True)),
    "in-place through views": lambda: network(Gated(), nn.Linear(6, 3)),
    "dropout in eval": lambda: network(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)).eval(),
    "norm": lambda: network(nn.LayerNorm(5), nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,)])
def test_cross_sums_are_the_gradients_that_autograd_accumulates(name, shape):
    model, batches = NETWORKS[name](), [some(*shape, seed=seed) for seed in range(3)]
    sums = assert_gradients(model, batches, square)
    assert {layer.tokens for layer in sums.values()} == {3 * math.prod(shape[:-1])}


def test_grams_and_squares_are_those_of_inputs_and_output_gradients():
    model, batches = NETWORKS["bias"](), [some(6, 5, seed=seed) for seed in range(2)]
    sums = record(model, batches, square)
    X = torch.cat(batches)
    hidden = torch.tanh(X @ model[0].weight.T + model[0].bias)
    g = 2 * (hidden @ model[2].weight.T + model[2].bias)
    for name, inputs, gradient in (
        ("0", X, (g @ model[2].weight) * (1 - hidden**2)),
        ("2", hidden, g),
    ):
        layer = sums[name]
        gram = np.ldexp(layer.gram.numpy(), 2 * layer.x_exponent)
        np.testing.assert_allclose(gram, (inputs.T @ inputs).detach().numpy(), rtol=1e-10)
        total = math.ldexp(float(layer.square), 2 * layer.r_exponent)
        assert total == pytest.approx(gradient.square().sum().item(), rel=1e-10)


def test_uses_of_one_layer_add_up_and_passes_without_gradients_do_not_count():
    torch.manual_seed(0)
    model = Twice().double()
    sums = assert_gradients(model, [some(6, 5, seed=seed) for seed in range(2)], square, layers=["first", "loop"])
    assert {name: layer.tokens for name, layer in sums.items()} == {"first": 24, "loop": 24}
    unmet = r"no token on the way to the loss met the layers \['target'\]; "
    with pytest.warns(UserWarning, match=unmet + "they are left out"):
        assert set(record(model, [some(6, 5)], square)) == {"first", "loop"}
    with pytest.raises(ValueError, match=unmet + "leave them out of layers"):
        record(model, [some(6, 5)], square, layers=["first", "target"])


def test_layers_come_in_the_order_of_their_names():
    model = NETWORKS["bias"]()
    assert list(record(model, [some(6, 5)], square)) == ["0", "2"]
    assert list(record(model, [some(6, 5)], square, layers=["2", "0"])) == ["2", "0"]


@pytest.mark.parametrize("watched", [["0"], ["2"]])
def test_some_layers_only_and_inputs_by_name(watched):
    class Named(nn.Sequential):
        def forward(self, batch):
            return self[2](input=torch.tanh(self[0](input=batch)))

    model = Named(*NETWORKS["bias"]())
    sums = assert_gradients(model, [some(6, 5)], square, layers=watched)
    assert list(sums) == watched


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_block(training):
    """In eval mode PyTorch has a fast path past the layers; hooks must not be lost on it."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    batches = [some(2, 3, 8, seed=seed) for seed in range(2)]
    sums = assert_gradients(model, batches, square, layers=["linear1", "linear2"], rtol=1e-9)
    assert sums["linear1"].tokens == 12
    unseen = r"met the layers \['self_attn.out_proj'\]"  # multi-head attention reads its weight, never calls it
    with pytest.warns(UserWarning, match=unseen):
        assert set(record(model, batches, square)) == {"linear1", "linear2"}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_a_llama_with_and_without_gradient_checkpointing(tiny_model, checkpointing):
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    batches = [torch.randint(1, 200, (2, 7), generator=seeded(seed)) for seed in range(2)]
    watched = [name for name in linear_layers(model) if name != "lm_head"]  # tied: its gradient is the embedding's too

    def next_token(model, tokens):
        return model(tokens, labels=tokens).loss

    sums = assert_gradients(model, batches, next_token, rtol=2e-5, layers=watched)
    assert len(sums) == 14
    assert {layer.tokens for layer in sums.values()} == {28}
    assert all(layer.tokens_by_precision[0] == 0 < layer.tokens for layer in sums.values())
    assert record(model, batches, next_token)["lm_head"].tokens == 28


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_that_no_gradient_enters_are_named():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[1](torch.utils.checkpoint.checkpoint(self[0], x, use_reentrant=True))

    model = Checkpointed(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    assert record(model, [some(6, 5).requires_grad_()], square)["0"].tokens == 6
    with pytest.raises(ValueError, match=r"no token on the way to the loss met the layers \['0'\]"):
        record(model, [some(6, 5)], square, layers=["0", "1"])


def test_low_precision_models():
    model = network(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), dtype=torch.bfloat16)
    batch = some(6, 5).bfloat16()
    sums = assert_gradients(model, [batch], square, rtol=2**-6)
    assert all(layer.gram.dtype == torch.float64 and layer.tokens_by_precision[0] == 0 for layer in sums.values())


# Masks


def test_masks_leave_tokens_out():
    model, x = NETWORKS["bias"](), some(2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kept = record(model, [(x, mask)], lambda m, b: square(m, b[0]), keep=lambda b: b[1])
    expected = record(model, [x[mask]], square)
    for name, layer in kept.items():
        assert layer.tokens == 3
        np.testing.assert_allclose(cross_of(layer), cross_of(expected[name]), rtol=1e-12, atol=1e-14)


def test_a_mask_that_keeps_nothing_is_a_batch_without_tokens():
    model, x = NETWORKS["bias"](), some(6, 5)
    masks = iter([torch.zeros(6).bool(), torch.ones(6).bool()])
    assert record(model, [x, x], square, keep=lambda _: next(masks))["0"].tokens == 6
    with pytest.raises(ValueError, match=r"met the layers \['0', '2'\]"):
        record(model, [x], square, keep=lambda _: torch.zeros(6).bool())


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(6), r"torch\.float32 of shape \(6,\)"),
        (torch.ones(5).bool(), r"torch\.bool of shape \(5,\)"),
        (torch.ones(6, 5).bool(), r"torch\.bool of shape \(6, 5\)"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, got):
    with pytest.raises(ValueError, match=rf"keep must return a boolean mask of shape \(6,\) for layer '2', got {got}"):
        record(NETWORKS["bias"](), [some(6, 5)], square, keep=lambda _: mask)


def test_a_mask_that_was_forgotten_is_named():
    with pytest.raises(TypeError, match="keep must return a boolean mask, got NoneType"):
        record(NETWORKS["bias"](), [some(6, 5)], square, keep=lambda _: None)


# What is left behind


def state(model):
    return (
        [
            (name, p.requires_grad, p.grad is None or p.grad.clone(), p.detach().clone())
            for name, p in model.named_parameters()
        ],
        [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
            for name, m in model.named_modules()
        ],
    )


def unchanged(before, after):
    return before[1] == after[1] and all(
        one[:2] == two[:2]
        and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one[2:], two[2:], strict=True))
        for one, two in zip(before[0], after[0], strict=True)
    )


def half_trained():
    model = NETWORKS["norm"]()
    model[1].weight.requires_grad_(False)
    square(model, some(6, 5)).backward()
    model[3].register_forward_hook(lambda *_: None)
    return model


def test_a_model_is_left_as_it_was():
    model = half_trained()
    before, x = state(model), some(6, 5, seed=1)
    outputs, seen = model(x).detach(), []
    record(model, [x], lambda m, b: seen.append(m(b)) or seen[-1].square().sum())
    assert torch.equal(seen[0], outputs)
    assert torch.equal(model(x), outputs)
    assert unchanged(before, state(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["batches", "loss", "backward", "keep", "progress"])
def test_a_model_is_left_as_it_was_by_errors_anywhere(error, where):
    model = half_trained()
    before = state(model)

    def fail(*_):
        raise error

    def batches():
        yield some(6, 5)
        if where == "batches":
            fail()

    def loss(model, batch):
        output = model(batch)
        if where == "backward":
            output.register_hook(fail)
        return fail() if where == "loss" else output.square().sum()

    hooks = {name: fail for name in ("keep", "progress") if name == where}
    with pytest.raises(error):
        record(model, batches(), loss, **hooks)
    assert unchanged(before, state(model))
    assert record(model, [some(6, 5)], square)["1"].tokens == 6


def test_only_one_batch_is_kept_in_memory():
    model, arrays = NETWORKS["bias"](), []

    def batches():
        for seed in range(3):
            array = np.random.default_rng(seed).standard_normal((6, 5))
            arrays.append(weakref.ref(array))
            yield torch.from_numpy(array)  # keeps the array alive for as long as the tensor's memory is

    def loss(model, batch):
        gc.collect()
        assert [reference() is None for reference in arrays] == [True] * (len(arrays) - 1) + [False]
        return square(model, batch)

    record(model, batches(), loss)
    assert len(arrays) == 3


def test_gradients_are_taken_even_where_they_are_off():
    model = NETWORKS["bias"]()
    with torch.no_grad():
        sums = record(model, [some(6, 5)], square)
    assert sums["0"].tokens == 6
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call record outside torch\.inference_mode"):
        record(model, [some(6, 5)], square)


def test_progress_counts_batches():
    counts = []
    record(NETWORKS["bias"](), [some(6, 5)] * 3, square, progress=counts.append)
    assert counts == [1, 2, 3]


# Bad input


def test_unknown_layers_are_named_with_the_nearest():
    model = nn.ModuleDict({"query": nn.Linear(5, 5), "key": nn.Linear(5, 5)})
    assert list(linear_layers(model, ["key"])) == ["key"]
    with pytest.raises(ConfigError, match=r"no nn.Linear layer is called 'querry'. Did you mean 'query'\?"):
        linear_layers(model, ["key", "querry"])
    with pytest.raises(ConfigError, match=r"layers must name at least one nn\.Linear layer, got none"):
        linear_layers(model, [])
    with pytest.raises(ConfigError, match=r"model holds no nn\.Linear layer"):
        linear_layers(nn.ReLU())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b).square(), r"loss must return a scalar tensor, got shape \(6, 3\)"),
        (lambda m, b: m(b).sum().reshape(1), r"loss must return a scalar tensor, got shape \(1,\)"),
        (lambda m, b: m(b).sum().item(), "loss must return a scalar tensor, got a float"),
        (lambda m, b: None, "loss must return a scalar tensor, got a NoneType"),
        (lambda m, b: m(b).sum().detach(), "none of them leads to it: is it taken under no_grad, from a detached"),
        (lambda m, b: b.sum(), "loss must be differentiable in the outputs of the watched layers"),
    ],
)
def test_losses_that_cannot_be_differentiated_are_named(loss, message):
    with pytest.raises(ValueError, match=message):
        record(NETWORKS["bias"](), [some(6, 5)], loss)


def test_no_batch_is_named():
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        record(NETWORKS["bias"](), [], square)


def test_a_layer_past_the_loss_is_named():
    model = NETWORKS["bias"]()
    with pytest.raises(ValueError, match=r"met the layers \['2'\]; leave them out of layers"):
        record(model, [some(6, 5)], lambda m, b: (m(b).detach().sum() + m[0](b)).sum(), layers=["0", "2"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b * math.nan).sum(), "layer '2': X holds a NaN or an infinity"),
        (lambda m, b: m(b).sum() * math.inf, "layer '2': R holds a NaN or an infinity"),
    ],
)
def test_numbers_that_are_not_finite_are_named_with_their_layer(loss, message):
    model = NETWORKS["bias"]()
    before = state(model)
    with pytest.raises(NonFiniteError, match=message):
        record(model, [some(6, 5)], loss)
    assert unchanged(before, state(model))


def test_an_input_overwritten_in_place_is_named():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5, dtype=torch.float64)

        def forward(self, x):
            h = x * 1.0
            h += self.inner(h)
            return h

    with pytest.raises(RuntimeError, match="the input of layer 'inner' was overwritten in place; use an out-of-place"):
        record(Residual(), [some(6, 5)], square)
