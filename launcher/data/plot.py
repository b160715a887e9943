"""The histogram of token lengths as PNG."""

from __future__ import annotations

from pathlib import Path

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError

_BINS = 40


def plot_lengths(profile: DataProfile, path: Path) -> None:
    """Rows by their number of tokens, and where 95 % of them end. Raises InputError without
    matplotlib, which comes with the `train` extra."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a plot needs matplotlib, which this Python does not have",
            "install it with `pip install matplotlib`, or leave out `--plot`",
        ) from None
    matplotlib.use("Agg")  # no display is needed or wanted
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(profile.lengths, bins=_BINS, color="tab:blue", alpha=0.8)
    p95 = profile.summary()["p95"]
    axes.axvline(p95, color="tab:orange", linestyle="--", label=f"95 % up to {p95:,} tokens")
    axes.set_xlabel("tokens" if profile.exact else "tokens, estimated from characters")
    axes.set_ylabel("rows")
    axes.set_title(Path(profile.path.split(", ")[0]).name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"`{path}` cannot be written: {error}", "name a .png file") from error
    finally:
        pyplot.close(figure)
