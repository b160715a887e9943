"""What the packages installed here make of the training stack that ftplan launches."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

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
    return Stack(efficient_takes_groups=torch_release() >= TAKES_GROUPS_SINCE)


@cache
def torch_release() -> tuple[int, ...]:
    """(major, minor) of the installed torch; (0,) without it. Read from its `version.py`, which
    takes a millisecond: importlib.metadata takes 40, and importing torch seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return (0,)
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return (0,)
    found = re.search(r"""^__version__ = ['"](\d+)\.(\d+)""", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0,)
