"""What the `train` extra brings, and whether it is here."""

from __future__ import annotations

import importlib.util

from ftplan.planner.errors import InputError

TRAIN_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")

# How to get them; ftplan is installed from its folder.
INSTALL_TRAINING = "`pip install -c constraints.txt '.[train]'` in ftplan's folder"


def missing_packages() -> list[str]:
    """Packages of the `train` extra that are not installed."""
    return [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]


def require_training() -> None:
    """Raises InputError when the `train` extra is not installed."""
    missing = missing_packages()
    if missing:
        raise InputError(
            f"training needs packages that are not installed: {', '.join(missing)}",
            INSTALL_TRAINING,
        )
