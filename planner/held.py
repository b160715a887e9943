"""What a GPU holds from step to step where several divide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from ftplan.planner.host_memory import NOTHING_ON_HOST, HostShare, share_under_zero
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizer_steps import Updated, decay_groups
from ftplan.planner.optimizers import Optimizer
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharded import Spread, Units
from ftplan.planner.tape import Moment, constant
from ftplan.planner.trained import Trained, num_elements
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.zero import REDUCE_BUCKET_SIZE, Reduction, share_elements
from ftplan.planner.zero3 import FLOAT64_BYTES, Partition, sub_groups


def _stepping(gradients: int, temporaries: int) -> Moment:
    """The highest moment of the optimizer's step, beside weights and states."""
    parts = {"gradients": constant(gradients), "temporaries": constant(temporaries)}
    return Moment(constant(gradients + temporaries), parts)


def _share(num_elements: int, width: int) -> list[Updated]:
    """A flat share of parameters, as an optimizer is given it."""
    return [Updated(shape=(num_elements,), width=width)] if num_elements else []


def _step_of_share(optimizer: Optimizer, shares: Sequence[Updated]) -> Moment:
    """The highest moment of the optimizer's step on such shares."""
    moments = optimizer.step_moments(shares, "cuda", by_trainer=False)
    return max(moments, key=lambda moment: moment.total)


class Held(Struct, frozen=True, kw_only=True):
    """What a GPU holds whatever the batch, in bytes.

    `carried`: gradients that wait for further micro-batches; `reduced`: those that the optimizer's
    step begins with; `gradient_buffer`: what they are kept in all the time. `communication`:
    buffers that are there all the time, `exchanged`: from the beginning of forward to the end of
    backward.
    `reducing`: gradients and buffers, beside those carried, where more than backward itself needs
    is there at its end. `stepping`: moments of the optimizer's step, gradients included.
    `on_host`: what each process keeps on the host. `saved_states`: the optimizer states that a
    checkpoint holds, of all GPUs and the host.
    """

    weights: int
    adapters: int
    carried: int
    reduced: int
    optimizer_states: int
    stepping: Sequence[Moment]
    on_host: HostShare = NOTHING_ON_HOST
    gradient_buffer: int = 0
    communication: int = 0
    exchanged: int = 0
    reducing: Mapping[str, int] | None = None
    saved_states: int


