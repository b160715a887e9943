"""From a plan to what its step's trace depends on."""

from __future__ import annotations

from functools import partial

from msgspec import Struct, structs

from ftplan.planner.adapters import (
    adapter_maker,
    early_gradient_bytes,
    loss_copy_bytes,
    trains_shared_alone,
)
from ftplan.planner.generation import Generation, Rollout
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.kv_cache import CacheKind
from ftplan.planner.losses import LossShape
from ftplan.planner.model_spec import Linear, ModelSpec, Parameter
from ftplan.planner.modules import Numerics
from ftplan.planner.objective_checks import GENERATION_SETTINGS
from ftplan.planner.objectives import LOSS_SETTINGS, asks_reference, keeps_reference
from ftplan.planner.peft_options import PROMPTING, PeftOptions
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prefixes import keys_in_front, prefix_of
from ftplan.planner.prompts import prompt_maker, tokens_in_front
from ftplan.planner.sharded import Spread
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_trace import StepSettings, WholeRows
from ftplan.planner.trained import COPIES, Trained
from ftplan.planner.units import BYTES_PER_DTYPE, FLOAT32_BYTES
from ftplan.planner.zero import REDUCE_BUCKET_SIZE, Reduction, share_elements
from ftplan.planner.zero3 import Partition

MASK_ALIGNMENT = 16  # ATen's memory-efficient kernel reads a mask in pieces of so many entries
NUMBER_BYTES = 8  # of a token's number, a label, an entry of a mask


class Workload(Struct, frozen=True):
    """What is discrete about the largest micro-batch: all else is linear in its rows and tokens.

    `masked_windows`: sliding windows no longer than a row, for which transformers makes a mask
    (`_ignore_causal_mask_sdpa`). `mask_padding`: entries by which a kernel that copies masks makes
    their rows longer. `whole_loss_shape`: of rows that GPUs do not divide. `generation`: how the
    rows come about, where the model makes them.
    """

    single_row: bool
    accumulates: bool
    loss_shape: LossShape
    masked_windows: frozenset[int]
    mask_padding: int
    whole_loss_shape: LossShape
    generation: Generation | None = None

    @staticmethod
    def of(
        model: ModelSpec, plan: TrainingPlan, rows: int, length: int, kind: DeviceKind = "cuda"
    ) -> Workload:
        """Of a micro-batch of so many rows, as the model is given them (`model_rows`)."""
        generation = _generation(plan)
        # Without Triton, TRL's fused loss takes all places, labelled or not.
        alone = generation.completion_length if generation and kind == "cuda" else None
        _, in_front = _in_front(plan)

        def shape(length: int) -> LossShape:
            sizes = model.vocab_size, model.hidden_size
            return LossShape.of(plan.loss, rows, length, *sizes, alone)

        own = shape(length)
        return Workload(
            rows == 1,
            plan.gradient_accumulation_steps > 1,
            own,
            frozenset(window for window in model.sliding_windows if window <= length),
            -(length + in_front) % MASK_ALIGNMENT if in_front else 0,
            own if plan.cp_size == 1 else shape(length * plan.cp_size),
            generation,
        )


def _generation(plan: TrainingPlan) -> Generation | None:
    """TRL asks the policy for log-probabilities where an optimizer step may come between
    generating and training (`_generate_and_score_completions`)."""
    if not plan.resolved_objective.generates:
        return None
    accumulated = plan.gradient_accumulation_steps
    generated = plan.generated_rows // plan.per_device_train_batch_size
    return Generation(
        completion_length=plan.max_completion_length,
        micro_batches=generated,
        meets_gradients=generated % accumulated != 0,
        scores_policy=plan.resolved_objective.scores_always or accumulated % generated != 0,
    )


def row_length(plan: TrainingPlan, longest_row: int | None) -> int:
    """Tokens of the longest row: the data's, where known, cut at `max_length`. Of prompts it counts
    the longest completion, too."""
    if not longest_row:
        return plan.max_length
    return min(plan.max_length, longest_row)


