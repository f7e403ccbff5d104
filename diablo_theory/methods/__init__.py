"""Every compared method, by name and parameter budget. DiaBlo's budget sets the others' size.

For one matrix of m1 inputs and m2 outputs. The knob of DiaBlo and of the patterns is N itself; of all others the one,
for all matrices, whose count (for GaLore: of moments) comes nearest to DiaBlo's. VeRA, with r up to the smallest
size of a matrix, stays far below it.

| name | what trains | knob | count | alpha | from |
|---|---|---|---|---|---|
| none, full | nothing; the whole weight | | 0; m1 m2 | | |
| diablo, diablo-additive | diagonal blocks | N | m1 m2 / N | | arXiv 2506.03230 |
| lora | B A | r | r (m1 + m2) | 2 r | arXiv 2106.09685, peft |
| rslora | LoRA over sqrt(r) | r | r (m1 + m2) | 2 r | arXiv 2312.03732, peft |
| dora | LoRA and the columns' lengths | r | r (m1 + m2) + m2 | 2 r | arXiv 2402.09353, peft |
| pissa | LoRA from W's largest components | r | r (m1 + m2) | r | arXiv 2404.02948, peft |
| olora | LoRA from W = Q R | r | r (m1 + m2) | r / 2 | arXiv 2406.01775, peft |
| lora-ga | LoRA from the gradient's components | r | r (m1 + m2) | 2 r | arXiv 2407.05000, peft |
| eva | LoRA from the inputs' components | r | r (m1 + m2) | 1 | arXiv 2410.07170, peft |
| corda | LoRA from W's components where the inputs are | r | r (m1 + m2) | r | arXiv 2406.05223, peft |
| lora-fa | B alone, by its own optimizer | r | r m2 | 2 r | arXiv 2308.03303, peft |
| lora-plus | LoRA, B 16 times as fast | r | r (m1 + m2) | 2 r | arXiv 2402.12354, peft |
| adalora | B E A, ranks moved between matrices | r | r (m1 + m2 + 1) | 2 r | arXiv 2303.10512, peft |
| vera | scales of shared random factors | r | r + m2 | | arXiv 2310.11454, peft |
| randlora | scales of shared random bases | r | ceil(m / r) (r + m), m = min(m1, m2) | 20 r | arXiv 2502.00987, peft |
| miss | one r x m2 block for all groups of r rows | r | r m2 | | arXiv 2409.15371, peft |
| bone | the same, through the weight (peft's "bat") | r, divides | r m2 | | arXiv 2409.15371, peft |
| c3a | circulant blocks | b, divides | m1 m2 / b | | arXiv 2407.19342, peft |
| shira | random entries | r | r (m1 + m2) | | arXiv 2406.13175, peft |
| galore | the whole weight; moments of r max(m1, m2) | r | m1 m2 | | arXiv 2403.03507, galore-torch |
| random-blocks | N of the N x N cells, drawn at random | N | m1 m2 / N | | patterns.py |
| permuted-blocks | DiaBlo, the column blocks reassigned | N | m1 m2 / N | | patterns.py |
| random-entries | entries drawn at random | N | m1 m2 / N | | patterns.py |
| random-rows, random-columns | input or output features, drawn at random | N | nearest to DiaBlo's | | patterns.py |
| s2ft-rows, s2ft-columns | the same features for coupled matrices | N | nearest to m1 m2 / N | | places.py |

Hyper-parameters other than size are those of a method's authors where they say so, otherwise peft's: alpha of PiSSA,
CorDA, OLoRA and EVA and EVA's even ranks (rho = 1) as in the examples they gave peft; AdaLoRA's schedule and
orthogonality as in their code; LoRA+'s ratio of 16; GaLore's scale and interval as in their fine-tuning example.

PiSSA, OLoRA, LoRA-GA and CorDA take their first product out of the base weight, so their start is the untouched model
to rounding; full and GaLore train the base weight. These six cannot serve a quantised base. On one of bitsandbytes in
half precision, AdaLoRA, RandLoRA and SHiRA need autocast (peft multiplies what it has not cast).
"""

from diablo_theory.methods.families import (
    FAMILIES,
    GRADIENT_GROUPS,
    WITHOUT_ADAPTER,
    Family,
    Method,
    changes_base,
    has_adapter,
)
from diablo_theory.methods.optimizers import classes_in_state, move_state
from diablo_theory.methods.prepare import Prepared, check_options, prepare, why_unquantised
from diablo_theory.methods.sizes import knob_of, label_of, nearest_knob
from diablo_theory.methods.state import load_trainable_state, trainable_state
from diablo_theory.methods.targets import target_layers

__all__ = [
    "FAMILIES",
    "GRADIENT_GROUPS",
    "WITHOUT_ADAPTER",
    "Family",
    "Method",
    "Prepared",
    "changes_base",
    "check_options",
    "classes_in_state",
    "has_adapter",
    "knob_of",
    "label_of",
    "load_trainable_state",
    "move_state",
    "nearest_knob",
    "prepare",
    "target_layers",
    "trainable_state",
    "why_unquantised",
]
