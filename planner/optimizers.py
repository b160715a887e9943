"""What an optimizer holds for each trained parameter, and what its step needs besides.

Names are `TrainingArguments.optim`'s. States take the parameter's dtype (torch's optimizers
use `zeros_like`) unless `state_bytes_per_parameter` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.planner.errors import UnknownNameError

# Packages besides torch and transformers that hold optimizers: the module's name, and pip's.
OPTIMIZER_PACKAGES: dict[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "lomo_optim": "lomo-optim",
    "schedulefree": "schedulefree",
    "optimi": "torch-optimi",
    "grokadamw": "grokadamw",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Memory of an optimizer.

    `num_states`: states a parameter, each of the parameter's dtype; `num_16bit_states`: further
    ones of a parameter in 16 bits.
    `state_bytes_per_parameter`: instead, for states of a fixed width;
    `embedding_state_bytes`: what an embedding's parameter has where that is another width.
    `step_copies`: tensors of the parameters' size and dtype that the step holds at once
    (the foreach implementations work on all parameters together). `tensor_copies`: of one
    parameter's, where a processor takes one after another; None where it takes all together too.
    `paged`: states live in managed memory that can be moved to the host.
    `module`: the one of OPTIMIZER_PACKAGES that it comes from; None for torch and transformers.
    `exact_only`: why a count of parameters does not tell its memory, where it does not.
    `low_rank`: works on projections of the gradients of linear modules (`optim_target_modules`).
    `steps_in_backward`: each parameter is updated when its gradient is there, which is then freed.
    """

    name: str
    num_states: int = 0
    num_16bit_states: int = 0
    state_bytes_per_parameter: float | None = None
    embedding_state_bytes: float | None = None
    step_copies: int = 0
    tensor_copies: int | None = None
    paged: bool = False
    module: str | None = None
    exact_only: str | None = None
    low_rank: bool = False
    steps_in_backward: bool = False
    source: str

    @property
    def layerwise(self) -> bool:
        """Whether each parameter has an optimizer of its own, as transformers makes them."""
        return self.low_rank and self.steps_in_backward

    @property
    def needs_trainer(self) -> bool:
        """Whether it is made from a model by transformers' trainer, not from parameters."""
        return self.low_rank or self.steps_in_backward

    def state_bytes(
        self, num_parameters: int, bytes_per_parameter: int, num_embedding_parameters: int = 0
    ) -> int:
        """Bytes of all states for `num_parameters` of `bytes_per_parameter` each.

        `num_embedding_parameters`: how many of them are embeddings'. Raises InputError where they
        do not follow from counts.
        """
        if self.state_bytes_per_parameter is None:
            states = self.num_states + (bytes_per_parameter == 2) * self.num_16bit_states
            return num_parameters * states * bytes_per_parameter
        wide = num_embedding_parameters if self.embedding_state_bytes is not None else 0
        return round(
            (num_parameters - wide) * self.state_bytes_per_parameter
            + wide * (self.embedding_state_bytes or 0)
        )

    def step_temporary_bytes(self, num_parameters: int, bytes_per_parameter: int) -> int:
        """Bytes that exist only while the step runs."""
        return num_parameters * self.step_copies * bytes_per_parameter


# Blockwise 8-bit states: one byte each and an fp32 scale for every block of 256 values
# (bitsandbytes.optim, `blocksize=256`); tensors under 4096 elements keep fp32 states.
_EIGHT_BIT_STATE_BYTES = 1 + 4 / 256
# torchao.optim under transformers, which asks for blocks of 256 for both widths.
_FOUR_BIT_STATE_BYTES = 0.5 + 4 / 256
_FLOAT32_STATE_BYTES = 4


def _bitsandbytes(name: str, num_states: int, bits: int, source: str) -> Optimizer:
    """One of bitsandbytes'. With 8 bits transformers keeps embeddings' states in fp32
    (transformers.Trainer.create_optimizer, `register_module_override`)."""
    return Optimizer(
        name=name,
        state_bytes_per_parameter=num_states
        * (_EIGHT_BIT_STATE_BYTES if bits == 8 else _FLOAT32_STATE_BYTES),
        embedding_state_bytes=num_states * _FLOAT32_STATE_BYTES if bits == 8 else None,
        paged=name.startswith("paged_"),
        module="bitsandbytes",
        source=source,
    )


