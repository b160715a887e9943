"""Every error that ftplan shows to a person.

FtplanError                exit status 2: bad usage or input
├── InputError             a file, row, or setting that cannot be used
│   └── UnknownNameError   a model, GPU, method, ... that is not known; names the nearest
├── DoesNotFitError        exit status 1: no plan fits the memory at hand
├── RunFailedError         exit status 1: the training process failed
└── InterruptedRunError    exit status 130, 143: stopped by Ctrl-C, SIGTERM; can be resumed
"""

from __future__ import annotations

from collections.abc import Iterable


class FtplanError(Exception):
    """An error with a message (what is wrong, where) and a hint (what to do)."""

    exit_status = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(FtplanError):
    """Input that cannot be used: a file, a row, a setting."""


class UnknownNameError(InputError):
    """A name outside a closed list; the hint names the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], advice: str = "") -> None:
        candidates = sorted(set(known))
        near = nearest_names(name, candidates)
        parts = []
        if near:
            parts.append("did you mean " + " or ".join(f"`{n}`" for n in near) + "?")
        elif len(candidates) <= 24:
            parts.append("known: " + ", ".join(candidates) + ("." if advice else ""))
        if advice:
            parts.append(advice)
        super().__init__(f"unknown {kind} `{name}`", " ".join(parts) or None)


class DoesNotFitError(FtplanError):
    """No plan fits; the message says by how much, the hint what would."""

    exit_status = 1


class RunFailedError(FtplanError):
    """The training process ended with an error."""

    exit_status = 1


class InterruptedRunError(FtplanError):
    """The run was interrupted and can be resumed."""

    exit_status = 130


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest in spelling to `name`, best first; empty if none is close."""
    import difflib  # only where something went wrong

    by_folded = {k.casefold(): k for k in known}
    wanted = name.casefold()
    contained = sorted(k for k in by_folded if wanted and (wanted in k or k in wanted))
    close = difflib.get_close_matches(wanted, list(by_folded), n=count, cutoff=0.5)
    close.sort(key=lambda k: sorted(k) != sorted(wanted))  # letters in the wrong order first
    begun = [k for k in contained if k.startswith(wanted)]
    ordered = list(dict.fromkeys([*begun, *close, *contained]))
    return [by_folded[k] for k in ordered[:count]]
