"""Whether a run fits on devices that are not here, and how fast it can be at most:

python -m llm_jax.plan --config=configs/llama3_8b.py --topology=v5p:4x4x4 [--config.mesh.fsdp=16 ...]
python -m llm_jax.plan --config=configs/llama_1b.py --topology=v5e:1x1 --decode [--batch_size=8 --new_tokens=256 ...]
python -m llm_jax.plan --config=configs/llama3_8b.py --topology=v5p:4x4x4 --search [--max_compiles=12]

Compiles the training step for them, which needs libtpu (pip install 'llm_jax[tpu]', in an environment of its own);
--topology=cpu:8 needs nothing. No data is read. With --decode it compiles the sampler, for one device: a model that
generates lies whole on one. With --search it compiles the likeliest of all divisions of the batch, the mesh and what
is kept for the gradient, and prints the best that fit as commands.
"""

import copy
import json
from collections.abc import Sequence

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.config import CACHE_DTYPES, WEIGHTS, Config
from llm_jax.config_file import load_file, override
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.progress import say

_CONFIG = absl_flags.DEFINE_string("config", None, "Config file, such as configs/llama3_8b.py.")
_CHANGES = absl_flags.DEFINE_multi_string(
    flags.CONFIG_CHANGES, [], "Changes a key of the config, such as --config.mesh.fsdp=16."
)
_TOPOLOGY = absl_flags.DEFINE_string(
    "topology", None, "Chips and how they are linked: v5e:2x4, v5p:4x4x4, cpu:8, ..."
)
_JSON = absl_flags.DEFINE_bool("json", False, "The numbers as one line of JSON.")
_DECODE = absl_flags.DEFINE_bool("decode", False, "Plans the sampler instead of a training step.")
_BATCH_SIZE = absl_flags.DEFINE_integer("batch_size", 1, "decode: rows at a time.", lower_bound=1)
_PROMPT_TOKENS = absl_flags.DEFINE_integer("prompt_tokens", 128, "decode: of each row.", lower_bound=1)
_NEW_TOKENS = absl_flags.DEFINE_integer("new_tokens", 128, "decode: of each row.", lower_bound=1)
_WEIGHTS = absl_flags.DEFINE_enum("weights", None, WEIGHTS, "decode: rounded to this. Default: the compute dtype.")
_CACHE_DTYPE = absl_flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "decode: of keys and values.")
_SEARCH = absl_flags.DEFINE_bool("search", False, "Looks for the best micro-batch, model.remat and mesh.")
_MAX_COMPILES = absl_flags.DEFINE_integer("max_compiles", 12, "search: training steps to compile.", lower_bound=1)


def main() -> None:
    if not _CONFIG.value or not _TOPOLOGY.value:
        missing = "config" if not _CONFIG.value else "topology"
        raise InputError(f"no --{missing} given; for example --config=configs/llama3_8b.py --topology=v5p:4x4x4")
    if _DECODE.value and _SEARCH.value:
        raise InputError("--search is of training steps; leave it or --decode out")
    if _SEARCH.value and _JSON.value:
        raise InputError("--search prints commands; leave it or --json out")
    config = load_file(_CONFIG.value)
    config.data.source, config.data.path = "python_stdlib", None  # no data is read

    def configured(changes: Sequence[str] = ()) -> Config:
        changed = copy.deepcopy(config)
        override(changed, (*_CHANGES.value, *changes))
        return freeze(changed)

    cfg = configured()
    with flags.importing():
        import jax

        from llm_jax import chips, plan_report, plan_search, planning, planning_decode
    jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
    jax.config.update("jax_num_cpu_devices", chips.number_of_cpus(_TOPOLOGY.value) or 1)
    topology = chips.find(_TOPOLOGY.value)
    where = (topology.name, len(topology.devices))
    say(f"compiles for {topology.name}, which takes seconds to minutes")
    if _SEARCH.value:
        found = plan_search.search(configured, topology, max_compiles=_MAX_COMPILES.value)
        print(plan_report.search(found, _CONFIG.value, _CHANGES.value))
    elif _DECODE.value:
        lengths = dict(batch_size=_BATCH_SIZE.value, prompt_tokens=_PROMPT_TOKENS.value, new_tokens=_NEW_TOKENS.value)
        how = dict(weights=_WEIGHTS.value, cache_dtype=_CACHE_DTYPE.value)
        sampler = planning_decode.plan_decode(cfg, topology, **lengths, **how)
        print(json.dumps(sampler.as_dict()) if _JSON.value else plan_report.decode(*where, sampler, **lengths))
    else:
        plan = planning.plan_training(cfg, topology)
        print(json.dumps(plan.as_dict()) if _JSON.value else plan_report.training(*where, plan))


if __name__ == "__main__":
    flags.run(main)
