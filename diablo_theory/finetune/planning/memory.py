"""Bytes that training and decoding hold on one device, as transformers' Llama and torch's autograd keep them."""

from __future__ import annotations

from dataclasses import dataclass

from diablo_theory.finetune.planning.flow import Flow, flows
from diablo_theory.finetune.planning.quantised import (
    dense_bytes,
    kept_dense_bytes,
    largest_dense_bytes,
    stored_bytes,
)
from diablo_theory.finetune.planning.shapes import Shapes
from diablo_theory.finetune.planning.trainable import LORAS, WHOLE, Target, Trained
from diablo_theory.finetune.planning.work import DTYPE_BYTES, Work

#: What RMSNorm, the loss and the attention's log-sum keep, whatever the model's dtype.
FLOAT32 = 4
#: Tensors of (tokens, hidden) in float32 alive at once in the backward pass of an RMSNorm, its saved input included.
NORM_BACKWARD = 6
#: Matrices of logits in float32 at once: the saved log-softmax, its gradient and the gradient of the logits.
LOGITS_BACKWARD = 3
#: Methods that keep the product of the input with their first factor.
INNER = (*LORAS, "dora", "lora-fa", "miss")
#: And not the input itself: nothing that multiplies it trains.
INNER_ALONE = ("lora-fa", "miss")
#: Which matrices read the same tensor; it is kept once.
_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


@dataclass(frozen=True)
class Memory:
    """One device's memory, in bytes.

    Attributes:
        weights_bytes: The base model.
        adapter_bytes: What a method adds to it.
        optimizer_bytes: AdamW's two moments.
        gradients_bytes: Of what trains (with DDP, its buckets too).
        activations_bytes: Saved for the backward pass by the decoder layers.
        logits_bytes: The loss with its gradients, where they are largest.
        step_bytes: The most that one step holds at once beside weights, adapter and optimizer. Activations, logits and
            gradients are not all at their largest at one time, and the working tensors of a layer come to them.
        cache_bytes: Keys and values while decoding.
        decoding_bytes: The most that decoding holds beside weights and adapter.
    """

    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int
    step_bytes: int
    cache_bytes: int
    decoding_bytes: int

    @property
    def training_bytes(self) -> int:
        """The peak of training."""
        return self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.step_bytes

    @property
    def evaluating_bytes(self) -> int:
        """The peak of decoding in the same process: the optimizer's moments are still there."""
        return self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.decoding_bytes

    @property
    def peak_bytes(self) -> int:
        """The larger of the two."""
        return max(self.training_bytes, self.evaluating_bytes)


