"""Checks of what training is done with: torch's build, the libraries, their configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftplan.launcher.checkup.facts import Facts, Finding, dotted
from ftplan.launcher.packages import INSTALL_TRAINING, TRAIN_PACKAGES
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY, Device

# FlashAttention-2's kernels (its README: Ampere, Ada, Hopper and newer).
FLASH_ATTENTION_CAPABILITY = (8, 0)

TORCH_SELECTOR = "the selector on pytorch.org (Get Started) gives the command"

_PLATFORMS = {"cuda": "CUDA", "hip": "ROCm"}


def python(facts: Facts) -> Iterator[Finding]:
    yield Finding(name="python", status="ok", found=f"{facts.python}, ftplan {facts.ftplan}")


def torch(facts: Facts) -> Iterator[Finding]:
    answer = facts.answers.get("torch")
    if answer is None:
        yield _missing("torch")
        return
    if answer.error is not None:
        yield _broken("torch", answer.error)
        return
    version = str(answer.facts.get("version"))
    fault = _build_fault(facts, facts.gpu, answer.facts) if facts.gpu else None
    if fault is None:
        yield Finding(name="torch", status="ok", found=f"{version}{_built_for(answer.facts)}")
    else:
        found, mend = fault
        yield Finding(name="torch", status="problem", found=f"{version} {found}", mend=mend)


def _built_for(said: Mapping[str, Any]) -> str:
    if said.get("cuda"):
        return f", built for CUDA {said['cuda']}"
    if said.get("hip"):
        return f", built for ROCm {said['hip']}"
    return ", with Metal" if said.get("mps") else ", for the processor"


# What is wrong with a build of torch, and what to do about it.
_Fault = tuple[str, str]


def _build_fault(facts: Facts, gpu: Device, said: Mapping[str, Any]) -> _Fault | None:
    """Why this build does not compute on the GPU that is there."""
    if gpu.vendor == "apple":
        mend = "install torch for macOS on arm64, not for x86"
        return None if said.get("mps") else ("does not see Apple's GPU", mend)
    return (
        _of_other_platform(facts, gpu, said)
        or _newer_than_driver(facts, said)
        or _without_kernels(gpu, said)
        or _blind(gpu, said)
    )


def _of_other_platform(facts: Facts, gpu: Device, said: Mapping[str, Any]) -> _Fault | None:
    wanted, other = ("hip", "cuda") if gpu.vendor == "amd" else ("cuda", "hip")
    if said.get(wanted):
        return None
    built = f"is built for {_PLATFORMS[other]}" if said.get(other) else "is built for processors"
    return f"{built} only, beside {gpu.name}", _install(facts, wanted)


def _newer_than_driver(facts: Facts, said: Mapping[str, Any]) -> _Fault | None:
    """A newer minor version runs on the driver of an older one (CUDA's minor version
    compatibility), a newer major version does not."""
    newest, built = facts.machine.cuda_version, said.get("cuda")
    if not newest or not built or _numbers(built)[0] <= newest[0]:
        return None
    found = f"is built for CUDA {built}, and the driver runs up to {dotted(newest)}"
    return found, f"update NVIDIA's driver, or {_install(facts, 'cuda')}"


def _without_kernels(gpu: Device, said: Mapping[str, Any]) -> _Fault | None:
    capability, built_for = gpu.compute_capability, said.get("architectures")
    if capability is None or not built_for or runs_on(capability, built_for):
        return None
    return (
        f"has no kernels for {gpu.name} of compute capability {dotted(capability)}, only for "
        f"{', '.join(built_for)}",
        "install a build of torch that has them, an older one for an older card",
    )


def _blind(gpu: Device, said: Mapping[str, Any]) -> _Fault | None:
    if said.get("available"):
        return None
    tool = "rocminfo" if gpu.vendor == "amd" else "nvidia-smi"
    found = f"sees no GPU: {said.get('why_not') or 'it does not say why'}"
    return found, f"restart the machine or the container; `{tool}` should work first"


def _install(facts: Facts, platform: str) -> str:
    newest = facts.machine.cuda_version
    at_most = f" {dotted(newest)} or older" if newest and platform == "cuda" else ""
    return f"install torch's build for {_PLATFORMS[platform]}{at_most}: {TORCH_SELECTOR}"


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a card runs any of torch's architectures: `sm_80` runs on 8.0 and later 8.x, `sm_90a`
    on 9.0 alone, and the driver translates `compute_90` for that and everything later."""
    major, minor = capability
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if match is None:
            continue
        of = int(match[2]), int(match[3])
        if match[4] == "a":
            runs = of == capability
        elif match[1] == "sm":
            runs = of[0] == major and of[1] <= minor
        else:
            runs = of <= capability
        if runs:
            return True
    return False


