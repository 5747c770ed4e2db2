"""Trains: python -m llm_jax.main --config=configs/small.py [--workdir=DIR] [--config.group.key=value ...]

Run it again to continue where it stopped.
"""

from pathlib import Path

from absl import flags as absl_flags
from ml_collections import config_flags

from llm_jax import flags
from llm_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.group.key=value changes a key.")
_WORKDIR = absl_flags.DEFINE_string(
    "workdir", None, "Folder of the run. Default: runs/<config>, or runs/<config>-<stem of data.path>."
)


def main() -> None:
    if _CONFIG.value is None:
        raise InputError("no --config given; for example --config=configs/small.py")
    from llm_jax.train import fit  # after the flags: a mistake in them is told without loading jax

    fit(_CONFIG.value, workdir=_WORKDIR.value or _default_workdir())


def _default_workdir() -> Path:
    name = Path(config_flags.get_config_filename(absl_flags.FLAGS["config"])).stem
    path = _CONFIG.value.data.path
    return Path("runs") / (f"{name}-{Path(path).stem}" if path else name)


if __name__ == "__main__":
    flags.run(main)
