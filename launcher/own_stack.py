"""What the packages installed here make of the training stack that ftplan launches."""

from __future__ import annotations

import re
from functools import cache

from ftplan.planner.hardware_spec import Device
from ftplan.planner.stack import (
    FLASH_CAPABILITY,
    OWN_STACK,
    TAKES_GROUPS_SINCE,
    Stack,
    kernel_capability,
)


def installed_stack(device: Device | None) -> Stack:
    """The stack that a run on the device would have. Asked for is only what matters there: before
    Ampere the release of torch, whose memory-efficient attention stands in for FlashAttention."""
    if device is None or device.kind == "cpu" or kernel_capability(device) >= FLASH_CAPABILITY:
        return OWN_STACK
    return Stack(efficient_takes_groups=_release("torch") >= TAKES_GROUPS_SINCE)


@cache
def _release(package: str) -> tuple[int, ...]:
    """(major, minor) of an installed package; (0,) without it."""
    from importlib import metadata  # 50 ms that few commands need

    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version(package))
    except metadata.PackageNotFoundError:
        return (0,)
    return (int(found[1]), int(found[2])) if found else (0,)
