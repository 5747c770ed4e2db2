"""One run, or several that train as one program: their folders, checkpoints, and parts of the stacked state."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llm_jax import checkpoint, run_folder
from llm_jax.config import Config
from llm_jax.config_rules import split_runs
from llm_jax.distributed import PeerLost
from llm_jax.errors import InputError
from llm_jax.progress import say
from llm_jax.tokenizers import Tokenizer
from llm_jax.train_step import TrainState


class Runs:
    """The runs of a config. Several lie in `workdir`/run_<n>, each a folder like that of a run that trained alone."""

    def __init__(self, cfg: Config, workdir: Path) -> None:
        self.configs = split_runs(cfg)
        self.stacked = len(self.configs) > 1  # then arrays of the state have a leading axis of runs
        self.folders = [workdir / f"run_{n}" for n in range(len(self))] if self.stacked else [workdir]
        # What tells the lines of metrics.jsonl apart.
        self.labels: list[dict[str, Any]] = [
            {"seed": run.train.seed, "peak_lr": run.optim.peak_lr} if self.stacked else {} for run in self.configs
        ]
        self._managers: list[Any] = []

    def __len__(self) -> int:
        return len(self.configs)

    def all_from(self, params: Any, placed: Any) -> Any:
        """The state's parameters where every run starts from these, where they are to lie."""
        if not self.stacked:
            return params

        def repeated(params: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(self), *leaf.shape)), params)

        return jax.jit(repeated, out_shardings=placed)(params)

    def part(self, tree: Any, n: int) -> Any:
        """Run n's part of a tree of the state."""
        return _part(tree, n) if self.stacked else tree

    def write(self, tokenizer: Tokenizer) -> None:
        if self.stacked:
            for run, folder in zip(self.configs, self.folders, strict=True):
                run_folder.write_run(folder, run, tokenizer)

    @contextlib.contextmanager
    def open_checkpoints(self) -> Iterator[None]:
        # Several are saved one after the other: with one more than is asked for, all still have one step in common
        # when a kill comes between two of them.
        keep = self.configs[0].train.keep_checkpoints + self.stacked
        with contextlib.ExitStack() as stack:
            self._managers = [
                stack.enter_context(checkpoint.open_checkpoints(folder / "checkpoints", keep=keep))
                for folder in self.folders
            ]
            try:
                yield
            except PeerLost:
                stack.pop_all()  # not to be closed
                raise

    def last_step(self) -> int | None:
        """The last step that all runs have saved, None before the first; checkpoints after it are removed."""
        saved = [set(manager.all_steps()) for manager in self._managers]
        common = set.intersection(*saved)
        if not common and max(map(len, saved)) > 1:  # a kill leaves them one save apart
            listed = "; ".join(f"{each.name} {sorted(s)}" for each, s in zip(self.folders, saved, strict=True))
            raise InputError(
                f"no step is saved in all runs of {self.folders[0].parent} ({listed}); put back what is missing, or "
                "choose another workdir"
            )
        for folder, manager, steps in zip(self.folders, self._managers, saved, strict=True):
            for later in sorted(each for each in steps if each > max(common, default=-1)):
                say(f"removes checkpoint {later} of {folder.name}, which not all runs have")
                manager.delete(later)
        return max(common, default=None)

    def restore(self, step: int, like: TrainState, placed: TrainState) -> TrainState:
        """The state saved at `step`; `like` has the shapes of the runs' state, `placed` says where it is to lie."""
        one = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(
                leaf.shape[1:] if self.stacked else leaf.shape, leaf.dtype, sharding=at
            ),
            like,
            placed,
        )
        parts = [checkpoint.restore(manager, step, _saved(one)) for manager in self._managers]
        if not self.stacked:
            return TrainState(jax.device_put(np.int32(step), placed.step), **parts[0])
        steps = jax.device_put(np.full(len(self), step, np.int32), placed.step)
        return TrainState(steps, **jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))

    def save(self, step: int, state: TrainState, val_losses: Sequence[float | None]) -> None:
        for n, manager in enumerate(self._managers):
            checkpoint.save(manager, step, _saved(self.part(state, n)), val_loss=val_losses[n])
            if self.stacked and jax.process_count() > 1:
                # Orbax numbers what processes wait for in the order of its threads, which is theirs alone.
                manager.wait_until_finished()

    def wait_until_saved(self) -> None:
        for manager in self._managers:
            manager.wait_until_finished()


@jax.jit
def _part(tree: Any, n: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: leaf[n], tree)


def _saved(state: TrainState) -> dict[str, Any]:
    """The trees of a checkpoint: all of the state but the step, which is the checkpoint's number."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}