def held_of_shares(units: Units, plan: TrainingPlan, spread: Spread, scale_bytes: int) -> Held:
    """Under FSDP. The scales of 4-bit weights, of `scale_bytes`, are not divided."""
    whole, optimizer = units.whole, plan.optimizer
    shares = [
        *_share((whole.reduced - whole.reduced_adapters) // spread.trained, spread.trained),
        *_share(whole.reduced_adapters // spread.adapters, spread.adapters),
    ]
    states = optimizer.state_bytes(shares)
    offloads = spread.offloads
    return Held(
        weights=whole.weights + scale_bytes,
        adapters=whole.adapters,
        carried=whole.gradients,
        reduced=0 if offloads else whole.reduced,
        optimizer_states=0 if offloads else states,
        on_host=HostShare(
            weights=whole.pinned,
            gradients=whole.pinned_gradients,
            optimizer_states=states if offloads else 0,
        ),
        stepping=[_stepping(0, 0) if offloads else _step_of_share(optimizer, shares)],
        exchanged=(units.outside if spread.kind == "fsdp1" else units.root).gathered,
        saved_states=plan.dp_shard_size * states,
    )


def held_under_zero(
    weights: int, plan: TrainingPlan, trained: Trained, reduction: Reduction
) -> Held:
    """Under ZeRO-1 and ZeRO-2: weights as the engine computes with them, fp32 masters and states
    of a share.

    The step makes one flat copy of the share's gradients and from it one in fp32
    (`scaled_global_norm` and `step`); with ZeRO-1 the shares are made beside all gradients.
    """
    width, offloads = plan.compute_bytes, plan.offload == "optimizer"
    lists = (trained.own, trained.adapters, trained.held_as_base)
    share = sum(share_elements(parameters, plan.num_gpus) for parameters in lists)
    gradients = width * trained.num_trainable_parameters
    masters = _share(share, FLOAT32_BYTES)
    states = share * FLOAT32_BYTES + plan.optimizer.state_bytes(masters)
    handing_over = _stepping(share * (width + FLOAT32_BYTES), share * width)
    updating = _step_of_share(plan.optimizer, masters)
    carries = plan.gradient_accumulation_steps > 1
    if reduction.partitions:
        reducing = {"gradients": reduction.share, "communication": reduction.bucket}
    else:
        reducing = {
            "gradients": reduction.share + (0 if carries else gradients),
            "communication": 0 if carries else reduction.bucket,
        }
    waiting = reduction.bucket if carries and not reduction.partitions else 0
    largest = max(p.size for parameters in lists for p in parameters)
    adapters = width * (num_elements(trained.added) + trained.frozen_parameters)
    return Held(
        weights=weights,
        adapters=adapters + trained.index_bytes,
        carried=reduction.share if reduction.partitions else gradients,
        reduced=reduction.share,
        optimizer_states=0 if offloads else states,
        on_host=share_under_zero(plan, share=share, states=states, largest=largest),
        stepping=[_stepping(0, 0)] if offloads else [handing_over, updating],
        communication=largest * width if offloads else 0,
        exchanged=waiting,
        reducing=reducing if reduction.at_end or not reduction.partitions else None,
        saved_states=plan.num_gpus * states,
    )


def held_under_zero3(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    partition: Partition,
    updated: Sequence[Updated],
) -> Held:
    """Under ZeRO-3: shares of all parameters, and a buffer each for the shares of the gradients and
    for gradients on their way.

    The step takes the norm of one parameter's gradient after the other, then updates one group of
    parameters after the other, whose gradients in fp32 live only then
    (`_prepare_fp32_grad_for_sub_group`). `updated`: what is trained.
    """
    width, on_host = partition.width, partition.offloads_gradients
    shares = [[partition.share(p.num_elements) for p in group] for group in decay_groups(updated)]
    groups = [group for some in shares for group in sub_groups(some, int)]
    share = sum(map(sum, groups))
    base_share = _base_share(model, partition.num_gpus)
    at_rest = 0 if partition.offloads_parameters else width
    masters = [_share(sum(group), FLOAT32_BYTES) for group in groups]
    # fp32 weights have masters beside them, too: DeepSpeed compares a `torch.device` with a string
    # where it would do without (`_create_fp32_partitions`).
    states = share * FLOAT32_BYTES + sum(plan.optimizer.state_bytes(one) for one in masters)
    stepping = [_stepping(0, max(map(max, groups)) * FLOAT64_BYTES)]
    for group, master in zip(groups, masters, strict=True):
        in_float32 = sum(group) * FLOAT32_BYTES
        joined = sum(group) * width if len(group) > 1 and width < FLOAT32_BYTES else 0
        stepping += [_stepping(joined + in_float32, 0), _step_of_share(plan.optimizer, master)]
    gradients = 0 if on_host else share * width
    return Held(
        weights=base_share * at_rest + model.buffer_bytes,
        adapters=share_elements(trained.added, partition.num_gpus) * at_rest,
        carried=gradients,
        reduced=gradients,
        gradient_buffer=gradients,
        optimizer_states=0 if on_host else states,
        on_host=share_under_zero(
            plan,
            share=share,
            states=states,
            largest=max(p.num_elements for p in updated),
            base_share=base_share,
        ),
        stepping=[_stepping(0, 0)] if on_host else stepping,
        communication=REDUCE_BUCKET_SIZE * width,
        saved_states=plan.num_gpus * states,
    )


def _base_share(model: ModelSpec, num_gpus: int) -> int:
    """Elements of a GPU's share of the model."""
    layers = sum(
        count * share_elements(layer.parameters(), num_gpus)
        for layer, count in model.layer_counts.items()
    )
    return layers + share_elements(model.outer_parameters, num_gpus)
