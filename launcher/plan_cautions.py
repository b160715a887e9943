"""What to be warned about before a planned run: its data, its model, its settings, its device."""

from __future__ import annotations

from collections import Counter

from ftplan.launcher import deepspeed
from ftplan.launcher.planning import Planned, host_lacks
from ftplan.launcher.token_settings import is_base_model
from ftplan.planner.combination import Caution
from ftplan.planner.combinations import cautions
from ftplan.planner.errors import InputError
from ftplan.planner.overlong import said_counts
from ftplan.planner.peft_options import read_options
from ftplan.planner.policy import effective_batch_size
from ftplan.planner.vocabulary import OF_TEMPLATE, shown_tokens


def plan_cautions(planned: Planned) -> list[Caution]:
    """Everything of `plan --json`'s `warnings`, in the order in which it is printed."""
    return [
        *(Caution(name="data", text=text) for text in planned.profile.warnings),
        *cautions(planned.source.spec, planned.chosen.plan, planned.device),
        *_large_steps(planned),
        *_cut_rows(planned),
        *_untrained_template(planned),
        *_left_out(planned),
        *_not_launched(planned),
        *_host_lacks(planned),
    ]


def _large_steps(planned: Planned) -> list[Caution]:
    """More GPUs than the recipe's rows of a step: each has one row, and the steps are larger."""
    plan, given = planned.chosen.plan, planned.offer.given
    rows = effective_batch_size(planned.profile.num_train_rows).value
    asked = {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(given)
    if asked or plan.data_parallel_size <= rows or plan.resolved_objective.generates:
        return []
    return [
        Caution(
            name="rows-of-a-step",
            text=f"{plan.data_parallel_size:,} GPUs take a row each, and the recipe has {rows} a "
            "step: fewer, larger steps may learn less",
            way_out=f"take {rows} GPUs at most, or look at the held-out loss",
        )
    ]


def _cut_rows(planned: Planned) -> list[Caution]:
    """Of the rows that are trained on, then of those held out."""
    profile, cautions = planned.profile, []
    for counts, side in ((profile.train_counts, ""), (profile.eval_counts, "held out: ")):
        if said := said_counts(counts, profile.limit):
            cautions.append(Caution(name="cut-rows", text=side + said))
    return cautions


def _untrained_template(planned: Planned) -> list[Caution]:
    """A base model may never have seen the tokens of the chat template that it comes with
    (LLaMA-Factory issues 2684 and 7943, Qwen issue 622)."""
    plan, tokenizer = planned.chosen.plan, planned.tokenizer
    freezes_tokens = (
        plan.resolved_method.adapter
        and not plan.modules_to_save
        and "trainable_token_indices" not in read_options(plan.peft_config)
    )
    if not (freezes_tokens and planned.chat_template and is_base_model(planned.source)):
        return []
    assert tokenizer is not None, "what has a chat template has a tokenizer"
    left = [token for token in tokenizer.template_tokens if token not in plan.trained_tokens]
    if not left:
        return []
    return [
        Caution(
            name="untrained-template",
            text=f"{planned.source.spec.name} is a base model, and adapters leave its embeddings "
            f"as they are: tokens of the chat template that it never saw, {shown_tokens(left)}, "
            "are not learnt, and so it may not learn to stop",
            way_out="leave out `--chat-template`, which plain headings then take the place of, or "
            f"add `--train-tokens {OF_TEMPLATE}`",
        )
    ]


def _left_out(planned: Planned) -> list[Caution]:
    """Of all methods' candidates, by reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for left in planned.ranking.left_out:
        counts[left.reason, left.hint] += left.count
    return [
        Caution(name="left-out", text=f"{count} plans were left out: {reason}", way_out=hint)
        for (reason, hint), count in counts.items()
    ]


def _not_launched(planned: Planned) -> list[Caution]:
    try:
        deepspeed.check_installed(planned.chosen.plan.sharding)
    except InputError as error:
        text = f"{error.message}: `ftplan auto` plans without it here"
        return [Caution(name="not-launched", text=text, way_out=error.hint or "")]
    return []


def _host_lacks(planned: Planned) -> list[Caution]:
    if planned.machine is None:
        return []
    lacks = host_lacks(planned.chosen, planned.machine.host, planned.device, planned.profile)
    return [Caution(name="host", text=lack, way_out=hint) for lack, hint in lacks]
