"""Statistics of a real network: hooks on its linear layers pair each input with the gradient at its output.

Works on any ``nn.Module``: for every use of a layer, X is its input and ``R = -g_Y`` the change of the output that the
loss asks for. Nothing but one batch is kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from diablo_theory.errors import ConfigError, nearest
from diablo_theory.theory.statistics import LayerStatistics

Batch = TypeVar("Batch")


def linear_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` layers of a model by their full names.

    Args:
        model: Any module.
        names: Full names to keep, in this order; all by default.

    Raises:
        ConfigError: If a name is not that of a linear layer, or there is none at all.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise ConfigError("model holds no nn.Linear layer")
    for name in names or ():
        if name not in found:
            raise ConfigError(f"no nn.Linear layer is called {name!r}.{nearest(name, found)}")
    return found if names is None else {name: found[name] for name in names}


def record(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    layers: Sequence[str] | None = None,
    keep: Callable[[Batch], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Accumulate every layer's sums over a data set.

    The model is used as it is (call ``model.eval()`` first to leave dropout out) and left as it was; its parameters
    get no gradients, so a batch costs a forward pass and the input gradients.

    Args:
        model: Any module.
        batches: What ``loss`` takes, one after another, such as a DataLoader.
        loss: Of the model and a batch, a scalar. The functional gradient is that of the sum over batches.
        layers: Names of the ``nn.Linear`` layers to watch; all by default.
        keep: Of a batch, a boolean mask of the leading shape of the layers' inputs: which tokens count (leave padding
            out). All by default.
        progress: Called with the number of batches after each.

    Returns:
        Sums by layer, in float64 on the layer's device, with R = -g_Y.

    Raises:
        ConfigError: If a layer is unknown.
        ValueError: If there is no batch, the loss is no scalar, a mask does not fit, or a layer was never used.
        NonFiniteError: If an activation or a gradient holds a NaN or an infinity.
        RuntimeError: If an input was overwritten in place before the backward pass reached its layer.
    """
    watched = linear_layers(model, layers)
    sums = {
        name: LayerStatistics.empty(layer.in_features, layer.out_features, layer.weight.device)
        for name, layer in watched.items()
    }
    count = 0
    with _frozen(model), ExitStack() as hooks:
        mask: list[Tensor | None] = [None]
        for name, layer in watched.items():
            handle = layer.register_forward_hook(_watch(name, sums[name], mask))
            hooks.callback(handle.remove)
        for batch in batches:
            mask[0] = None if keep is None else keep(batch)
            value = loss(model, batch)
            if value.ndim:
                raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
            torch.autograd.backward(value)
            count += 1
            if progress is not None:
                progress(count)
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    if unused := [name for name, layer in sums.items() if layer.tokens == 0]:
        raise ValueError(f"layer {unused[0]!r} met no token on the way to the loss; leave it out of layers")
    return sums


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradients inside, and are as before afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _watch(
    name: str, sums: LayerStatistics, mask: list[Tensor | None]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that waits for the gradient at the output, then adds the pair."""

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a pass that nothing is differentiated through
            return output
        X, version, kept = inputs[0].detach(), inputs[0]._version, mask[0]
        if not output.requires_grad:  # nothing before this layer asks for gradients: they start here
            output = output.detach().requires_grad_().clone()

        def backward(gradient: Tensor) -> None:
            if X._version != version:
                raise RuntimeError(
                    f"the input of layer {name!r} was overwritten in place; use an out-of-place operation"
                )
            sums.add(*_selected(X, -gradient, kept))

        output.register_hook(backward)  # type: ignore[no-untyped-call]
        return output

    return forward


def _selected(X: Tensor, R: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    if kept is None:
        return X, R
    if kept.dtype != torch.bool or kept.shape != X.shape[:-1]:
        raise ValueError(f"keep must return a boolean mask of shape {tuple(X.shape[:-1])}, got {tuple(kept.shape)}")
    return X[kept], R[kept]
