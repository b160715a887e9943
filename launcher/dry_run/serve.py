"""`python -m ftplan.launcher.dry_run.serve`: carries out dry runs for the command line.

Reads one case a line on stdin, writes lines on stdout: {"say": ...} as it goes on, then
{"result": ...} or {"error": ..., "hint": ...}. What libraries print goes to stderr.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO


def main() -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    _answer(answers, {"say": "loading torch and transformers"})
    _load_lightly()
    from ftplan.launcher.dry_run.case import DryRunCase
    from ftplan.launcher.dry_run.step import dry_run

    gc.freeze()  # the libraries' own objects, which accelerate would look through each time
    for line in sys.stdin:
        _answer(answers, _carried_out(dry_run, DryRunCase.from_dict(json.loads(line)), answers))
        gc.collect()
    return 0


def _load_lightly() -> None:
    """Nothing is compiled in a dry run: bitsandbytes' decorators need not load the compiler."""
    gc.disable()
    sys.meta_path.insert(0, _ScanOnce())
    import torch

    torch.compile = lambda function=None, **_: function or (lambda inner: inner)


class _ScanOnce(MetaPathFinder):
    """transformers looks through the files of all its models twice while it is loaded, a second
    each time; what it has found in a folder is remembered."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(_load_and_remember, loader.exec_module)
        return spec


def _load_and_remember(load: Callable[[ModuleType], None], module: Any) -> None:
    load(module)
    scan = getattr(module, "create_import_structure_from_path", None)
    if scan is None:  # another release of transformers
        return
    found: dict[str, Any] = {}

    def scan_once(path: Any) -> Any:
        folder = os.path.dirname(path) if os.path.isfile(path) else str(path)
        if folder not in found:
            found[folder] = scan(path)
        return copy.deepcopy(found[folder])

    module.create_import_structure_from_path = scan_once


def _carried_out(dry_run: Callable[..., Any], case: Any, answers: TextIO) -> dict[str, Any]:
    from ftplan.planner.dry_run_summary import summarize
    from ftplan.planner.errors import FtplanError

    try:
        done = dry_run(case, lambda text: _answer(answers, {"say": text}))
        _answer(answers, {"say": "replaying the allocator"})
        summary = summarize(
            done.record,
            num_parameters=done.num_parameters,
            num_trainable_parameters=done.num_trainable_parameters,
            trained_weight_bytes=done.trained_weight_bytes,
            num_layers=done.num_layers,
            num_layers_traced=done.num_layers_traced,
        )
        return {"result": summary.to_dict()}
    except FtplanError as error:
        return {"error": error.message, "hint": error.hint}
    except Exception as error:
        import traceback

        traceback.print_exc()
        first_line = str(error).partition("\n")[0]
        return {
            "error": f"the dry run of this model failed: {type(error).__name__}: {first_line}",
            "hint": "the closed form may know it: leave out `--exact`",
        }


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