def model_rows(plan: TrainingPlan, length: int) -> tuple[int, int]:
    """(rows, length) of what goes through the model at once, rows of the data being of that
    length; packed rows are one. Learned tokens stand in front of each. GPUs may divide a row."""
    rows = plan.per_device_train_batch_size * plan.resolved_objective.sequences_per_row
    in_front, _ = _in_front(plan)
    own = -(-length // plan.cp_size)
    return (1, rows * own + in_front) if plan.packing else (rows, own + in_front)


def mean_model_rows(plan: TrainingPlan, tokens: float) -> tuple[float, float]:
    """(tokens, length) of what goes through the model at once on the mean micro-batch, of `tokens`
    of the data for one text of each row. Both answers to a question do, as long as the longer."""
    length = tokens / plan.per_device_train_batch_size
    return tokens * plan.resolved_objective.sequences_per_row, length


def in_front_of_rows(plan: TrainingPlan) -> int:
    """Learned tokens in front of each row."""
    return _in_front(plan)[0]


def _in_front(plan: TrainingPlan) -> tuple[int, int]:
    """Learned tokens in front of each row, and learned keys and values."""
    method = plan.resolved_method
    if method.peft_type not in PROMPTING:
        return 0, 0
    options = method.options(plan.method_settings)
    return tokens_in_front(options), keys_in_front(options)


def step_settings(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
    trained: Trained,
) -> StepSettings:
    """Of `model` as the plan's objective has it, of which `trained` is trained."""
    whole = _of_training(model, plan, workload, kind, capability, stack, trained)
    settings = _spread_out(whole, plan)
    if workload.generation is not None:
        return _with_rollout(model, plan, settings, workload.generation)
    if not plan.resolved_objective.has_reference:
        return settings
    return structs.replace(
        settings,
        reference=_of_reference(model, plan, settings),
        asks_before=plan.precompute_ref_log_probs,
    )


def _of_training(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
    trained: Trained,
) -> StepSettings:
    """Of the micro-batch that is trained on, where a GPU holds the whole model."""
    autocast = plan.autocast and plan.trainer != "loop"  # a plain loop does without
    objective = plan.resolved_objective
    options = plan.resolved_method.options(plan.method_settings)
    # Checkpointing asks for it (`_activation_checkpointing_enable` of transformers 5); formerly for
    # adapters alone.
    hooks_input = plan.gradient_checkpointing and (
        plan.resolved_method.adapter or stack.transformers_version is None
    )
    in_model, outer = _loses_in_model(plan), _outer_width(plan, stack)
    in_front, width = tokens_in_front(options), adapter_weight_bytes(plan)
    return StepSettings(
        numerics=_numerics(model, plan, workload, stack, trained),
        trained_names=_trained_in_layers(model, trained),
        adapted=_adapted_in_layers(model, trained),
        trains_embeddings=trained.trains_embeddings,
        trains_head=trained.trains_lm_head,
        trained_outside=_trained_names(trained) & {p.name for p in model.outer_parameters},
        input_learns=trained.trains_embeddings
        or bool(trained.num_trained_tokens or in_front)
        or hooks_input,
        hooks_input=hooks_input,
        autocast=plan.compute_bytes if autocast else None,
        is_fp16=plan.dtype == "float16" or plan.mixed_precision == "fp16",
        on_cuda=kind == "cuda",
        capability=capability,
        gradient_checkpointing=plan.gradient_checkpointing,
        every_n_layers=plan.every_n_layers,
        use_reentrant=plan.use_reentrant,
        accumulates=workload.accumulates and not plan.optimizer.steps_in_backward,
        single_row=workload.single_row,
        loss=plan.loss,
        loss_shape=workload.loss_shape,
        shifts_logits=stack.shifts_logits,
        holds_logits=plan.trainer == "loop" or stack.holds_outputs,
        returns_fp32=autocast,
        lets_logits_go=stack.lets_logits_go,
        loses_in_16_bits=stack.loses_in_16_bits(model.model_type),
        embedding_width=outer,
        head_width=outer,
        input_bytes=_input_bytes(plan),
        whole_rows=_whole_rows(plan, workload),
        scores=objective.scores,
        finds_top1=objective.finds_top1,
        cache=_cache(model, plan, stack),
        spread=spread_of(plan, stack),
        reduction=_reduction(plan, trained),
        partition=_partition(plan),
        update=plan.optimizer.update(),
        pairs_rows=objective.pairs_rows,
        prompted=frozenset(trained.adapted_layers if _attends_prompts(options) else ()),
        prefix=prefix_of(options, trained, model.num_hidden_layers, width, outer),
        prompts=prompt_maker(options, trained, model.hidden_size, width),
        tokens_in_front=in_front,
        num_trained_tokens=trained.num_trained_tokens,
        trains_head_rows=trained.trains_head_rows,
        early_gradients=early_gradient_bytes(options, trained, width, loss_in_model=in_model),
        loss_copies=loss_copy_bytes(options, trained, loss_in_model=in_model),
    )


def _numerics(
    model: ModelSpec, plan: TrainingPlan, workload: Workload, stack: Stack, trained: Trained
) -> Numerics:
    """Of a layer without adapters whose own parameters are frozen."""
    options = plan.resolved_method.options(plan.method_settings)
    in_model, outer, width = (
        _loses_in_model(plan),
        _outer_width(plan, stack),
        adapter_weight_bytes(plan),
    )
    return Numerics(
        weights=plan.weight_bytes,
        residual=outer,
        norms=FLOAT32_BYTES if stack.kbit_prepare else plan.weight_bytes,
        adapters=2 if stack.casts_back else width,
        # What ftplan asks of bitsandbytes (launcher/training/build.py).
        compute=BYTES_PER_DTYPE[plan.quantized_compute_dtype],
        quantization=plan.quantization,
        # The same for all of the method's plans: by it the trace of a layer is known again.
        adapter=model.remembered(
            ("adapter", plan.method, plan.method_settings, in_model),
            partial(adapter_maker, options, trained, loss_in_model=in_model),
        ),
        double_quant=plan.double_quant,
        rank=plan.lora_rank,
        dropout=plan.lora_dropout if plan.resolved_objective.has_dropout else 0.0,
        drops=plan.lora_dropout > 0,
        attn_implementation=plan.attn_implementation,
        fused_kernels=stack.fused_kernels,
        separate_experts=stack.separates_experts,
        padded=stack.padded,
        masked_windows=workload.masked_windows,
        cache=_cache(model, plan, stack),
        keys_in_front=keys_in_front(options),
        mask_padding=workload.mask_padding,
        has_bottlenecks=plan.method == "bottleneck",
        prompt_tokens=options.count("adapter_len") if _attends_prompts(options) else 0,
        prompt_width=plan.weight_bytes if plan.quantization == "none" else width,
        repeats_key_value=stack.repeats_heads(model.model_type, plan.attn_implementation),
        efficient_takes_groups=stack.efficient_takes_groups,
        row_parts=plan.cp_size,
    )


def _loses_in_model(plan: TrainingPlan) -> bool:
    """TRL's own loss is computed outside of the model."""
    return plan.loss != "trl-fused"


def _outer_width(plan: TrainingPlan, stack: Stack) -> int:
    """Bytes of a parameter of embeddings and output projection."""
    return FLOAT32_BYTES if stack.kbit_prepare and not stack.casts_back else plan.weight_bytes


def _attends_prompts(options: PeftOptions) -> bool:
    return options.peft_type == "ADAPTION_PROMPT"


def _input_bytes(plan: TrainingPlan) -> int:
    """Of what the model is given, a token. Of a divided row each GPU keeps the whole row's, and
    numbers of positions and shifted labels besides (`_prepare_context_parallel_inputs` of
    transformers 5.23; torch's `context_parallel` shortens tensors, not their storages)."""
    numbers = plan.resolved_objective.batch_numbers
    return NUMBER_BYTES * ((numbers + 2) * plan.cp_size if plan.cp_size > 1 else numbers)


def _whole_rows(plan: TrainingPlan, workload: Workload) -> WholeRows | None:
    """TRL's evaluation divides no rows (`SFTTrainer.prediction_step` of TRL 1.16)."""
    if plan.cp_size == 1 or plan.trainer != "trl":
        return None
    return WholeRows(
        parts=plan.cp_size,
        loss_shape=workload.whole_loss_shape,
        input_bytes=NUMBER_BYTES * plan.resolved_objective.batch_numbers,
    )


def _with_rollout(
    model: ModelSpec, plan: TrainingPlan, settings: StepSettings, generation: Generation
) -> StepSettings:
    """With the passes that make completions and score them. Beside adapters the model generates
    without autocast, which is around PEFT's wrapper (`PeftModel.generate` calls what is within)."""
    passing = structs.replace(settings, gradient_checkpointing=False)
    adapter = plan.resolved_method.adapter
    scored = [passing] if generation.scores_policy else []
    if asks_reference(plan):
        scored.append(_of_reference(model, plan, passing))
    if keeps_reference(plan):  # it does not train, so nothing is dropped
        scored[-1] = structs.replace(scored[-1], has_dropout=False)
    generating = _without_autocast(passing) if adapter else passing
    rollout = Rollout(
        generation=generation,
        model=structs.replace(generating, single_row=False),  # a group is several
        scored=tuple(scored),
        keeps_sums=plan.resolved_objective.scores_always,
        judge=_judge(model, plan, settings),
    )
    return structs.replace(settings, rollout=rollout)


def _judge(
    model: ModelSpec, plan: TrainingPlan, settings: StepSettings
) -> tuple[ModelSpec, StepSettings] | None:
    """The reward model with settings of its pass: it computes in the dtype that it is held in, and
    nothing of it is trained (launcher/training/rewards.py)."""
    judge = model.reward_model
    if judge is None:
        return None
    alone = plan.replace(
        objective="reward",
        loss="stock",
        method="full",
        quantization="none",
        dtype=plan.compute_dtype,
        mixed_precision="no",
        gradient_checkpointing=False,
        every_n_layers=1,
        use_reentrant=False,
        trainable_modules=(),
        modules_to_save=(),
        peft_config=(),
        **{name: getattr(_ANY_PLAN, name) for name in (*GENERATION_SETTINGS, *LOSS_SETTINGS)},
    )
    kind: DeviceKind = "cuda" if settings.on_cuda else "cpu"
    rows, length = plan.per_device_train_batch_size, plan.max_length
    workload = Workload.of(judge, alone, rows, length, kind)
    capability = settings.capability
    return judge, _of_training(judge, alone, workload, kind, capability, OWN_STACK, Trained())


_ANY_PLAN = TrainingPlan()


def _cache(model: ModelSpec, plan: TrainingPlan, stack: Stack) -> CacheKind | None:
    """What is cached without checkpointing. A trainer turns `use_cache` off in the model's config;
    TRL's own losses, Liger's forward and plain loops in each call."""
    in_call = plan.objective != "sft" or plan.loss in ("trl-fused", "liger")
    if in_call or plan.trainer == "loop":
        return None
    if stack.caches_products(model.model_type):
        return "product"
    return "copies" if model.nests_config else None


def _of_reference(model: ModelSpec, plan: TrainingPlan, settings: StepSettings) -> StepSettings:
    """The model as it was: without adapters, or a second one. TRL does not freeze that, so autocast
    takes its parameters as trained ones."""
    if not keeps_reference(plan) and plan.resolved_method.adapter:
        numerics = structs.replace(settings.numerics, keys_in_front=0, has_bottlenecks=False)
        return structs.replace(
            settings,
            numerics=numerics,
            adapted={},
            num_trained_tokens=0,
            trains_head_rows=False,
            prefix=None,
            prompted=frozenset(),
        )
    if not keeps_reference(plan):
        return settings
    return structs.replace(
        settings,
        has_dropout=False,
        trained_names={
            place: frozenset(p.name for p in layer.parameters())
            for place, layer in enumerate(model.layers)
        },
        trained_outside=frozenset(p.name for p in model.outer_parameters),
        trains_embeddings=True,
        trains_head=True,
        finds_top1=False,
    )


def _spread_out(settings: StepSettings, plan: TrainingPlan) -> StepSettings:
    """In which widths several GPUs that divide the model's state compute."""
    spread = settings.spread
    if settings.reduction is not None:
        return _without_autocast(_computing_in(settings, plan.compute_bytes))
    if settings.partition is not None:
        engine = _without_autocast(_computing_in(settings, settings.partition.width))
        return structs.replace(engine, numerics=structs.replace(engine.numerics, gathers=True))
    if spread is None or spread.gathered is None:
        return settings
    computing = _computing_in(settings, spread.gathered)
    if spread.kind == "fsdp2":
        return _without_autocast(computing)  # `_prepare_fsdp2` of accelerate 1.15
    # Adapters are units of their own, which hide the width that they compute in.
    numerics = structs.replace(computing.numerics, adapter_input=spread.adapters)
    return structs.replace(computing, numerics=numerics)


def _computing_in(settings: StepSettings, width: int) -> StepSettings:
    """All parameters but quantized ones are of that width when they are computed with."""
    numerics = structs.replace(
        settings.numerics, weights=width, residual=width, norms=width, adapters=width
    )
    return structs.replace(settings, numerics=numerics, embedding_width=width, head_width=width)


def _without_autocast(settings: StepSettings) -> StepSettings:
    return structs.replace(settings, autocast=None, returns_fp32=False)


def _reduction(plan: TrainingPlan, trained: Trained) -> Reduction | None:
    """How ZeRO-1 or ZeRO-2 reduces gradients, which have the engine's dtype."""
    if plan.sharding not in ("zero1", "zero2"):
        return None
    share = share_elements((*trained.own, *trained.added), plan.num_gpus)
    return Reduction(
        bucket=REDUCE_BUCKET_SIZE * plan.compute_bytes,
        share=0 if plan.offload == "optimizer" else share * plan.compute_bytes,
        partitions=plan.sharding == "zero2",
        accumulates=plan.gradient_accumulation_steps > 1,
        at_end=trained.num_trainable_parameters <= REDUCE_BUCKET_SIZE,
        waits=trains_shared_alone(trained),
    )


def _partition(plan: TrainingPlan) -> Partition | None:
    """How ZeRO-3 divides the model; PEFT's wrappers are two modules around it."""
    if plan.sharding != "zero3":
        return None
    wrappers = ("peft_model", "tuner") if plan.resolved_method.adapter else ()
    return Partition(
        num_gpus=plan.num_gpus,
        width=plan.compute_bytes,
        offloads_parameters=plan.offload == "parameters",
        offloads_gradients=plan.offload != "none",
        callers=(*wrappers, "causal_lm", "model"),
        accumulates=plan.gradient_accumulation_steps > 1,
    )


def spread_of(plan: TrainingPlan, stack: Stack) -> Spread | None:
    """How several GPUs divide the parameters; None where each holds all of them.

    Under mixed precision accelerate holds what is trained in fp32; not under FSDP2 if the base is
    quantized (`fsdp2_prepare_model` and `prepare_model` of accelerate 1.15).
    """
    if plan.sharding != "fsdp":
        return None
    first = stack.fsdp_version == 1
    masters = plan.autocast and (first or plan.quantization == "none")
    return Spread(
        kind="fsdp1" if first else "fsdp2",
        num_shards=plan.dp_shard_size,
        replicates=plan.dp_replicate_size > 1,
        frozen=plan.weight_bytes,
        trained=FLOAT32_BYTES if masters else plan.weight_bytes,
        adapters=FLOAT32_BYTES if masters else adapter_weight_bytes(plan),
        gathered=plan.compute_bytes if plan.autocast else None,
        offloads=plan.offload == "parameters",
        checkpointed_around=first and plan.gradient_checkpointing and stack.checkpoints_around,
    )


def _trained_names(trained: Trained) -> frozenset[str]:
    """Names of the model's parameters that are trained, themselves or as copies."""
    names = [p.name for p in trained.own]
    for kind in COPIES:
        copied = f".{kind}."
        names += [p.name.replace(copied, ".") for p in trained.held_as_base if copied in p.name]
    return frozenset(names)


def _trained_in_layers(model: ModelSpec, trained: Trained) -> dict[int, frozenset[str]]:
    """The same for each layer that has some."""
    deep = model.num_hidden_layers
    if trained.trained_layers:
        places = range(deep - trained.trained_layers, deep)
        return dict.fromkeys(places, trained.trained_in_layers)
    names = _trained_names(trained)
    of_kind = {
        id(layer): names & {p.name for p in layer.parameters()} for layer in model.layer_counts
    }
    return {place: of_kind[id(layer)] for place, layer in enumerate(model.layers)}


def _adapted_in_layers(model: ModelSpec, trained: Trained) -> dict[int, frozenset[Linear]]:
    """The linear modules that carry an adapter, of each layer that has some."""
    of_kind = {id(layer): frozenset(trained.linears_of(layer)) for layer in model.layer_counts}
    return {place: of_kind[id(model.layers[place])] for place in trained.adapted_layers}


def adapter_weight_bytes(plan: TrainingPlan) -> int:
    """Bytes of one adapter weight.

    PEFT holds adapters of a 16-bit base in fp32 (`autocast_adapter_dtype`); TRL's trainers
    cast the adapters of a quantized base to bf16 (trl.trainer.sft_trainer, TRL 1.16).
    """
    if plan.quantization != "none" and plan.trainer == "trl":
        return 2
    return FLOAT32_BYTES if plan.autocast_adapter_dtype else plan.weight_bytes


def trained_widths(
    plan: TrainingPlan, trained: Trained
) -> tuple[tuple[tuple[Parameter, ...], int], ...]:
    """(parameters, bytes each) of all that is trained: the model's own, adapters, and what is
    held as the base is."""
    return (
        (trained.own, plan.weight_bytes),
        (trained.adapters, adapter_weight_bytes(plan)),
        (trained.held_as_base, plan.weight_bytes),
    )
