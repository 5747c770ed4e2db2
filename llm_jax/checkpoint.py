"""Checkpoints by orbax: `<folder>/<step>/` holds named pytrees, each of which loads alone.

Knows pytrees, not models.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llm_jax.errors import InputError


SAVE_SECONDS = 600  # that processes wait for each other at a save: where one can't write, the others would for ever


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
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
    )
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def _val_loss(metrics: Mapping[str, float]) -> float:
    """For ranking: NaN, which compares with nothing, ranks last."""
    val_loss = metrics["val_loss"]
    return math.inf if math.isnan(val_loss) else val_loss


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
        InputError: the checkpoint's files are damaged, or it holds other names or shapes than `like`.
    """
    folder = Path(manager.directory) / str(step)
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
    try:
        for name, tree in like.items():
            _check_shapes(folder / name, tree)
        return dict(manager.restore(step, args=args).items())
    except InputError:
        raise
    except (ValueError, KeyError, OSError) as error:  # what orbax and tensorstore raise for a damaged folder
        reason = " ".join(str(error).split())[:200]  # tensorstore adds its whole specification
        raise InputError(
            f"checkpoint {folder} is damaged ({reason}); remove it to go on from the one before"
        ) from error


def _check_shapes(folder: Path, like: Any) -> None:
    """Before restoring, which would tell a difference in tracebacks of its threads."""
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()))
        raise InputError(
            f"checkpoint {folder.parent} holds no {folder.name}, only {there}: a saved model can be loaded, but "
            "training continues only in the workdir of a run"
        )
    saved = ocp.StandardCheckpointHandler().metadata(folder)
    found, wanted = (sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (saved.tree, like))
    if found != wanted:
        raise InputError(
            f"checkpoint {folder} does not fit the run's config.json: it holds the shapes "
            f"{_only_in(found, wanted)}, and the config makes {_only_in(wanted, found)}; restore the config.json "
            "that it was written with"
        )


def _only_in(shapes: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> str:
    only = list((Counter(shapes) - Counter(others)).elements())
    return ", ".join(str(list(shape)) for shape in only[:3]) + (", ..." if len(only) > 3 else "") or "no more"


def holds(manager: ocp.CheckpointManager, step: int, name: str) -> bool:
    """Whether the checkpoint has a tree of that name."""
    return (manager.directory / str(step) / name).is_dir()


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
        metrics = {step: manager.metrics(step) for step in steps}
        losses = {step: _val_loss(metrics[step]) if metrics[step] else math.inf for step in steps}
        return min(steps, key=lambda step: (losses[step], -step))
    if str(which).isdigit() and int(which) in steps:
        return int(which)
    raise InputError(
        f"step {which!r} is not in {manager.directory}; there are best, last, {', '.join(map(str, steps))}"
    )
