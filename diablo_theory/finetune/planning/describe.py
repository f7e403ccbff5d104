"""A plan in words: the rows of its table and the comment at the head of a run file."""

from __future__ import annotations

from collections.abc import Iterator

from diablo_theory.finetune.planning.estimate import GIB, Plan, sharded_until_it_fits
from diablo_theory.finetune.planning.work import Work
from diablo_theory.quantise import QuantiseConfig

Row = tuple[str, str, str]


def header(plan: Plan) -> str:
    """What a full run needs, as comment lines for the head of its run file: model, data, hardware, time.

    One that does not fit is described on as many devices, with FSDP, as it fits on.
    """
    alone = plan
    if plan.fits == "no":
        plan = sharded_until_it_fits(plan) or plan
    work, shapes, ours = plan.work, plan.shapes, plan.trained
    count = f"{plan.steps:,} steps of {work.batch_size}" if plan.steps else "no training"
    lines = [
        f"Model: {shapes.name}, {shapes.parameters:,} parameters; {ours.label} on "
        f"{', '.join(work.target_modules)}: {ours.parameters:,} trainable ({ours.percent:.3f}%)",
        f"Data: {_examples(work)} of about {work.prompt_tokens + work.answer_tokens:.0f} tokens, {count}; "
        + (f"{work.eval_items:,} problems to decode" if work.scored else "nothing to decode"),
        f"Hardware: {_devices(plan)}; needs {plan.peak_gib:.1f} of the {plan.device_gib:.1f} GiB of each "
        f"(fits: {plan.fits}); weights in {work.dtype}"
        + (", FSDP" if _is_sharded(plan) else "")
        + (f"; {_devices(alone)} would need {alone.peak_gib:.1f} (fits: {alone.fits})" if alone is not plan else ""),
        f"Time: training {duration(plan.train_seconds_low, plan.train_seconds_high)} at "
        f"{_share(plan.device.training)} of the peak rate"
        + (f", decoding {duration(plan.eval_seconds_low, plan.eval_seconds_high)}" if work.scored else "")
        + (f"; quantising the base ({_base(work.quantise)}) is not counted" if work.quantise else ""),
        "Computed by `diablo-theory plan`; token counts and the share of the peak rate are assumptions.",
    ]
    return "\n".join(f"# {line}" for line in lines)


def rows(plan: Plan) -> Iterator[Row]:
    """The rows of :meth:`Plan.table`."""
    yield from _model_rows(plan)
    if plan.steps:
        yield from _work_rows(plan)
        yield from _flop_rows(plan)
    yield from _memory_rows(plan)
    yield from _time_rows(plan)


def _model_rows(plan: Plan) -> Iterator[Row]:
    shapes, ours = plan.shapes, plan.trained
    yield "model", shapes.name, f"shapes from {shapes.source}"
    yield "parameters", f"{shapes.parameters:,}", "counted on the meta device, shared ones once"
    yield "method", ours.label, f"{len(ours.targets)} adapted matrices"
    yield "trainable parameters", f"{ours.parameters:,}", "counted on the true shapes"
    yield "trainable", f"{ours.percent:.4f}%", "of the base model's parameters, adapters excluded"
    yield from _base_rows(plan.work)
    if ours.quoted_parameters != ours.parameters:
        how = "key and value matrices counted as wide as the query's, as the paper's percentages do"
        yield "trainable, as quoted", f"{ours.quoted_parameters:,} ({ours.quoted_percent:.4f}%)", how


def _base_rows(work: Work) -> Iterator[Row]:
    if work.quantise is None:
        return
    how = "floats on a grid in memory, as the others: simulated"
    if work.stores_integers:
        how = "a byte for each weight; every product makes a dense copy, which the backward pass keeps"
    yield "base", _base(work.quantise), how
    yield "quantising the base", "not counted", "neither its time nor its memory, nor that of calibration"


def _base(how: QuantiseConfig) -> str:
    return f"{how.method}, {how.bits} bits"


def _work_rows(plan: Plan) -> Iterator[Row]:
    work = plan.work
    yield (
        "optimizer steps",
        f"{plan.steps:,}",
        (
            "as asked for"
            if work.steps
            else f"{work.epochs:g} epochs of {_examples(work)} / {work.batch_size}"
            + (", whole batches alone" if work.drop_last else "")
        ),
    )
    yield (
        "positions of an example",
        f"{work.length:.0f}",
        (f"({work.prompt_tokens:g} + {work.answer_tokens:g} tokens) x {work.padding:g} for padding"),
    )
    yield "longest example", f"{work.longest:,}", "what memory must hold" if work.max_tokens else "the mean"
    yield "trained positions", f"{plan.trained_tokens:.3g}", "steps x batch x positions of an example"
    split = f"{work.micro} examples at once, {work.accumulation} times, on {work.devices} device(s)"
    yield "a step's batch", f"{work.batch_size}", split


