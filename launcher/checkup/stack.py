"""Checks of what training is done with: torch's build, the libraries, their configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ftplan.launcher.checkup.facts import Facts, Finding, dotted
from ftplan.launcher.planning import INSTALL_TRAINING, TRAIN_PACKAGES
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY

# FlashAttention-2's kernels (its README: Ampere, Ada, Hopper and newer).
FLASH_ATTENTION_CAPABILITY = (8, 0)

TORCH_SELECTOR = "the selector on pytorch.org (Get Started) gives the command"


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
    fault = _build_fault(facts, answer.facts) if facts.gpu else None
    if fault is None:
        yield Finding(name="torch", status="ok", found=f"{version}{_built_for(answer.facts)}")
    else:
        found, mend = fault
        yield Finding(name="torch", status="problem", found=f"{version} {found}", mend=mend)


def _built_for(said: Mapping[str, object]) -> str:
    if said.get("cuda"):
        return f", built for CUDA {said['cuda']}"
    if said.get("hip"):
        return f", built for ROCm {said['hip']}"
    return ", with Metal" if said.get("mps") else ", for the processor"


def _build_fault(facts: Facts, said: Mapping[str, object]) -> tuple[str, str] | None:
    """Why this build does not compute on the GPU that is there, and what to do."""
    gpu = facts.gpu
    assert gpu is not None
    if gpu.vendor == "apple":
        if said.get("mps"):
            return None
        return "does not see Apple's GPU", "install torch for macOS on arm64, not for x86"
    wanted, other = ("hip", "cuda") if gpu.vendor == "amd" else ("cuda", "hip")
    platforms = {"cuda": "CUDA", "hip": "ROCm"}
    install = f"install torch's build for {platforms[wanted]}{_at_most(facts)}: {TORCH_SELECTOR}"
    if not said.get(wanted):
        built = f"is built for {platforms[other]}" if said.get(other) else "is built for processors"
        return f"{built} only, beside {gpu.name}", install
    newest = facts.machine.cuda_version
    needs = _numbers(str(said["cuda"])) if wanted == "cuda" else ()
    if newest and needs and needs[0] > newest[0]:
        return (
            f"is built for CUDA {said['cuda']}, and the driver runs up to {dotted(newest)}",
            f"update NVIDIA's driver, or {install}",
        )
    names = said.get("architectures")
    built_for = [str(name) for name in names] if isinstance(names, list) else []
    if gpu.compute_capability and built_for and not runs_on(gpu.compute_capability, built_for):
        return (
            f"has no kernels for {gpu.name} of compute capability "
            f"{dotted(gpu.compute_capability)}, only for {', '.join(built_for)}",
            "install a build of torch that has them, an older one for an older card",
        )
    if not said.get("available"):
        return f"sees no GPU: {said.get('why_not') or 'it does not say why'}", (
            "restart the machine or the container; `nvidia-smi` should work first"
            if wanted == "cuda"
            else "`rocminfo` should work first"
        )
    return None


def _at_most(facts: Facts) -> str:
    cuda = facts.machine.cuda_version
    return f" {dotted(cuda)} or older" if cuda else ""


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
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
        capability = gpu.compute_capability if gpu else None
        serves = capability is not None and capability >= least
        unfit = f"; it needs a GPU of compute capability {dotted(least)}, so `sdpa` is used"
        yield Finding(name=name, status="ok", found=f"{here}{'' if serves else unfit}")


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
