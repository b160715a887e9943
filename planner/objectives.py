"""What a run trains the model to do: imitate answers, prefer them, or score them.

Names are those of TRL's trainers; `launcher/training/objectives.py` has one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from ftplan.planner.model_spec import Layer, ModelSpec, Parameter
from ftplan.planner.trained import MethodSettings, Trained, with_biases

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan


# Families whose modelling code has a torch.nn.Dropout for attention weights, where others hand the
# kernel a number; and those without such modules behind attention, feed-forward and embeddings,
# where others have them (transformers 5.23).
DROPOUT_MODULE_IN_ATTENTION = frozenset(("gpt2", "gpt_neo", "gptj", "codegen", "bloom", "falcon"))
DROPOUT_NUMBER_BESIDE = frozenset(("bloom", "falcon", "opt", "starcoder2"))


class Objective(Struct, frozen=True, kw_only=True):
    """A training objective, as TRL 1.16 carries it out.

    `each_row`: what a row of the data holds, where it is more than one text, and
    `sequences_per_row` how many of them go through the model together. `batch_numbers`: numbers of
    64 bits that a micro-batch has for each token of those, and that each generated row keeps until
    others are generated. `generates`: rows are prompts, whose completions the model makes while it
    trains (`planner/generation.py`); `scores_always`: it asks the policy for their
    log-probabilities though no step has been made since, and keeps their sums. `only_loss`: the one
    loss kernel that its trainer has, for the reason `why_only_loss`; None: any. `has_reference`:
    the loss compares with the model as it was before training. `pairs_rows`: prompts with other
    rows' completions are read too, in passes of their own without gradients. `scores`: the model
    has one score a row instead of logits. `has_dropout`: TRL leaves dropout on. `finds_top1`: it
    reports how often the target is the most probable token. `min_batch_size`: rows that a
    micro-batch must have. `beta`: what the loss weighs with, where nobody says otherwise; None: it
    has no such weight. `gamma_beta_ratio`: the margin that it asks for. `loss_types`: variants that
    need no other memory, the usual first, and `other_loss_types`, why each of the trainer's others
    is refused. `learning_rate`: for full tuning of a model of some billion parameters, by
    `learning_rate_source`; None: as plain fine-tuning.
    """

    name: str
    title: str
    source: str
    batch_numbers: int
    each_row: str = ""
    sequences_per_row: int = 1
    only_loss: str | None = None
    why_only_loss: str = ""
    has_reference: bool = False
    pairs_rows: bool = False
    scores: bool = False
    has_dropout: bool = False
    finds_top1: bool = False
    min_batch_size: int = 1
    generates: bool = False
    scores_always: bool = False
    beta: float | None = None
    gamma_beta_ratio: float | None = None
    loss_types: tuple[str, ...] = ()
    other_loss_types: Mapping[str, str] = {}
    learning_rate: float | None = None
    learning_rate_source: str = ""


# Settings of a loss, each with an objective's own value where it has the setting.
LOSS_SETTINGS = ("beta", "gamma_beta_ratio", "loss_type")

_TILES = "it takes log-probabilities in tiles, whole logits never exist"
_NO_SMOOTHING = "it needs `label_smoothing`, which plans have not"
_SORTS = "it compares the pairs of a micro-batch, whose size is chosen for its speed"

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            name="sft",
            title="supervised fine-tuning",
            source="trl.SFTTrainer",
            batch_numbers=3,  # tokens, labels, attention mask
            has_dropout=True,
            finds_top1=True,
        ),
        Objective(
            name="dpo",
            title="direct preference optimization",
            source="Rafailov et al. 2023, arXiv 2305.18290; trl.DPOTrainer",
            batch_numbers=4,  # tokens, attention mask, completion mask, labels
            each_row="chosen and rejected",
            sequences_per_row=2,
            only_loss="trl-fused",
            why_only_loss=_TILES,
            has_reference=True,
            finds_top1=True,
            beta=0.1,
            loss_types=(
                *("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair"),
                *("sppo_hard", "apo_zero", "apo_down", "discopop"),
            ),
            other_loss_types={
                "exo_pair": _NO_SMOOTHING,
                "robust": _NO_SMOOTHING,
                "aot": _SORTS,
                "aot_unpaired": _SORTS,
                "sft": "it trains chosen answers alone, as `--objective sft` does",
            },
            learning_rate=5e-7,
            learning_rate_source="TRL's example, as Zephyr's (arXiv 2310.16944)",
        ),
        Objective(
            name="orpo",
            title="odds ratio preference optimization",
            source="Hong et al. 2024, arXiv 2403.07691; ftplan.launcher.training.reference_free",
            batch_numbers=4,  # as DPO
            each_row="chosen and rejected",
            sequences_per_row=2,
            only_loss="trl-fused",
            why_only_loss=_TILES,
            finds_top1=True,
            beta=0.1,
            learning_rate=8e-6,
            learning_rate_source="TRL's example",
        ),
        Objective(
            name="simpo",
            title="simple preference optimization",
            source="Meng et al. 2024, arXiv 2405.14734; ftplan.launcher.training.reference_free",
            batch_numbers=4,  # as DPO
            each_row="chosen and rejected",
            sequences_per_row=2,
            only_loss="trl-fused",
            why_only_loss=_TILES,
            finds_top1=True,
            beta=2.0,
            gamma_beta_ratio=0.5,
            learning_rate=6e-7,
            learning_rate_source="the authors' for Llama-3-8B",
        ),
        Objective(
            name="kto",
            title="Kahneman-Tversky optimization",
            source="Ethayarajh et al. 2024, arXiv 2402.01306; trl.KTOTrainer",
            batch_numbers=7,  # those of DPO, and all but labels of other rows' completions
            only_loss="trl-fused",
            why_only_loss=_TILES,
            has_reference=True,
            pairs_rows=True,
            min_batch_size=2,
            beta=0.1,
            learning_rate=5e-7,
            learning_rate_source="TRL's example",
        ),
        Objective(
            name="reward",
            title="reward modelling",
            source="Ouyang et al. 2022, arXiv 2203.02155; trl.RewardTrainer",
            batch_numbers=2,  # tokens, attention mask
            each_row="chosen and rejected",
            sequences_per_row=2,
            scores=True,
            only_loss="stock",
            why_only_loss="the model gives a row one score and has no logits over the vocabulary",
            learning_rate=1e-5,
            learning_rate_source="TRL's example",
        ),
        Objective(
            name="grpo",
            title="group relative policy optimization",
            source="Shao et al. 2024, arXiv 2402.03300; trl.GRPOTrainer",
            batch_numbers=3,  # tokens, attention mask, labels: joined anew for each micro-batch
            only_loss="trl-fused",
            why_only_loss=_TILES,
            has_dropout=True,
            generates=True,
            beta=0.0,
            learning_rate=1e-6,
            learning_rate_source="TRL's default, as DeepSeekMath's (arXiv 2402.03300)",
        ),
        Objective(
            name="rloo",
            title="REINFORCE leave-one-out",
            source="Ahmadian et al. 2024, arXiv 2402.14740; trl.RLOOTrainer",
            batch_numbers=3,  # as GRPO
            only_loss="trl-fused",
            why_only_loss=_TILES,
            has_dropout=True,
            generates=True,
            scores_always=True,
            beta=0.05,
            learning_rate=1e-6,
            learning_rate_source="TRL's default",
        ),
    )
}


def with_score(model: ModelSpec) -> ModelSpec:
    """The model as one for sequence classification: a score in the place of the output
    projection (transformers.modeling_layers.GenericForSequenceClassification)."""
    score = Parameter(name="score.weight", shape=(1, model.hidden_size))
    return structs.replace(
        model,
        scores=True,
        tie_word_embeddings=True,
        lm_head_bias=False,
        scales_logits=False,
        final_logit_softcapping=False,
        other_parameters=(*model.other_parameters, score),
    )


def trained_model(model: ModelSpec, plan: TrainingPlan) -> ModelSpec:
    """The model that the plan's objective trains."""
    objective = plan.resolved_objective
    if plan.method == "bitfit":
        model = with_biases(model)
    if objective.scores and not model.scores:
        model = model.remembered("with score", partial(with_score, model))
    if objective.has_dropout:
        return model
    return model.remembered("without dropout", partial(without_dropout_modules, model))


