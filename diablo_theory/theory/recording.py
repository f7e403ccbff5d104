"""Statistics of a real network: hooks on its linear layers pair each input with the gradient at its output.

Works on any ``nn.Module``: for every use of a layer, X is its input and ``R = -g_Y`` the change of the output that the
loss asks for. Nothing but one batch is kept in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diablo_theory.errors import ConfigError, NonFiniteError, nearest
from diablo_theory.theory.statistics import LayerStatistics

Batch = TypeVar("Batch")


def linear_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` layers of a model by their full names; a layer with several names goes by its first.

    Args:
        model: Any module.
        names: Full names to keep, in this order; all by default.

    Raises:
        ConfigError: If a name is not that of a linear layer, or there is none at all.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise ConfigError("model holds no nn.Linear layer")
    if names is None:
        return found
    if not names:
        raise ConfigError("layers must name at least one nn.Linear layer, got none")
    for name in names:
        if name not in found:
            raise ConfigError(f"no nn.Linear layer is called {name!r}.{nearest(name, found)}")
    return {name: found[name] for name in names}


def record(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    layers: Sequence[str] | None = None,
    keep: Callable[[Batch], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Accumulate every layer's sums over a data set.

    The model is used as it is (call ``model.eval()`` first to leave dropout out). Its parameters, their gradients and
    its hooks are left as they were; only what a forward pass itself changes, such as a batch norm's running mean,
    moves. Parameters get no gradients, so a batch costs a forward pass and the input gradients. Reentrant checkpoints
    hide the layers inside them unless their inputs ask for gradients, as transformers sees to.

    Args:
        model: Any module.
        batches: What ``loss`` takes, one after another, such as a DataLoader.
        loss: Of the model and a batch, a scalar. The functional gradient is that of the sum over batches.
        layers: Names of the ``nn.Linear`` layers to watch. By default all that a token meets on the way to the loss;
            a warning names the others, such as those that a module reads the weights of without calling them.
        keep: Of a batch, a boolean mask of the leading shape of the layers' inputs: which tokens count (leave padding
            out). All by default.
        progress: Called with the number of batches after each.

    Returns:
        Sums by layer, in float64 on the device of the layer's inputs, with R = -g_Y.

    Raises:
        ConfigError: If a layer is unknown.
        TypeError: If keep returns no tensor.
        ValueError: If there is no batch, the loss is no differentiable scalar, a mask does not fit, or a layer met
            no token.
        NonFiniteError: If an activation or a gradient holds a NaN or an infinity.
        RuntimeError: If an input was overwritten in place before the backward pass reached its layer, or gradients
            are out of reach in ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("recording takes gradients; call record outside torch.inference_mode")
    recorder, count = _Recorder(), 0
    watched = linear_layers(model, layers)
    with _frozen(model), ExitStack() as hooks:
        for name, layer in watched.items():
            hooks.callback(layer.register_forward_hook(recorder.watch(name), with_kwargs=True).remove)
        for batch in batches:
            recorder.mask = None if keep is None else _mask(keep(batch))
            torch.autograd.backward(_differentiable(loss(model, batch)))
            count += 1
            if progress is not None:
                progress(count)
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    sums = recorder.sums
    met = [name for name in watched if name in sums and sums[name].tokens]
    if unused := [name for name in watched if name not in met]:
        if layers is not None or not met:
            raise ValueError(f"no token on the way to the loss met the layers {unused}; leave them out of layers")
        warnings.warn(f"no token on the way to the loss met the layers {unused}; they are left out", stacklevel=2)
    return {name: sums[name] for name in met}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradients inside, and are as before afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _mask(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"keep must return a boolean mask, got {type(value).__name__}")
    return value


def _differentiable(value: object) -> Tensor:
    """What a loss returned, if a gradient can start there."""
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ValueError(
            "loss must be differentiable in the outputs of the watched layers, but none of them leads to it: is it "
            "taken under no_grad, from a detached tensor, or past those layers?"
        )
    return value


class _Recorder:
    """The sums so far, and the mask of the batch at hand."""

    def __init__(self) -> None:
        self.sums: dict[str, LayerStatistics] = {}
        self.mask: Tensor | None = None

    def watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        """A forward hook that waits for the gradient at the output, then adds the pair."""

        def forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # a pass that nothing is differentiated through
                return output
            X: Tensor = args[0] if args else kwargs["input"]
            X, version = X.detach(), X._version  # both see later writes into the input
            if not output.requires_grad:  # nothing before this layer asks for gradients: they start here
                output = output.detach().requires_grad_()
            output = output.clone()  # writes into a leaf are refused, and writes into a view lose its hooks

            def backward(gradient: Tensor) -> None:
                if X._version != version:
                    raise RuntimeError(
                        f"the input of layer {name!r} was overwritten in place; use an out-of-place operation"
                    )
                self._add(name, X, -gradient)

            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    def _add(self, name: str, X: Tensor, R: Tensor) -> None:
        if self.mask is not None:
            if self.mask.dtype != torch.bool or self.mask.shape != X.shape[:-1]:
                raise ValueError(
                    f"keep must return a boolean mask of shape {tuple(X.shape[:-1])} for layer {name!r}, got "
                    f"{self.mask.dtype} of shape {tuple(self.mask.shape)}"
                )
            kept = self.mask.to(X.device)
            X, R = X[kept], R[kept]
        if name not in self.sums:
            self.sums[name] = LayerStatistics.empty(X.shape[-1], R.shape[-1], X.device)
        try:
            self.sums[name].add(X, R)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r}: {error}") from error