_ADAM_8BIT = "bitsandbytes AdamW, arXiv 2110.02861; its kernels update in place"
_PAGED = "bitsandbytes AdamW with `is_paged`, arXiv 2305.14314"
_LION = "bitsandbytes Lion: one momentum, arXiv 2302.06675"
_ADEMAMIX = "bitsandbytes AdEMAMix: a fast and a slow momentum beside exp_avg_sq, arXiv 2409.03137"
_RMSPROP = "bitsandbytes RMSprop: the average of squares only"
_SHAPES = "its states and temporaries depend on the shapes of the matrices"
_GALORE = "galore-torch 1.0: states of the projected gradient and a projection, arXiv 2403.03507"
_APOLLO = "apollo-torch 1.0.3: states of the projected gradient, arXiv 2412.05270"
_FUSED = "it updates weights while backward runs, and gradients do not live together"

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            name="adamw_torch_fused",
            num_states=2,
            source="torch.optim.AdamW(fused=True): exp_avg, exp_avg_sq, updated in place",
        ),
        Optimizer(
            name="adamw_torch",
            num_states=2,
            step_copies=1,
            tensor_copies=2,
            source="torch.optim.AdamW(foreach): one list of square roots beside the states; "
            "10.0 bytes a bf16 parameter at the step on A100 (fms-acceleration)",
        ),
        _bitsandbytes("adamw_8bit", 2, 8, _ADAM_8BIT),
        _bitsandbytes("adamw_bnb_8bit", 2, 8, _ADAM_8BIT),
        _bitsandbytes("paged_adamw_8bit", 2, 8, _PAGED),
        _bitsandbytes("paged_adamw_32bit", 2, 32, _PAGED),
        _bitsandbytes("lion_8bit", 1, 8, _LION),
        _bitsandbytes("lion_32bit", 1, 32, _LION),
        _bitsandbytes("paged_lion_8bit", 1, 8, _LION),
        _bitsandbytes("paged_lion_32bit", 1, 32, _LION),
        _bitsandbytes("ademamix_8bit", 3, 8, _ADEMAMIX),
        _bitsandbytes("ademamix", 3, 32, _ADEMAMIX),
        _bitsandbytes("paged_ademamix_8bit", 3, 8, _ADEMAMIX),
        _bitsandbytes("paged_ademamix_32bit", 3, 32, _ADEMAMIX),
        _bitsandbytes("rmsprop_bnb_8bit", 1, 8, _RMSPROP),
        _bitsandbytes("rmsprop_bnb", 1, 32, _RMSPROP),
        _bitsandbytes("rmsprop_bnb_32bit", 1, 32, _RMSPROP),
        Optimizer(
            name="sgd",
            step_copies=0,
            source="torch.optim.SGD without momentum, as TrainingArguments makes it",
        ),
        Optimizer(
            name="adagrad",
            num_states=1,
            step_copies=2,
            tensor_copies=1,
            source="torch.optim.Adagrad(foreach): sums of squares, made with the optimizer; their "
            "roots and the scaled gradients beside them",
        ),
        Optimizer(
            name="rmsprop",
            num_states=1,
            step_copies=1,
            tensor_copies=1,
            source="torch.optim.RMSprop(foreach): square_avg; their roots beside them",
        ),
        Optimizer(
            name="adafactor",
            exact_only=_SHAPES,
            source="transformers.optimization.Adafactor: a row and a column of squares a matrix, "
            "fp32 copies of one matrix at a time, arXiv 1804.04235",
        ),
        Optimizer(
            name="adamw_torch_8bit",
            module="torchao",
            exact_only=_SHAPES,
            source="torchao 0.18, optim/adam.py: states of 1 byte, a compiled step for each tensor",
        ),
        Optimizer(
            name="adamw_torch_4bit",
            module="torchao",
            exact_only=_SHAPES,
            source="torchao 0.18, optim/adam.py: two states a byte, a compiled step a tensor",
        ),
        Optimizer(
            name="schedule_free_adamw",
            num_states=2,
            step_copies=1,
            module="schedulefree",
            source="schedulefree 1.4.1 (foreach): z, exp_avg_sq; a list of denominators",
        ),
        Optimizer(
            name="schedule_free_radam",
            num_states=2,
            step_copies=1,
            module="schedulefree",
            source="schedulefree 1.4.1 (foreach): z, exp_avg_sq; denominators from the sixth step",
        ),
        Optimizer(
            name="schedule_free_sgd",
            num_states=1,
            module="schedulefree",
            source="schedulefree 1.4.1 (foreach): z, updated in place",
        ),
        Optimizer(
            name="stable_adamw",
            num_states=2,
            num_16bit_states=1,
            module="optimi",
            source="torch-optimi 0.3.3 (triton): exp_avg, exp_avg_sq and, in 16 bits, the Kahan "
            "compensation; kernels that write in place",
        ),
        Optimizer(
            name="grokadamw",
            module="grokadamw",
            exact_only="its states live on the host and come to the GPU one tensor at a time",
            source="grokadamw 0.1.2: exp_avg, exp_avg_sq, grok_ema on the host",
        ),
        *(
            Optimizer(
                name=name,
                module="galore_torch",
                exact_only=_SHAPES,
                low_rank=True,
                steps_in_backward=name.endswith("_layerwise"),
                source=_GALORE,
            )
            for name in (
                "galore_adamw",
                "galore_adamw_8bit",
                "galore_adafactor",
                "galore_adamw_layerwise",
                "galore_adamw_8bit_layerwise",
            )
        ),
        *(
            Optimizer(
                name=name,
                module="apollo_torch",
                exact_only=_SHAPES,
                low_rank=True,
                steps_in_backward=name.endswith("_layerwise"),
                source=_APOLLO,
            )
            for name in ("apollo_adamw", "apollo_adamw_layerwise")
        ),
        Optimizer(
            name="lomo",
            module="lomo_optim",
            exact_only=_FUSED,
            steps_in_backward=True,
            source="lomo-optim 0.1.1: no states, arXiv 2306.09782",
        ),
        Optimizer(
            name="adalomo",
            module="lomo_optim",
            exact_only=_FUSED,
            steps_in_backward=True,
            source="lomo-optim 0.1.1: a row and a column of squares a matrix, arXiv 2310.10195",
        ),
    )
}


def resolve_optimizer(name: str) -> Optimizer:
    """The optimizer of that name; raises UnknownNameError with the nearest ones."""
    optimizer = OPTIMIZERS.get(name)
    if optimizer is None:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return optimizer
