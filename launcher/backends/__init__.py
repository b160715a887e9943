"""Where a run is carried out other than here: the engines that people run already."""

from __future__ import annotations

# Name -> the module of its class `Backend`, imported when it is used.
BACKENDS: dict[str, str] = {
    "slurm": "ftplan.launcher.backends.slurm",
    "sky": "ftplan.launcher.backends.sky",
    "k8s": "ftplan.launcher.backends.k8s",
    "ray": "ftplan.launcher.backends.ray",
}
