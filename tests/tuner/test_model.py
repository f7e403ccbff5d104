import pytest
import torch
from torch import nn

from diablo_theory.tuner import DiaBloLinear, add_diablo, merge_diablo
from diablo_theory.tuner.model import target_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 12)
        self.mix = nn.Conv1d(12, 12, 1)
        self.down_proj = nn.Linear(12, 6)

    def forward(self, x):
        return self.down_proj(self.q_proj(x).relu())


def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Block(), "b": Block()})


def test_targets_match_by_suffix_in_the_models_order():
    assert list(target_layers(network(), ["down_proj", "a.q_proj"])) == ["a.q_proj", "a.down_proj", "b.down_proj"]


def test_add_train_merge_round_trip():
    model = network()
    adapted = add_diablo(model, 3, ["q_proj", "down_proj"])
    assert list(adapted) == ["a.q_proj", "a.down_proj", "b.q_proj", "b.down_proj"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".diablo_" in name for name in trainable)
    x = torch.randn(5, 12)
    start = model["a"](x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model["a"](x).square().sum().backward()
    optimizer.step()
    after = model["a"](x)
    assert not torch.allclose(after, start)
    assert merge_diablo(model) == 4
    assert not any(isinstance(module, DiaBloLinear) for module in model.modules())
    torch.testing.assert_close(model["a"](x), after)


@pytest.mark.parametrize(
    ("num_blocks", "targets", "kind", "message"),
    [
        (3, ["q_porj"], ValueError, "no module is named 'q_porj'. Did you mean 'q_proj'"),
        (3, [], ValueError, "non-empty list"),
        (3, "q_proj", ValueError, "non-empty list of module names, got 'q_proj'"),
        (3, ["q_proj", "mix"], TypeError, "a.mix is a Conv1d, not a torch.nn.Linear"),
        (13, ["q_proj"], ValueError, "a.q_proj: num_blocks must be at most 12"),
        (1.5, ["q_proj"], TypeError, "num_blocks must be an integer"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(num_blocks, targets, kind, message):
    model = network()
    with pytest.raises(kind, match=message):
        add_diablo(model, num_blocks, targets)
    assert not any(isinstance(module, DiaBloLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_refused():
    model = network()
    model["b"].q_proj.weight = model["a"].q_proj.weight
    with pytest.raises(ValueError, match=r"weight of a.q_proj is tied to b.q_proj.weight"):
        add_diablo(model, 3, ["q_proj"])


def test_adding_twice_is_refused():
    model = network()
    add_diablo(model, 3, ["q_proj"])
    with pytest.raises(TypeError, match="already has DiaBlo layers"):
        add_diablo(model, 3, ["down_proj"])
