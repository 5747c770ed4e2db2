"""A run's folder: config.json, tokenizer.json and checkpoints, written and read back."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from llm_jax import checkpoint, model
from llm_jax.config import Config, as_dict
from llm_jax.config_rules import freeze, split_runs
from llm_jax.errors import InputError
from llm_jax.files import write_whole
from llm_jax.tokenizers import Tokenizer, load_tokenizer


def read_config(workdir: str | Path) -> Config:
    """The resolved config of a run.

    Raises:
        InputError: the folder is not there, or holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        what = "holds no run (it has no config.json)" if Path(workdir).is_dir() else "is not there"
        raise InputError(f"workdir {str(workdir)!r} {what}; give the folder that training wrote, such as runs/small")
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return freeze(values)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a run's config: {error}") from None


def read_run(workdir: str | Path) -> tuple[Config, Tokenizer]:
    """The resolved config and the tokenizer of a run."""
    return read_config(workdir), load_tokenizer(Path(workdir) / "tokenizer.json")


Restore = Callable[[Any], model.Params]  # takes the shardings to lie on, in their tree; None: the first device


def open_run(workdir: str | Path, *, step: int | str = "best") -> tuple[Config, Tokenizer, Restore]:
    """Config and tokenizer of a run, and what reads its parameters.

    Args:
        step: "best" (by val_loss) | "last" | a number.
    """
    cfg, tokenizer = read_run(workdir)
    folder = Path(workdir) / "checkpoints"
    several = split_runs(cfg)
    if len(several) > 1:
        raise InputError(
            f"{str(workdir)!r} holds {len(several)} runs; give one of them, {Path(workdir) / 'run_0'} "
            f"to run_{len(several) - 1}"
        )
    if not folder.is_dir():
        raise InputError(f"run {str(workdir)!r} has no checkpoint yet; let it reach its first one (train.save_every)")
    with checkpoint.open_checkpoints(folder, create=False) as manager:
        picked = checkpoint.pick_step(manager, step)
        name = "ema" if checkpoint.holds(manager, picked, "ema") else "params"  # a run's average, if it kept one

    def restore(placed: Any) -> model.Params:
        shapes = model.param_shapes(cfg.model)
        if placed is None:
            placed = jax.tree.map(lambda leaf: SingleDeviceSharding(jax.local_devices()[0]), shapes)
        like = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed
        )
        with checkpoint.open_checkpoints(folder, create=False) as manager:
            return checkpoint.restore(manager, picked, {name: like})[name]

    return cfg, tokenizer, restore


def make_folder(workdir: str | Path) -> Path:
    """The folder of a run, made where it is not there, and known to be writable."""
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            return workdir
    except OSError as error:
        raise _unwritable(workdir, error) from None


def _unwritable(workdir: Path, error: OSError) -> InputError:
    return InputError(f"workdir {str(workdir)!r} cannot be written ({error.strerror}); choose another --workdir")


def write_run(workdir: str | Path, cfg: Config, tokenizer: Tokenizer) -> None:
    """Writes what identifies a run: config.json and tokenizer.json."""
    workdir = make_folder(workdir)
    try:
        tokenizer.save(workdir)
        # The config last: a folder that has it is a run.
        write_whole(workdir / "config.json", json.dumps(as_dict(cfg), indent=2) + "\n")
    except OSError as error:  # a full disk
        raise _unwritable(workdir, error) from None


@contextlib.contextmanager
def only_here(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder meanwhile; however this one ends, its lock ends with it."""
    try:
        import fcntl  # of Unix
    except ImportError:
        yield
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(
            f"another process trains in workdir {str(workdir)!r}; stop it first, or choose another workdir"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)
