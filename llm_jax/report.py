"""What a run tells: the live line on standard error, metrics.jsonl, loss.png."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llm_jax import hosts
from llm_jax.files import write_whole
from llm_jax.progress import in_notebook, is_live, say


class Report:
    """One run's metrics.jsonl and progress line.

    Opening it for a run that continues after `first_step` finished updates cuts the lines beyond that step
    and a finished run's last line, so that the file reads as if the run had never stopped.
    """

    def __init__(self, workdir: Path, *, first_step: int, num_steps: int) -> None:
        self._path = workdir / "metrics.jsonl"
        self._file = None
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step and "val_loss_full" not in line]
        self.seconds_before = max((line.get("wall_seconds", 0.0) for line in kept), default=0.0)
        if hosts.is_first():  # of several processes
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self._path.open("a")
        self._start, self._first_step = time.monotonic(), first_step
        # A terminal or a notebook gets one live line, anything else (a log file) a plain line a log.
        self._live = is_live()
        bar = "{bar}" if in_notebook() else "{bar:20}"  # with a width, a notebook draws it in text beside its widget
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not self._live,
            bar_format=f"step {{n_fmt}}/{{total_fmt}} |{bar}| {{desc}}",
        )

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl, at once on disk's way: a killed run has all that it printed."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def progress(self, step: int, lines: Sequence[Mapping[str, float]]) -> None:
        """Shows a training line of each run, with the time left at the pace of the steps so far."""
        now = time.monotonic()
        left = (now - self._start) / max(step - self._first_step, 1) * (self._bar.total - step)
        text = (
            f"loss {mean_and_deviation([line['loss'] for line in lines])} | "
            f"{sum(line['tokens_per_second'] for line in lines):,.0f} tokens/s | "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
        if self._live:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            say(f"step {step}/{self._bar.total} | {text}")


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of several runs with the standard deviation of their population, estimated from them; of one its value."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to the first that a kill left half written."""
    path = Path(workdir) / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def plot_losses(workdir: str | Path) -> None:
    """Draws loss.png beside metrics.jsonl: training and validation loss by step, of every run."""
    from matplotlib.figure import Figure  # half a second to import, and needed only here

    lines = read_metrics(workdir)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        run = f", seed {line['seed']}, peak_lr {line['peak_lr']:g}" if "seed" in line else ""
        runs.setdefault(run, []).append(line)
    several = len(runs) > 1
    for number, (run, its_lines) in enumerate(runs.items()):
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(line["step"], line[name]) for line in its_lines if name in line]
            if not points:
                continue
            # Of several runs a colour each; of one, a colour each for training and validation.
            colours = {"color": f"C{number}", "alpha": 0.4 if name == "loss" else 1} if several else {}
            axes.plot(*zip(*points, strict=True), style, label=label + run, markersize=4, linewidth=1, **colours)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small" if several else None)
    figure.savefig(Path(workdir) / "loss.png", dpi=120)
