"""GPUs to choose of, and what is asked of a plan on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher import deepspeed
from ftplan.launcher.own_stack import installed_stack
from ftplan.planner.base_models import Available
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.goals import Limits, Wanted
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.margin import ASSUMED_MARGIN, Margin
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import Reason
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.search import choose_plan
from ftplan.planner.sharding import ZERO
from ftplan.planner.space import CHOSEN_SHARDINGS
from ftplan.profiles import lowest_prices


class Offer(Struct, frozen=True, kw_only=True):
    """Devices to choose of, and what is asked of a plan on them.

    `devices`: one, of which there are as many as asked for, or the GPUs of a machine. `launches`:
    whether the plan is carried out on them; `has_liger`: whether Liger's kernels are there.
    `host`: the machine around them, if it is known. `margin`: what is kept free on each of them.
    `reasons`: of settings among the given ones that nobody has asked for.
    """

    devices: Device | Sequence[Device]
    given: Mapping[str, Any]
    wanted: Wanted
    launches: bool = False
    has_liger: bool = False
    host: Host | None = None
    margin: Margin = ASSUMED_MARGIN
    reasons: Mapping[str, Reason] = {}

    @property
    def device(self) -> Device:
        """The one with the most free memory."""
        if isinstance(self.devices, Device):
            return self.devices
        return max(self.devices, key=lambda gpu: gpu.free_bytes)

    @property
    def shardings(self) -> Sequence[str]:
        """How GPUs may divide what a model holds."""
        launched = not self.launches or deepspeed.is_installed()
        return [s for s in CHOSEN_SHARDINGS if launched or s not in ZERO]

    @property
    def available(self) -> Available:
        """The devices, as bounds for models are told of them."""
        gpus = self.devices
        if isinstance(gpus, Device):
            gpus = [gpus] * self.given.get("num_gpus", 1)
        return Available(gpus=gpus, given=self.given)

    @property
    def is_named(self) -> bool:
        """Whether it is one GPU, as many of which are thought of as are asked for."""
        return isinstance(self.devices, Device) and self.devices.kind != "cpu"

    @property
    def num_gpus(self) -> int:
        """As many as train together at most."""
        there = 1 if isinstance(self.devices, Device) else len(self.devices)
        return int(self.given.get("num_gpus", there))

    def ranking(self, model: ModelSpec, profile: DataProfile, **more: Any) -> Ranking:
        """Plans on the devices; `more`: settings beside the given ones. Raises InputError as
        `choose_plan` does."""
        rank = partial(
            choose_plan,
            model,
            profile,
            self.devices,
            {**self.given, **more},
            installed_stack(self.device),
            shardings=self.shardings,
            has_liger=self.has_liger,
            goal=self.wanted.goal,
            limits=self.limits,
            margin=self.margin.share,
        )
        ranking = rank(host=self.host)
        # That the host lacks RAM is better told of the best plan than as a reason against all.
        return self._explained(rank() if ranking.best is None and self.host else ranking)

    def _explained(self, ranking: Ranking) -> Ranking:
        """Its plans with these reasons."""
        if ranking.best is None or not self.reasons:
            return ranking
        best, *others = (
            structs.replace(one, reasoned=one.reasoned.explained(self.reasons))
            for one in (ranking.best, *ranking.alternatives)
        )
        return structs.replace(ranking, best=best, alternatives=tuple(others))

    def front(self, model: ModelSpec, profile: DataProfile, ranking: Ranking) -> list[Evaluated]:
        """The plans of a ranking's methods that no other is better than in everything."""
        from ftplan.planner.front import front_of

        return front_of(
            ranking,
            model,
            profile,
            self.devices,
            self.given,
            installed_stack(self.device),
            shardings=self.shardings,
            has_liger=self.has_liger,
            limits=self.limits,
            host=self.host,
        )

    def with_less_memory(self, times: float) -> Offer:
        """The devices with so many times less memory free."""
        if isinstance(self.devices, Device):
            return structs.replace(self, devices=_with_less(self.devices, times))
        return structs.replace(self, devices=[_with_less(gpu, times) for gpu in self.devices])

    @property
    def limits(self) -> Limits:
        """What a run may take, at the lowest price that is known of the device."""
        prices = [price.usd_per_gpu_hour for price in lowest_prices(self.device.name).values()]
        return Limits(
            seconds=self.wanted.seconds,
            usd=self.wanted.usd,
            usd_per_gpu_hour=min(prices, default=None),
        )


def _with_less(device: Device, times: float) -> Device:
    return structs.replace(device, free_bytes=round(device.free_bytes / times))