def memory(shapes: Shapes, trained: Trained, work: Work, *, foreach: bool = True) -> Memory:
    """What one device holds, for the longest batch.

    Args:
        shapes: The model.
        trained: The method on it.
        work: Batch, lengths, precision, sharding.
        foreach: AdamW updates all tensors at once, as torch does on a GPU, with a copy as large as all that trains.

    Source: the tensors that autograd saves in ``transformers.models.llama`` 5.23 with SDPA attention, torch 2.13's
    AdamW, peft 0.21's LoRA and torchao 0.18; the tests measure them.
    """
    parts = work.devices if work.sharding == "fsdp" else 1
    weights, adapter = _weights(shapes, trained, work)
    own = trained.parameters * DTYPE_BYTES[work.adapter_dtype]
    buckets = own if work.devices > 1 and work.sharding == "ddp" else 0
    gradients = own // parts + buckets
    activations, logits, step = _step(shapes, trained, work, gradients, own // parts if foreach else 0)
    gathered = 2 * _layer_weights(shapes, work) if parts > 1 else 0
    cache = key_value_bytes(shapes, work)
    return Memory(
        weights_bytes=weights // parts + gathered,
        adapter_bytes=adapter // parts,
        optimizer_bytes=2 * trained.moments * DTYPE_BYTES[work.adapter_dtype] // parts,
        gradients_bytes=gradients,
        activations_bytes=activations,
        logits_bytes=logits,
        step_bytes=step,
        cache_bytes=cache,
        decoding_bytes=cache + _decoding_work(shapes, work) if work.scored else 0,
    )


def key_value_bytes(shapes: Shapes, work: Work) -> int:
    """Keys and values of the largest batch that is being decoded, at its end."""
    tokens = max((task.at_once * (work.eval_prompt + task.new_tokens) for task in work.scored), default=0)
    return round(2 * shapes.layers * shapes.kv_heads * shapes.head_dim * tokens * DTYPE_BYTES[work.dtype])


def saved_by_layer(shapes: Shapes, trained: Trained, flow: Flow, work: Work, length: int) -> int:
    """Bytes that autograd keeps of one decoder layer for a micro batch of sequences of ``length`` positions."""
    tokens, size = work.micro * length, DTYPE_BYTES[work.dtype]
    norm = FLOAT32 * (shapes.hidden + 1)
    saved = norm * (flow.into + flow.middle)
    if flow.attention:
        saved += _attention(shapes, work, length, size)
    # SiLU keeps its input; the product keeps each factor that the other's gradient needs.
    saved += shapes.intermediate * size * (2 * flow.gate + flow.up)
    return tokens * (saved + _inputs(shapes, trained, flow, work, size)) + kept_dense_bytes(shapes, flow, work)


def _attention(shapes: Shapes, work: Work, length: int, size: int) -> int:
    """For one token: queries, the output, keys, values, the log of the normaliser, and the mask if there is one."""
    width = shapes.heads * shapes.head_dim
    # With a mask transformers repeats grouped keys and values for every query head.
    kept = width if work.padded else shapes.kv_heads * shapes.head_dim
    mask = length * size if work.padded else 0
    return 2 * (width + kept) * size + shapes.heads * FLOAT32 + mask


def _inputs(shapes: Shapes, trained: Trained, flow: Flow, work: Work, size: int) -> int:
    """For one token: what the adapted matrices of a layer keep, their inputs first of all."""
    own = DTYPE_BYTES[work.adapter_dtype]
    targets = [target for target in trained.targets if target.layer == flow.layer]
    kept = trained.knob * own * len(targets) if trained.method in INNER else 0
    if trained.method == "dora":  # the frozen output and the low-rank one, which the magnitude multiplies
        kept += sum(target.m2 for target in targets) * (own + size)
    if trained.method in INNER_ALONE:
        return kept
    if work.dropout and trained.method not in WHOLE:  # what is left of the input, and a byte of mask
        return kept + sum(target.m1 for target in targets) * (own + 1)
    if _casts(trained, work):
        return kept + sum(target.m1 for target in targets) * own
    return kept + size * sum(_once(targets, flow).values())


def _casts(trained: Trained, work: Work) -> bool:
    """Each adapted layer casts its input to the adapter's dtype for itself."""
    return not trained.is_inside and DTYPE_BYTES[work.adapter_dtype] != DTYPE_BYTES[work.dtype]


def _once(targets: list[Target], flow: Flow) -> dict[str, int]:
    """Width of each tensor that adapted matrices read; attention's own output is kept anyway."""
    read = {_INPUTS.get(target.name, target.name): target.m1 for target in targets}
    if flow.attention:
        read.pop("o_proj", None)
    return read


def _weights(shapes: Shapes, trained: Trained, work: Work) -> tuple[int, int]:
    size, own = DTYPE_BYTES[work.dtype], DTYPE_BYTES[work.adapter_dtype]
    if trained.method in WHOLE:
        autocast = trained.parameters * size if own != size else 0  # the cast weights, kept for the backward pass
        return (shapes.parameters - trained.parameters) * size + trained.parameters * own + autocast, 0
    stored = shapes.layers * (stored_bytes(shapes, work) - dense_bytes(shapes, work))
    return shapes.parameters * size + stored, trained.parameters * own


def _layer_weights(shapes: Shapes, work: Work) -> int:
    if work.method in WHOLE:
        return shapes.layer_products * DTYPE_BYTES[work.adapter_dtype]
    return stored_bytes(shapes, work)


def _step(shapes: Shapes, trained: Trained, work: Work, gradients: int, update: int) -> tuple[int, int, int]:
    """Saved activations, logits, and the peak of a step."""
    if not trained.targets:
        return 0, 0, 0
    tokens, size = work.micro * work.longest, DTYPE_BYTES[work.dtype]
    layers = [
        saved_by_layer(shapes, trained, flow, work, work.longest)
        for flow in flows(trained, shapes.layers, work.gradient_checkpointing)
    ]
    inputs, again = shapes.layers * tokens * shapes.hidden * size, 0
    if work.gradient_checkpointing:
        # In float32 the norm keeps the layer's input itself, which is there already.
        again = max(layers) - (tokens * shapes.hidden * FLOAT32 if size >= FLOAT32 else 0)
    activations = inputs if work.gradient_checkpointing else sum(layers)
    logits = LOGITS_BACKWARD * FLOAT32 * work.micro * work.longest_kept * shapes.vocab
    hidden = FLOAT32 * tokens * shapes.hidden
    working = again + _layer_backward(shapes, trained, work, tokens)
    start = activations + max(hidden + logits, NORM_BACKWARD * hidden, working)
    last_layer = inputs // shapes.layers if work.gradient_checkpointing else max(layers)
    end = last_layer + working + gradients
    if work.accumulation > 1:  # the gradients of earlier micro batches wait
        start += gradients
    else:
        start += gradients // len({target.layer for target in trained.targets})
    return activations, logits, max(start, end, gradients + update)


def _layer_backward(shapes: Shapes, trained: Trained, work: Work, tokens: int) -> int:
    """The MLP's backward pass: gradients of its output and of the product's two factors."""
    product_was_saved = any(target.name == "down_proj" for target in trained.targets)
    wide = 2 if product_was_saved else 3
    cast = shapes.intermediate * DTYPE_BYTES[work.adapter_dtype] if _casts(trained, work) else 0
    return tokens * (DTYPE_BYTES[work.dtype] * (shapes.hidden + wide * shapes.intermediate) + cast)


def _decoding_work(shapes: Shapes, work: Work) -> int:
    """The prompt's forward pass at its widest, or the logits of a step with their float32 copy."""
    size, sequences = DTYPE_BYTES[work.dtype], max(task.at_once for task in work.scored)
    layer = sequences * work.eval_prompt * (2 * shapes.hidden + 3 * shapes.intermediate) * size
    layer += largest_dense_bytes(shapes, work)
    logits = sequences * shapes.vocab * (size + 2 * FLOAT32)
    return round(max(layer, logits))
