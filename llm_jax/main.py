"""Trains: python -m llm_jax.main --config=configs/small.py [--workdir=DIR] [--config.group.key=value ...]

Run it again to continue where it stopped. Several processes, on one machine or many, train as one: each is given
--coordinator, --num_processes and --process_id, or is started by Slurm, Open MPI or on a pod of Cloud TPUs.
"""

import glob
import os
from pathlib import Path

from absl import flags as absl_flags

from llm_jax import cpu, distributed, flags
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

_COORDINATOR = absl_flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several train as one.")
_NUM_PROCESSES = absl_flags.DEFINE_integer("num_processes", None, "How many they are.", lower_bound=1)
_PROCESS_ID = absl_flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_DISTRIBUTED = absl_flags.DEFINE_bool(
    "distributed", False, "There are others, as the machine's metadata service knows: on a pod of Cloud TPU VMs."
)


def main() -> None:
    cpu.restart("llm_jax.main")  # after mistakes in the flags are told, before anything else
    if not _CONFIG.value:
        raise InputError("no --config given; for example --config=configs/small.py")
    config = load_file(_CONFIG.value)
    override(config, _CHANGES.value)
    cluster = distributed.find(
        os.environ,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        distributed=_DISTRIBUTED.value,
    )
    if cluster is not None:
        distributed.supervise("llm_jax.main")
    os.environ |= cpu.devices(os.environ, freeze(config), cluster and cluster.num_processes)  # before jax is imported
    with flags.importing():
        from llm_jax.train import fit
    if cluster is not None:
        distributed.start(cluster)
    fit(config, workdir=_WORKDIR.value or _default_workdir(config.data.path))


def _default_workdir(data_path: str | None) -> Path:
    name = Path(_CONFIG.value).stem
    if data_path:
        plain = [part for part in Path(data_path).resolve().parts if not glob.has_magic(part)]
        name += f"-{Path(plain[-1]).stem}"  # of books/*.txt it is books
    return Path("runs") / name


if __name__ == "__main__":
    flags.run(main)
