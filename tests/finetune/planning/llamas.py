"""Tiny and medium Llamas on the CPU, and what a plan says of the step that they do."""

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diablo_theory import methods
from diablo_theory.bench.measuring import peak_bytes
from diablo_theory.finetune.bases import layers_of
from diablo_theory.finetune.planning.datasets import DATASETS
from diablo_theory.finetune.planning.memory import memory
from diablo_theory.finetune.planning.shapes import model_shapes
from diablo_theory.finetune.planning.trainable import trained
from diablo_theory.finetune.planning.work import Scored, Work
from diablo_theory.quantise import quantise

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")
MEDIUM = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def work_on(dataset, model, **changes):
    """A run on known data; a thousand problems of a hundred tokens are decoded unless said otherwise."""
    sizes = ("examples", "prompt_tokens", "answer_tokens", "padding", "max_tokens")
    known = {name: getattr(DATASETS[dataset], name) for name in sizes}
    return Work(**{**known, "model": model, "scored": (Scored(items=1000, new_tokens=100),), **changes})


@dataclasses.dataclass
class Case:
    """A prepared model and its plan's ingredients; ``step`` does one forward pass and gives the loss."""

    work: Work
    network: torch.nn.Module
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def make(cls, folder, sizes, batch=2, length=8, kept=3, attention="sdpa", **fields):
        config = LlamaConfig(**sizes, attn_implementation=attention, tie_word_embeddings=False)
        config.save_pretrained(folder)
        method = fields.get("method", "diablo")
        dtype = fields.setdefault("dtype", "float32")
        if method == "full":
            fields["adapter_dtype"] = dtype
        padding = 1.25 if fields.pop("padded", False) else 1.0
        answers = (kept - 1) / padding
        work = Work(
            model=str(folder),
            examples=batch,
            batch_size=batch,
            prompt_tokens=length / padding - answers,
            answer_tokens=answers,
            padding=padding,
            max_tokens=length,
            logits="all" if kept == length else "answers",
            **fields,
        )
        torch.manual_seed(0)
        network = LlamaForCausalLM(config).to(getattr(torch, dtype))
        if work.quantise is not None:
            quantise(network, layers_of(network), work.quantise)
        prepared = methods.prepare(network, work.method, work.num_blocks, list(work.target_modules), seed=0)
        network = prepared.model.train()
        if work.gradient_checkpointing:
            network.activation_checkpointing_enable()
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, 0] = int(padding == 1)
        ids, labels = (torch.randint(config.vocab_size, (batch, n)) for n in (length, kept))
        return cls(work, network, ids, mask, labels)

    @property
    def shapes(self):
        return model_shapes(self.work.model)

    @property
    def trained(self):
        return trained(self.shapes, self.work)

    def step(self):
        kept = self.labels.shape[1]
        batch = {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}
        return self.network(**batch, logits_to_keep=kept, use_cache=False).loss


def planned(case):
    """A CPU's AdamW updates one tensor after another."""
    return memory(case.shapes, case.trained, case.work, foreach=False)


def saved_bytes(case):
    """Bytes of the storages that autograd keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in case.network.parameters() if not hasattr(p, "qdata")}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.step()
    return sum(storage.nbytes() for storage in kept.values())


def measured_peak(case):
    """The most bytes that a step holds at once, and the optimizer."""
    optimizer = torch.optim.AdamW([p for p in case.network.parameters() if p.requires_grad])

    def step():
        case.step().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the moments are there from now on
    return peak_bytes(step, CPU), optimizer