def _flop_rows(plan: Plan) -> Iterator[Row]:
    flops, ours = plan.flops, plan.trained
    where = "the answers' positions" if plan.work.logits == "answers" else "all positions"
    yield (
        "forward",
        _tera(flops.forward_flops),
        f"2 x entries x positions, attention over all pairs, logits of {where}",
    )
    yield "gradients of activations", _tera(flops.input_gradient_flops), "no gradient below the first trained matrix"
    added = flops.adapter_forward_flops + flops.adapter_input_gradient_flops
    how = "its own products" if ours.is_derived else "2 for a parameter and token, a lower bound for this method"
    yield "the method, beside the model", _tera(added), f"forward and input gradient of {how}"
    yield "the method's weight gradients", _tera(flops.weight_gradient_flops), "2 x trainable x positions"
    if flops.recompute_flops:
        yield (
            "computed again",
            _tera(flops.recompute_flops),
            "gradient checkpointing: a second forward pass of the layers",
        )
    yield "AdamW", _tera(flops.optimizer_flops), "14 for a trainable parameter"
    yield "one step", _tera(flops.total_flops), "the sum"
    yield "the whole training", f"{plan.run_flops:.3g} FLOP", "one step x steps"


def _memory_rows(plan: Plan) -> Iterator[Row]:
    held, work = plan.memory, plan.work
    sharded = f", divided by {work.devices} (FSDP) and two layers gathered" if _is_sharded(plan) else ""
    stored = ", the layers' matrices as integers" if work.stores_integers else ""
    yield "weights", _gib(held.weights_bytes), f"parameters in {work.dtype}{stored}{sharded}"
    yield "adapter", _gib(held.adapter_bytes), f"in {work.adapter_dtype}"
    yield "AdamW's moments", _gib(held.optimizer_bytes), f"two in {work.adapter_dtype} for a trainable parameter"
    yield "gradients", _gib(held.gradients_bytes), "of what trains" + (", with DDP's buckets" if _is_ddp(plan) else "")
    close = "within 15% of measured peaks" if plan.trained.memory_is_derived else "a rough figure for this method"
    how = "each layer's input" if work.gradient_checkpointing else "what autograd keeps of the layers"
    yield "activations", _gib(held.activations_bytes), f"{how}, {work.micro} x {work.longest} positions; {close}"
    yield "logits", _gib(held.logits_bytes), "three float32 matrices at the loss's backward pass"
    yield "a step's peak", _gib(held.step_bytes), "activations, logits, gradients and working tensors as they meet"
    if work.scored:
        yield "keys and values", _gib(held.cache_bytes), "of the largest decoded batch with its beams, at its end"
    yield "peak on a device", _gib(held.peak_bytes), "training or decoding, the larger"
    yield "memory of a device", f"{plan.device_gib:.1f} GiB", plan.device.source
    room = {"yes": "more room than", "barely": "less room than", "no": "no room, whatever"}[plan.fits]
    yield "fits", plan.fits, f"{room} the estimate's error of 15%"


def _time_rows(plan: Plan) -> Iterator[Row]:
    device = plan.device
    peak = f"{device.flops_per_second[plan.work.dtype] / 1e12:.3g} TFLOP/s in {plan.work.dtype}"
    rate = f"{_share(device.training)} of {peak} (an assumption), {_devices(plan)}"
    if plan.steps:
        yield "training time", duration(plan.train_seconds_low, plan.train_seconds_high), rate
    if plan.work.scored:
        bandwidth = f"{device.bandwidth_bytes_per_second / 1e9:.4g} GB/s"
        tokens = " or ".join(str(most) for most in sorted({task.new_tokens for task in plan.work.scored}))
        how = f"all {tokens} tokens of every answer, {_share(device.decoding)} of {bandwidth}, one device"
        yield "evaluation time", duration(plan.eval_seconds_low, plan.eval_seconds_high), how
        both = plan.train_seconds_low + plan.eval_seconds_low, plan.train_seconds_high + plan.eval_seconds_high
        yield "time of the run", duration(*both), "the sum; loading and saving are not counted"


def duration(low: float, high: float) -> str:
    """A range of seconds in the unit that suits its upper end."""
    for unit, seconds in (("days", 86_400 * 2), ("h", 3600 * 2), ("min", 120)):
        if high >= seconds:
            size = seconds / 2 if unit != "min" else 60
            return f"{_two_digits(low / size)} to {_two_digits(high / size)} {unit}"
    return f"{_two_digits(low)} to {_two_digits(high)} s"


def _two_digits(number: float) -> str:
    """Two significant digits, or all before the point: from 99.5 on ``g`` would write an exponent."""
    return f"{number:.0f}" if number >= 99.5 else f"{number:.2g}"


def _examples(work: Work) -> str:
    return f"{work.examples:,} examples" + (" (assumed)" if work.examples_assumed else "")


def _devices(plan: Plan) -> str:
    return f"{plan.work.devices} x {plan.device.name}"


def _is_sharded(plan: Plan) -> bool:
    return plan.work.devices > 1 and plan.work.sharding == "fsdp"


def _is_ddp(plan: Plan) -> bool:
    return plan.work.devices > 1 and plan.work.sharding == "ddp"


def _share(rates: tuple[float, float]) -> str:
    return f"{100 * rates[0]:.0f} to {100 * rates[1]:.0f}%"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
