"""Peak learning rates of methods that want another one than LoRA.

Few numbers, and numbers far from the weights (scales, vectors, prompts), move little by LoRA's
rate. Most rates are those of PEFT's own comparison of methods (its repository,
`method_comparison/MetaMathQA`): Llama-3.2-3B, AdamW, 5,000 steps of 4 rows, a cosine schedule.
They were chosen by who added the method, not searched for.
"""

from __future__ import annotations

from msgspec import Struct


class MethodRate(Struct, frozen=True):
    """A peak learning rate for AdamW, of any size of model, and where it is from."""

    rate: float
    source: str


_COMPARISON = "PEFT's comparison of methods (MetaMathQA)"


def _compared(rate: float) -> MethodRate:
    return MethodRate(rate, f"the method's in {_COMPARISON}")


METHOD_RATES: dict[str, MethodRate] = {
    "delora": _compared(1e-3),
    "ia3": _compared(5e-3),
    "vera": _compared(1e-3),
    "pvera": _compared(3e-3),
    "vblora": MethodRate(1e-3, "the vector bank's in its paper (arXiv 2405.15179)"),
    "unilora": _compared(2e-3),
    "tinylora": _compared(1e-3),
    "fourierft": MethodRate(3e-2, "its paper's for instructions (arXiv 2405.03003, table 11)"),
    "lokr": _compared(3e-3),
    "road": _compared(1e-3),
    "c3a": _compared(3e-1),
    "oft": _compared(1e-4),
    "loha": _compared(1e-4),
    "hira": _compared(4.5e-3),
    "bottleneck": MethodRate(3e-4, "that of the commands of LLM-Adapters (arXiv 2304.01933)"),
    "shadow": _compared(1e-3),
    "prompt-tuning": _compared(1e-3),
    "p-tuning": _compared(1e-3),
    "prefix-tuning": _compared(5e-3),
    "p-tuning-v2": MethodRate(5e-3, f"prefix tuning's, which it is, in {_COMPARISON}"),
    "adaption-prompt": _compared(5e-3),
    "ln-tuning": MethodRate(5e-3, "IA3's, whose factors norms are as well; tried on SmolLM2-135M"),
    "bitfit": MethodRate(1e-4, f"that of biases (BEFT) in {_COMPARISON}"),
    "shira": _compared(3e-4),
    "osf": _compared(5e-5),
}
