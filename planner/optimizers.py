"""The optimizers by their names, which are `TrainingArguments.optim`'s: how each keeps states and
steps. `optimizer_steps.py` has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from ftplan.planner.errors import UnknownNameError
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.muon import muon_flops, muon_groups, muon_kernels, muon_states, muon_step
from ftplan.planner.optimizer_steps import (
    Averaging,
    FusedStep,
    FusedUpdate,
    Grouping,
    Groups,
    Kernels,
    LayerwiseUpdate,
    States,
    Step,
    Stepped,
    Updated,
    adafactor_states,
    adafactor_step,
    adagrad_step,
    adalomo_states,
    adalomo_step,
    adam_step,
    apollo_states,
    apollo_step,
    bitsandbytes_maps,
    bitsandbytes_states,
    bitsandbytes_step,
    by_group,
    clip_gradients,
    decay_groups,
    galore_adafactor_states,
    galore_adamw_8bit_states,
    galore_adamw_8bit_step,
    galore_adamw_states,
    galore_adamw_step,
    galore_maps,
    grokadamw_step,
    hold,
    in_place,
    like_parameter,
    lomo_step,
    low_rank_groups,
    no_shared_states,
    no_states,
    of_each,
    of_lists,
    rmsprop_step,
    rounded,
    schedule_free_step,
    stable_adamw_states,
    stable_adamw_step,
    torchao_states,
    torchao_step,
)
from ftplan.planner.tape import ZERO, Moment, Tape, Update, value

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


def no_flops(parameters: Sequence[Updated]) -> int:
    return 0


class Optimizer(Struct, frozen=True, kw_only=True):
    """Memory of an optimizer.

    `states`: bytes of each tensor kept for a parameter; `shared_states`: of those kept besides,
    once there is one of these parameters. `on_host`: states live there, but on the processor.
    `needs_whole_parameters`: how it divides with sharded parameters is not modelled.
    `keeps_frozen`: frozen parameters have states too.
    `groups`: of the parameters, as a trainer hands them over. `needs_model`: it is made from the
    modules and names of a model, not from parameters alone.
    `step`: what happens on the groups of parameters; `fused_step`, in its place: on each parameter
    within backward.
    `paged`: states live in managed memory that can be moved to the host.
    `module`: the one of OPTIMIZER_PACKAGES that it comes from; None for torch and transformers.
    `low_rank`: works on projections of the gradients of linear modules (`optim_target_modules`).
    `steps_in_backward`: each parameter is updated when its gradient is there, which is then freed.
    `flops`: of its matrix products. `kernels`: that a step launches on a GPU; ten for each
    parameter, about as many as a loop in Python has operations, where no other number is known.
    """

    name: str
    states: States = no_states
    shared_states: Callable[[Updated], int] = no_shared_states
    on_host: bool = False
    keeps_frozen: bool = False
    groups: Grouping = decay_groups
    step: Step = in_place
    fused_step: FusedStep | None = None
    paged: bool = False
    module: str | None = None
    needs_whole_parameters: bool = False
    low_rank: bool = False
    steps_in_backward: bool = False
    needs_model: bool = False
    kernels: Kernels = of_each(10)
    flops: Callable[[Sequence[Updated]], int] = no_flops
    source: str

    @property
    def layerwise(self) -> bool:
        """Whether each parameter has an optimizer of its own, as transformers makes them."""
        return self.low_rank and self.steps_in_backward

    @property
    def needs_trainer(self) -> bool:
        """Whether it is made from a model by transformers' trainer, not from parameters."""
        return self.low_rank or self.steps_in_backward or self.needs_model

    def update(self) -> Update | None:
        """What it does within backward, if it steps there."""
        if not self.steps_in_backward:
            return None
        return FusedUpdate(self.fused_step) if self.fused_step else LayerwiseUpdate(self.step)

    def num_kernels(self, parameters: Sequence[Updated], kind: DeviceKind) -> int:
        """Operations of a step; a processor has no kernels for lists. What steps within backward
        is counted there."""
        if self.steps_in_backward:
            return 0
        return self.kernels(parameters) if kind == "cuda" else of_each(10)(parameters)

    def state_bytes(self, parameters: Iterable[Updated], kind: DeviceKind = "cuda") -> int:
        """Bytes of all states on a device of that kind, as its allocator rounds them."""
        on_cuda = kind == "cuda"
        return 0 if self.on_host and on_cuda else self._state_bytes(parameters, rounds=on_cuda)

    def host_state_bytes(self, parameters: Iterable[Updated]) -> int:
        """Bytes of states that the host has for a GPU."""
        return self._state_bytes(parameters, rounds=False) if self.on_host else 0

    def state_sizes(self, parameters: Sequence[Updated]) -> list[int]:
        """Bytes of each state on a CUDA device, parameter by parameter."""
        if self.on_host:
            return []
        own = [size for p in parameters for size in p.count * self._own_states(p)]
        return [*own, self._shared_bytes(parameters)]

    def _state_bytes(self, parameters: Iterable[Updated], *, rounds: bool) -> int:
        listed = list(parameters)
        sizes = ((p.count, self._own_states(p)) for p in listed)
        own = sum(count * sum(map(rounded, of) if rounds else of) for count, of in sizes)
        return own + self._shared_bytes(listed)

    def _own_states(self, parameter: Updated) -> list[int]:
        own = [self.shared_states(parameter)] if self.layerwise else []
        return [*self.states(parameter), *own]

    def _shared_bytes(self, parameters: Iterable[Updated]) -> int:
        return 0 if self.layerwise else max(map(self.shared_states, parameters), default=0)

    def step_moments(
        self, parameters: Sequence[Updated], kind: DeviceKind, *, by_trainer: bool
    ) -> tuple[Moment, ...]:
        """The highest moments of a step, gradients included.

        `by_trainer`: transformers' trainer makes groups of the parameters, and clips gradients.
        """
        tape = Tape(on_cuda=kind == "cuda")
        if self.steps_in_backward:
            return (Moment(ZERO, {}),)
        self._step(tape, self._with_gradients(tape, parameters, by_trainer), by_trainer)
        return tape.moments()

    def step_storages(
        self, parameters: Sequence[Updated], *, by_trainer: bool
    ) -> tuple[list[int], list[int], int]:
        """(sizes, events, first): births and deaths of a step on a CUDA device, as `Tape.events`
        has them; those from number `first` on are no gradients."""
        tape = Tape()
        if self.steps_in_backward:
            return [], [], 0
        groups = self._with_gradients(tape, parameters, by_trainer)
        first = len(tape.sizes)
        self._step(tape, groups, by_trainer)
        return [value(size, 0, 0) for size in tape.sizes], tape.events[:], first

    def _with_gradients(
        self, tape: Tape, parameters: Sequence[Updated], by_trainer: bool
    ) -> list[list[Stepped]]:
        return [
            [Stepped(p, hold(tape, p.num_elements, p.width, "gradients")) for p in group]
            for group in self._groups(parameters, by_trainer=by_trainer)
        ]

    def _step(self, tape: Tape, groups: Groups, by_trainer: bool) -> None:
        if by_trainer:
            clip_gradients(tape, groups)
        self.step(tape, groups)

    def _groups(self, parameters: Sequence[Updated], *, by_trainer: bool) -> list[list[Updated]]:
        groups = self.groups(parameters)
        return groups if by_trainer else [[p for group in groups for p in group]]