def without_dropout_modules(model: ModelSpec) -> ModelSpec:
    """The model after TRL's `disable_dropout`, which sets the rate of torch.nn.Dropout modules to
    0: what a family hands to a function as a number stays (trl/trainer/utils.py)."""
    in_attention = model.model_type in DROPOUT_MODULE_IN_ATTENTION
    beside = model.model_type not in DROPOUT_NUMBER_BESIDE
    changed: dict[int, Layer] = {}
    for layer in model.layer_counts:
        attention = layer.attention
        if in_attention and attention.dropout:
            attention = structs.replace(attention, dropout=0.0)
        dropout = 0.0 if beside else layer.dropout
        changed[id(layer)] = structs.replace(layer, attention=attention, dropout=dropout)
    layers = tuple(changed[id(layer)] for layer in model.layers)
    embedding_dropout = 0.0 if beside else model.embedding_dropout
    if (layers, embedding_dropout) == (model.layers, model.embedding_dropout):
        return model
    return structs.replace(model, layers=layers, embedding_dropout=embedding_dropout)


def trained_part(model: ModelSpec, plan: TrainingPlan) -> Trained:
    """What the plan trains of that model: PEFT trains a copy of the score beside adapters."""
    settings, objective = plan.method_settings, plan.resolved_objective
    key = ("trained", plan.method, settings, objective.scores, objective.has_dropout)
    return model.remembered(key, partial(_counted, model, plan, settings))


def _counted(model: ModelSpec, plan: TrainingPlan, settings: MethodSettings) -> Trained:
    trained = plan.resolved_method.count(trained_model(model, plan), settings)
    if not plan.resolved_objective.scores or plan.resolved_method.peft_type is None:
        return trained
    copy = Parameter(name="score.modules_to_save.weight", shape=(1, model.hidden_size))
    return structs.replace(trained, held_as_base=(*trained.held_as_base, copy))


def asks_reference(plan: TrainingPlan) -> bool:
    """Whether the loss compares with the model as it was; GRPO's does where `beta` is not 0."""
    objective = plan.resolved_objective
    return objective.has_reference or (objective.generates and beta_of(plan) > 0)


def beta_of(plan: TrainingPlan) -> float:
    """What the loss weighs with: given, or the objective's own; 0 where it has none."""
    return (plan.resolved_objective.beta or 0.0) if plan.beta is None else plan.beta


def keeps_reference(plan: TrainingPlan) -> bool:
    """Whether a second model is held: not where adapters can be switched off, nor where its
    log-probabilities are computed before."""
    asks = asks_reference(plan) and not plan.precompute_ref_log_probs
    return asks and not plan.resolved_method.adapter
