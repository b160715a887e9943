"""Which devices CUDA_VISIBLE_DEVICES leaves, as CUDA reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct


class Slot(Struct, frozen=True, kw_only=True):
    """A device that CUDA could use: a GPU, or a MIG device (`handle`) in a GPU (`gpu_handle`)."""

    index: int
    gpu_handle: object
    gpu_name: str
    gpu_uuid: str | None
    handle: object
    name: str
    uuid: str | None

    @property
    def is_mig(self) -> bool:
        return self.handle is not self.gpu_handle

    @property
    def label(self) -> str:
        return f"GPU {self.index}" + (f" ({self.name})" if self.is_mig else "")


def visible(
    slots: Sequence[Sequence[Slot]], environ: Mapping[str, str], notes: list[str]
) -> list[Slot]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order. `slots` holds each GPU's devices."""
    everything = [slot for devices in slots for slot in devices]
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = everything if setting is None else _selected(slots, setting, notes)
    if everything and not chosen:
        notes.append(f"`CUDA_VISIBLE_DEVICES={setting}` hides every GPU")
    if len(chosen) > 1 and any(slot.is_mig for slot in chosen):
        notes.append(
            "a process can use only one MIG device; "
            "name it in CUDA_VISIBLE_DEVICES by its UUID (`nvidia-smi -L`)"
        )
    unlike = len({slot.gpu_name for slot in everything}) > 1
    if unlike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and _has_index(setting):
        notes.append(
            "the GPUs differ, and CUDA numbers the fastest first while ftplan and nvidia-smi "
            "number by bus; set CUDA_DEVICE_ORDER=PCI_BUS_ID so that indices mean the same"
        )
    return chosen


def _selected(slots: Sequence[Sequence[Slot]], setting: str, notes: list[str]) -> list[Slot]:
    """The devices that `setting` names, as CUDA reads it.

    Indices or beginnings of UUIDs; the first that matches no device ends the list, so that -1 or
    nothing hides all; a device named twice hides all. An index or UUID of a GPU with MIG stands
    for its first MIG device.
    """
    chosen: list[Slot] = []
    for token in map(str.strip, setting.split(",")):
        matching = _matching(slots, token)
        if matching is None:
            if token not in ("", "-1"):
                notes.append(
                    f"CUDA_VISIBLE_DEVICES names `{token}`, which is no single GPU here: "
                    "CUDA ignores it and all that follows"
                )
            break
        chosen += matching
    if len({id(slot) for slot in chosen}) < len(chosen):
        notes.append("CUDA_VISIBLE_DEVICES names a GPU twice: CUDA then shows none")
        return []
    return chosen


def _has_index(setting: str | None) -> bool:
    return any(token.strip().isdigit() for token in (setting or "").split(","))


def _matching(slots: Sequence[Sequence[Slot]], token: str) -> list[Slot] | None:
    """The device of an index or beginning of a UUID; empty if its GPU is lost, None if not one."""
    if re.fullmatch(r"[0-9]+", token):
        return list(slots[int(token)][:1]) if int(token) < len(slots) else None
    if token.startswith("GPU-"):
        found = [gpu[0] for gpu in slots if gpu and (gpu[0].gpu_uuid or "").startswith(token)]
    elif token.startswith("MIG-"):
        devices = (slot for gpu in slots for slot in gpu if slot.is_mig)
        found = [slot for slot in devices if (slot.uuid or "").startswith(token)]
    else:
        return None
    return found if len(found) == 1 else None