def _bitsandbytes(
    name: str, averaging: Averaging, averages: Sequence[int], bits: int, source: str
) -> Optimizer:
    """One of bitsandbytes', with so many averages in each state tensor."""
    return Optimizer(
        name=name,
        states=bitsandbytes_states(averages, bits),
        shared_states=bitsandbytes_maps(len(averages)) if bits == 8 else no_shared_states,
        step=bitsandbytes_step(averaging, averages, bits),
        paged=name.startswith("paged_"),
        module="bitsandbytes",
        kernels=of_each(1),
        source=source,
    )


# Averages in each state tensor.
_ONE, _TWO, _THREE = (1,), (1, 1), (2, 1)
_ADAM = "bitsandbytes AdamW, arXiv 2110.02861; its kernels update in place on CUDA"
_PAGED = "bitsandbytes AdamW with `is_paged`, arXiv 2305.14314"
_LION = "bitsandbytes Lion: one momentum, arXiv 2302.06675"
_ADEMAMIX = "bitsandbytes AdEMAMix: a fast and a slow momentum beside exp_avg_sq, arXiv 2409.03137"
_RMSPROP = "bitsandbytes RMSprop: the average of squares only"
_GALORE = "galore-torch 1.0: states of the projected gradient and a projection, arXiv 2403.03507"
_APOLLO = "apollo-torch 1.0.3: states of the projected gradient, arXiv 2412.05270"

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            name="adamw_torch_fused",
            states=like_parameter(2, counts_steps=True),
            kernels=of_lists(1),
            source="torch.optim.AdamW(fused=True): exp_avg, exp_avg_sq, updated in place",
        ),
        Optimizer(
            name="adamw_torch",
            states=like_parameter(2, counts_steps=True),
            step=by_group(adam_step),
            kernels=of_lists(9),
            source="torch.optim.AdamW(foreach): one list of square roots beside the states; "
            "10.0 bytes a bf16 parameter at the step on A100 (fms-acceleration)",
        ),
        _bitsandbytes("adamw_8bit", "adam", _TWO, 8, _ADAM),
        _bitsandbytes("adamw_bnb_8bit", "adam", _TWO, 8, _ADAM),
        _bitsandbytes("paged_adamw_8bit", "adam", _TWO, 8, _PAGED),
        _bitsandbytes("paged_adamw_32bit", "adam", _TWO, 32, _PAGED),
        _bitsandbytes("lion_8bit", "lion", _ONE, 8, _LION),
        _bitsandbytes("lion_32bit", "lion", _ONE, 32, _LION),
        _bitsandbytes("paged_lion_8bit", "lion", _ONE, 8, _LION),
        _bitsandbytes("paged_lion_32bit", "lion", _ONE, 32, _LION),
        _bitsandbytes("ademamix_8bit", "ademamix", _THREE, 8, _ADEMAMIX),
        _bitsandbytes("ademamix", "ademamix", _THREE, 32, _ADEMAMIX),
        _bitsandbytes("paged_ademamix_8bit", "ademamix", _THREE, 8, _ADEMAMIX),
        _bitsandbytes("paged_ademamix_32bit", "ademamix", _THREE, 32, _ADEMAMIX),
        _bitsandbytes("rmsprop_bnb_8bit", "rmsprop", _ONE, 8, _RMSPROP),
        _bitsandbytes("rmsprop_bnb", "rmsprop", _ONE, 32, _RMSPROP),
        _bitsandbytes("rmsprop_bnb_32bit", "rmsprop", _ONE, 32, _RMSPROP),
        Optimizer(
            name="sgd",
            kernels=of_lists(2),
            source="torch.optim.SGD without momentum, as TrainingArguments makes it",
        ),
        Optimizer(
            name="adagrad",
            states=like_parameter(1, counts_steps=True),
            step=by_group(adagrad_step),
            kernels=of_lists(5),
            source="torch.optim.Adagrad(foreach): sums of squares, made with the optimizer; their "
            "roots and the scaled gradients beside them",
        ),
        Optimizer(
            name="rmsprop",
            states=like_parameter(1, counts_steps=True),
            step=by_group(rmsprop_step),
            kernels=of_lists(5),
            source="torch.optim.RMSprop(foreach): square_avg; their roots beside them",
        ),
        Optimizer(
            name="adafactor",
            states=adafactor_states,
            step=adafactor_step(projects=False),
            needs_whole_parameters=True,
            source="transformers.optimization.Adafactor: a row and a column of squares a matrix, "
            "fp32 copies of one matrix at a time, arXiv 1804.04235",
        ),
        Optimizer(
            name="adamw_torch_8bit",
            states=torchao_states(8),
            step=torchao_step(8),
            module="torchao",
            needs_whole_parameters=True,
            kernels=of_each(1),
            source="torchao 0.18, optim/adam.py: states of 1 byte, a compiled step for each tensor",
        ),
        Optimizer(
            name="adamw_torch_4bit",
            states=torchao_states(4),
            step=torchao_step(4),
            module="torchao",
            needs_whole_parameters=True,
            kernels=of_each(1),
            source="torchao 0.18, optim/adam.py: two states a byte, a compiled step a tensor",
        ),
        Optimizer(
            name="schedule_free_adamw",
            states=like_parameter(2),
            step=schedule_free_step,
            module="schedulefree",
            kernels=of_lists(9),
            source="schedulefree 1.4.1 (foreach): z, exp_avg_sq; a list of denominators",
        ),
        Optimizer(
            name="schedule_free_radam",
            states=like_parameter(2),
            step=schedule_free_step,
            module="schedulefree",
            kernels=of_lists(9),
            source="schedulefree 1.4.1 (foreach): z, exp_avg_sq; denominators from the sixth step",
        ),
        Optimizer(
            name="schedule_free_sgd",
            states=like_parameter(1),
            module="schedulefree",
            kernels=of_lists(4),
            source="schedulefree 1.4.1 (foreach): z, updated in place",
        ),
        Optimizer(
            name="stable_adamw",
            states=stable_adamw_states,
            step=stable_adamw_step,
            module="optimi",
            kernels=of_each(1),
            source="torch-optimi 0.3.3 (triton): exp_avg, exp_avg_sq and, in 16 bits, the Kahan "
            "compensation; kernels that write in place",
        ),
        Optimizer(
            name="grokadamw",
            states=like_parameter(3),
            on_host=True,
            step=by_group(grokadamw_step),
            module="grokadamw",
            needs_whole_parameters=True,
            source="grokadamw 0.1.2: exp_avg, exp_avg_sq, grok_ema on the host",
        ),
        *(
            Optimizer(
                name=name,
                states=states,
                shared_states=galore_maps if "8bit" in name else no_shared_states,
                step=step,
                module="galore_torch",
                needs_whole_parameters=True,
                low_rank=True,
                groups=low_rank_groups,
                steps_in_backward=name.endswith("_layerwise"),
                source=_GALORE,
            )
            for name, states, step in (
                ("galore_adamw", galore_adamw_states, galore_adamw_step),
                ("galore_adamw_8bit", galore_adamw_8bit_states, galore_adamw_8bit_step),
                ("galore_adafactor", galore_adafactor_states, adafactor_step(projects=True)),
                ("galore_adamw_layerwise", galore_adamw_states, galore_adamw_step),
                ("galore_adamw_8bit_layerwise", galore_adamw_8bit_states, galore_adamw_8bit_step),
            )
        ),
        *(
            Optimizer(
                name=name,
                states=apollo_states,
                step=apollo_step,
                module="apollo_torch",
                needs_whole_parameters=True,
                low_rank=True,
                groups=low_rank_groups,
                steps_in_backward=name.endswith("_layerwise"),
                source=_APOLLO,
            )
            for name in ("apollo_adamw", "apollo_adamw_layerwise")
        ),
        Optimizer(
            name="muon",
            states=muon_states,
            groups=muon_groups,
            step=muon_step,
            needs_whole_parameters=True,
            needs_model=True,
            kernels=muon_kernels,
            flops=muon_flops,
            source="torch.optim.Muon: a momentum of each hidden matrix; fused AdamW for all else",
        ),
        Optimizer(
            name="lomo",
            fused_step=lomo_step,
            module="lomo_optim",
            steps_in_backward=True,
            needs_whole_parameters=True,
            source="lomo-optim 0.1.1: no states, arXiv 2306.09782",
        ),
        Optimizer(
            name="adalomo",
            states=adalomo_states,
            keeps_frozen=True,
            fused_step=adalomo_step,
            module="lomo_optim",
            steps_in_backward=True,
            needs_whole_parameters=True,
            source="lomo-optim 0.1.1: a row and a column of squares of every matrix, trained or "
            "not, arXiv 2310.10195",
        ),
    )
}


def resolve_optimizer(name: str) -> Optimizer:
    """The optimizer of that name; raises UnknownNameError with the nearest ones."""
    optimizer = OPTIMIZERS.get(name)
    if optimizer is None:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return optimizer
