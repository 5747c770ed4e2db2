"""Checkpoints by orbax: `<folder>/<step>/` holds named pytrees, each of which loads alone.

Knows pytrees, not models.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llm_jax.errors import InputError


def open_checkpoints(folder: str | Path, *, keep: int = 1, create: bool = True) -> ocp.CheckpointManager:
    """A manager that keeps the newest `keep` checkpoints and the one with the lowest val_loss."""
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(n=keep),
            checkpoint_managers.BestN(
                get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=_val_loss,  # without it orbax does not write metrics
        best_mode="min",
        create=create,
    )
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]


def save(manager: ocp.CheckpointManager, step: int, trees: Mapping[str, Any], *, val_loss: float | None) -> None:
    """Starts an asynchronous save; what it reads is copied before this returns, so the trees may be donated."""
    manager.save(
        step,
        args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in trees.items()}),
        metrics=None if val_loss is None else {"val_loss": val_loss},
    )


def restore(manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """The saved trees that `like` names, on the shardings of its arrays or ShapeDtypeStructs.

    Raises:
        InputError: the checkpoint's files are damaged, or hold other names and shapes than `like`.
    """
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
    try:
        return dict(manager.restore(step, args=args).items())
    except (ValueError, KeyError, OSError) as error:  # what orbax and tensorstore raise for such a folder
        reason = " ".join(str(error).split())[:200]  # tensorstore adds its whole specification
        raise InputError(
            f"checkpoint {manager.directory / str(step)} is damaged or does not fit the run's config.json "
            f"({reason}); remove it to go on from the one before"
        ) from error


def pick_step(manager: ocp.CheckpointManager, which: int | str) -> int:
    """The step that "best" (by val_loss; without any, the last), "last" or a number stands for.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise InputError(f"no checkpoint in {manager.directory}; let the run reach its first one (train.save_every)")
    if which == "last":
        return steps[-1]
    if which == "best":
        losses = {step: (manager.metrics(step) or {}).get("val_loss", math.inf) for step in steps}
        return min(steps, key=lambda step: (losses[step], -step))
    if str(which).isdigit() and int(which) in steps:
        return int(which)
    raise InputError(
        f"step {which!r} is not in {manager.directory}; there are best, last, {', '.join(map(str, steps))}"
    )
