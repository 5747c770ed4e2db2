"""Trains: python -m llm_jax.main --config=configs/small.py [--workdir=DIR] [--config.group.key=value ...]

Run it again to continue where it stopped.
"""

import glob
import os
from pathlib import Path

from absl import flags as absl_flags

from llm_jax import cpu, flags
from llm_jax.config_file import load_file, override
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

_CONFIG = absl_flags.DEFINE_string("config", None, "Config file, such as configs/small.py.")
_CHANGES = absl_flags.DEFINE_multi_string(
    flags.CONFIG_CHANGES,
    [],
    "Changes a key of the config, such as --config.optim.peak_lr=3e-4; llm_jax/config.py lists them all.",
)
_WORKDIR = absl_flags.DEFINE_string(
    "workdir", None, "Folder of the run. Default: runs/<config>, or runs/<config>-<stem of data.path>."
)


def main() -> None:
    cpu.restart("llm_jax.main")  # after mistakes in the flags are told, before anything else
    if not _CONFIG.value:
        raise InputError("no --config given; for example --config=configs/small.py")
    config = load_file(_CONFIG.value)
    override(config, _CHANGES.value)
    os.environ |= cpu.devices(os.environ, freeze(config))  # before jax is imported
    with flags.importing():
        from llm_jax.train import fit

    fit(config, workdir=_WORKDIR.value or _default_workdir(config.data.path))


def _default_workdir(data_path: str | None) -> Path:
    name = Path(_CONFIG.value).stem
    if data_path:
        plain = [part for part in Path(data_path).resolve().parts if not glob.has_magic(part)]
        name += f"-{Path(plain[-1]).stem}"  # of books/*.txt it is books
    return Path("runs") / name


if __name__ == "__main__":
    flags.run(main)
