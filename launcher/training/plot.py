"""loss.png: the training loss by step, and the held-out loss before and after."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # no display is needed or wanted

from matplotlib import pyplot

from ftplan.launcher.run_dir import RunDir


def plot_loss(run: RunDir) -> None:
    """Draw loss.png from metrics.jsonl; nothing when there is no step."""
    rows = list(run.metric_rows())
    steps = [row["step"] for row in rows if "step" in row]
    losses = [row["loss"] for row in rows if "step" in row]
    if not steps:
        return
    held_out = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training, smoothed")
    if len(held_out) == 2:
        ends = [0, steps[-1]]
        axes.plot(ends, held_out, "o--", color="tab:orange", label="held-out, before and after")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(run.root.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(run.loss_plot, dpi=120)
    pyplot.close(figure)


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with the start-up bias taken out."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result
