"""Small random models of the kinds that the tuner has to work in, with inputs for each."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from diablo_theory.tuner import DiaBloConfig

IDS = torch.tensor([[5, 8, 2, 30, 11, 7], [3, 3, 9, 41, 1, 6]])


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**options)).eval()


def llama_config(**options):
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 6, "num_key_value_heads": 2}
    rest = {"vocab_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.3}
    return LlamaConfig(**(sizes | rest | options))


def llama_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama_config(num_labels=3)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    return BertModel(config).eval()


#: Name to (model, targets, task type, further inputs).
KINDS = {
    "decoder": (llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM", {}),
    "conv1d": (gpt2, ["c_attn", "c_proj"], "CAUSAL_LM", {}),
    "encoder-decoder": (t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM", {"labels": IDS}),
    "encoder": (bert, ["query", "value"], "FEATURE_EXTRACTION", {}),
    "classifier": (llama_classifier, ["q_proj", "v_proj"], "SEQ_CLS", {}),
}


def output(model, inputs=None):
    """The model's own first output for the fixed ids."""
    with torch.no_grad():
        return model(input_ids=IDS, **(inputs or {})).to_tuple()[1 if inputs else 0]


class Net(nn.Module):
    """Plain layers under names that contain each other."""

    def __init__(self, **sizes):
        super().__init__()
        for name, (m1, m2) in sizes.items():
            parent = self
            *path, last = name.split("__")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(m1, m2))

    def forward(self, x):
        raise NotImplementedError


def adapted_model(build=llama, num_blocks=5, **options):
    """A model with random blocks."""
    torch.manual_seed(1)
    config = DiaBloConfig(num_blocks=num_blocks, init_weights=False, **options)
    return get_peft_model(build(), config).eval()