def libraries(facts: Facts) -> Iterator[Finding]:
    """The others that every run needs, by version; and whether they can be imported together."""
    for name in TRAIN_PACKAGES:
        here, least = facts.installed.get(name), facts.required.get(name)
        if here is None:
            if name != "torch":
                yield _missing(name)
        elif least is not None and _numbers(here) < _numbers(least):
            yield Finding(
                name=name,
                status="problem",
                found=f"{here}, older than {least}",
                mend=f"update it: {INSTALL_TRAINING}",
            )
        elif name != "torch":
            yield Finding(name=name, status="ok", found=here)
    answer = facts.answers.get("trainer")
    if answer is not None and answer.error is not None:
        yield _broken("trainer", answer.error)
    elif answer is not None:
        found = "what a run imports can be imported together"
        yield Finding(name="trainer", status="ok", found=found)


def bitsandbytes(facts: Facts) -> Iterator[Finding]:
    """Needed for `qlora` and the 8-bit optimizers, which only GPUs run."""
    gpu, answer = facts.gpu, facts.answers.get("bitsandbytes")
    needed = gpu is not None and gpu.vendor != "apple"
    if not needed:
        here = facts.installed.get("bitsandbytes")
        found = f"{here or 'not installed'}; only NVIDIA's and AMD's GPUs use it"
        yield Finding(name="bitsandbytes", status="ok", found=found)
        return
    assert gpu is not None
    without = "`qlora` and 8-bit optimizers do not run"
    install = f"install it: {INSTALL_TRAINING}"
    if answer is None:
        found = f"not installed: {without}"
        yield Finding(name="bitsandbytes", status="warning", found=found, mend=install)
        return
    here, library = answer.facts.get("version"), str(answer.facts.get("library"))
    fault = answer.error
    if fault is None and "ErrorHandler" in library:
        fault = str(answer.facts.get("error") or "its native library does not load")
    elif fault is None and not library.startswith("Cuda"):
        fault = "it has loaded its library for processors"
    if fault is not None:
        found = f"{here or 'installed'}, but {without}: {' '.join(fault.split())}"
        mend = "first mend torch; then `pip install --force-reinstall --no-deps bitsandbytes`"
        yield Finding(name="bitsandbytes", status="problem", found=found, mend=mend)
    elif not gpu.supports_quantization("nf4"):
        least = dotted(QUANTIZATION_CAPABILITY["nf4"])
        found = f"{here}, but its 4-bit kernels need compute capability {least}: no `qlora` here"
        yield Finding(name="bitsandbytes", status="warning", found=found)
    else:
        found = f"{here}, its library for this GPU loads"
        yield Finding(name="bitsandbytes", status="ok", found=found)


def flash_attention(facts: Facts) -> Iterator[Finding]:
    """Never needed: torch's own attention, `sdpa`, is what a plan takes by itself."""
    answer, gpu = facts.answers.get("flash_attn"), facts.gpu
    name = "flash-attn"
    if answer is None:
        found = "not installed, and not needed: plans take torch's own attention, `sdpa`"
        yield Finding(name=name, status="ok", found=found)
    elif answer.error is not None:
        yield Finding(
            name=name,
            status="warning",
            found=f"cannot be imported: {answer.error}",
            mend="reinstall it for this torch, or `pip uninstall flash-attn`: `sdpa` serves too",
        )
    else:
        here, least = answer.facts.get("version"), FLASH_ATTENTION_CAPABILITY
        unfit = f"; it needs a GPU of compute capability {dotted(least)}, so `sdpa` is used"
        yield Finding(name=name, status="ok", found=f"{here}{'' if _serves(gpu) else unfit}")


def _serves(gpu: Device | None) -> bool:
    """Whether FlashAttention has kernels for the GPU; it has for ROCm too."""
    if gpu is None or gpu.vendor == "apple":
        return False
    return gpu.vendor == "amd" or (gpu.compute_capability or (0, 0)) >= FLASH_ATTENTION_CAPABILITY


def accelerate_config(facts: Facts) -> Iterator[Finding]:
    """A run gets its own configuration with `--config_file`: the user's is not read. Variables of
    the environment are, by the training process."""
    name = "accelerate config"
    if facts.accelerate_variables:
        yield Finding(
            name=name,
            status="warning",
            found=f"set in the environment: {', '.join(facts.accelerate_variables)}; they change "
            "runs behind the plan's back",
            mend="unset them",
        )
    path = facts.accelerate_config
    if path is None:
        yield Finding(name=name, status="ok", found="no default one; runs have their own")
    elif facts.accelerate_config_error is not None:
        yield Finding(
            name=name,
            status="warning",
            found=f"{path} is broken: {facts.accelerate_config_error}; ftplan's runs have their "
            "own, your other `accelerate launch` will fail",
            mend="make it anew with `accelerate config`, or delete it",
        )
    else:
        found = f"{path} is not read: ftplan's runs have their own"
        yield Finding(name=name, status="ok", found=found)


def _missing(name: str) -> Finding:
    found = "not installed: nothing can be trained"
    return Finding(name=name, status="problem", found=found, mend=INSTALL_TRAINING)


def _broken(name: str, error: str) -> Finding:
    return Finding(
        name=name,
        status="problem",
        found=f"cannot be imported: {error}",
        mend=f"install again: {INSTALL_TRAINING}",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of `2.13.0+cpu`: the numbers before anything else."""
    begun = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, begun[0].split("."))) if begun else ()
