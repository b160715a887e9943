"""What would hold a method that was not taken for want of memory: GPUs of the catalog, or more of
those at hand, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from msgspec import Struct

from ftplan.launcher.cards import cards_by_memory, usd_per_hour
from ftplan.launcher.offer import Offer
from ftplan.launcher.own_stack import installed_stack
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import flags_of
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Rejection
from ftplan.planner.remedies import MOST_OF_A_MACHINE, Remedy, Wish, fewest_of, smallest_of
from ftplan.planner.sharding import SHARDING_TITLES
from ftplan.planner.units import MIB, format_bytes


class Offered(Struct, frozen=True, kw_only=True):
    """A remedy, what it costs where a price is known, and with which flags `ftplan plan` plans for
    it."""

    remedy: Remedy
    flags: tuple[str, ...]
    usd_per_hour: float | None

    def to_dict(self) -> dict[str, Any]:
        """As `rejected[].would_do[]` of `plan --json`."""
        remedy = self.remedy
        return {
            "gpu": remedy.device.name,
            "num_gpus": remedy.num_gpus,
            "sharding": remedy.sharding,
            "needs_bytes": remedy.needed_bytes,
            "usd_per_hour": self.usd_per_hour,
            "flags": list(self.flags),
        }


class Refused(Struct, frozen=True, kw_only=True):
    """A method that was not taken, and what would do, the cheapest first."""

    rejection: Rejection
    would_do: tuple[Offered, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As `rejected[]` of `plan --json`."""
        item, nearest = self.rejection, self.rejection.nearest
        return {
            "method": item.method,
            "reason": item.reason,
            "needs_bytes": item.needs_bytes,
            "free_bytes": nearest.device.free_bytes if nearest else None,
            "num_gpus": nearest.plan.num_gpus if nearest else None,
            "would_do": [offered.to_dict() for offered in self.would_do],
        }


def refused_methods(
    model: ModelSpec, profile: DataProfile, offer: Offer, rejected: Iterable[Rejection]
) -> tuple[Refused, ...]:
    """Each rejected method with what would do. It takes some 50 ms for each."""
    return tuple(
        Refused(rejection=item, would_do=_would_do(model, profile, offer, item))
        for item in rejected
    )


def _would_do(
    model: ModelSpec, profile: DataProfile, offer: Offer, rejection: Rejection
) -> tuple[Offered, ...]:
    if rejection.nearest is None:  # not for want of memory
        return ()
    method = {"method": rejection.method}
    wish = Wish(model=model, data=profile, given={**offer.given, **method})
    found = (more_alike(wish, offer), larger(wish, offer))
    kept = {} if "method" in offer.given else method
    return by_price(_offered(remedy, offer, kept) for remedy in found if remedy is not None)


def more_alike(wish: Wish, offer: Offer) -> Remedy | None:
    """More of the GPUs at hand, where they may divide the model."""
    device = offer.device
    joins = device.kind == "cuda" and device.vendor != "apple"
    if not joins:
        return None
    return fewest_of(wish, device, installed_stack(device), more_than=offer.num_gpus)


def larger(wish: Wish, offer: Offer) -> Remedy | None:
    """The smallest card of the catalog that holds it; else several of the one with most memory,
    where they may divide the model."""
    cards = _cards()
    alone = smallest_of(wish, cards, installed_stack)
    if alone is not None:
        return alone
    return fewest_of(wish, cards[-1], installed_stack(cards[-1]))


@cache
def _cards() -> tuple[Device, ...]:
    return tuple(card.device() for card in cards_by_memory())


def _offered(remedy: Remedy, offer: Offer, kept: Mapping[str, Any]) -> Offered:
    return Offered(
        remedy=remedy,
        flags=(*flags_of(kept), *flags_for(remedy, offer)),
        usd_per_hour=usd_per_hour(remedy.device.name, remedy.num_gpus),
    )


def flags_for(remedy: Remedy, offer: Offer) -> tuple[str, ...]:
    """With which `ftplan plan` plans on a remedy's GPUs."""
    settings: dict[str, Any] = {}
    machines = -(-remedy.num_gpus // MOST_OF_A_MACHINE) if "num_machines" in offer.given else 1
    if remedy.num_gpus != offer.given.get("num_gpus", 1):
        settings["num_gpus"] = remedy.num_gpus // machines
    if machines != offer.given.get("num_machines", 1):
        settings["num_machines"] = machines
    if offer.given.get("sharding", remedy.sharding) != remedy.sharding:
        settings["sharding"] = remedy.sharding
    return (*_gpu_flags(remedy.device, offer), *flags_of(settings))


def _gpu_flags(device: Device, offer: Offer) -> Iterator[str]:
    here = offer.device
    if offer.is_named and device is here:
        return
    yield f'--gpu "{device.name}"'
    if offer.is_named and here.free_bytes < here.total_bytes:  # that was said of the named one
        yield f"--free-memory {device.free_bytes // MIB}MiB"


def named(remedy: Remedy) -> str:
    """A remedy's GPUs, as a person calls them."""
    device, number = remedy.device, remedy.num_gpus
    if number == 1:
        return f"{device.name} ({format_bytes(device.total_bytes)})"
    how = SHARDING_TITLES[remedy.sharding]
    machines = -(-number // MOST_OF_A_MACHINE)
    where = f", {machines} machines" if machines > 1 else ""
    return f"{number} {device.name} with {how}{where}"


def by_price(offered: Iterable[Offered]) -> tuple[Offered, ...]:
    """The cheapest first, those of which no price is known last."""
    return tuple(sorted(offered, key=lambda o: (o.usd_per_hour is None, o.usd_per_hour or 0.0)))
