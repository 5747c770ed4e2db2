"""What a run starts from: fresh parameters, or those of a model that is there already (`train.init_from`)."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import model, pretrained, run_folder
from llm_jax.config import Config, DataConfig, ModelConfig
from llm_jax.config_rules import check_seq_len, freeze
from llm_jax.errors import InputError
from llm_jax.tokenizers import Tokenizer

# The config's own, whatever the model was trained or stored with.
OWN = ("dropout", "param_dtype", "compute_dtype", "attention", "layer_execution", "remat")


class Start(NamedTuple):
    """config: with the model's shape. tokenizer, source: the model's; None: to be made."""

    config: Config
    tokenizer: Tokenizer | None = None
    source: pretrained.Source | None = None

    def params(self, placed: Any) -> model.Params:
        """Where `placed`, a tree of shardings, has them."""
        return pretrained.load_params(self.source, self.config.model.param_dtype, placed)[1]


def find(cfg: Config, workdir: Path) -> Start:
    """Opens the model of `train.init_from`, unless the run in the workdir has begun: it has the shape and tokenizer.

    Raises:
        InputError: there is no such model; the config sets another shape or tokenizer.
    """
    path = cfg.train.init_from
    if path is None:
        return Start(cfg)
    source = None
    if (workdir / "config.json").is_file() and run_folder.read_config(workdir).train.init_from == path:
        config, tokenizer = run_folder.read_run(workdir)
        if not any((workdir / "checkpoints").glob("[0-9]*")):
            source = pretrained.open_model(path)
    else:
        source = pretrained.open_model(path)
        config, tokenizer = source.config, source.tokenizer
    if cfg.data.tokenizer != DataConfig.tokenizer:
        raise InputError(
            f"data.tokenizer ({cfg.data.tokenizer!r}) and train.init_from ({path!r}) exclude each other: the model "
            "knows its own tokens alone; leave data.tokenizer out"
        )
    wanted, default, there = cfg.model, freeze({}).model, config.model
    wrong = [
        f"model.{name} ({getattr(wanted, name)!r}, there {getattr(there, name)!r})"
        for name in (field.name for field in dataclasses.fields(ModelConfig) if field.name not in OWN)
        if getattr(wanted, name) not in (getattr(default, name), getattr(there, name))
    ]
    if wrong:
        raise InputError(
            f"the config sets another shape than the model {path!r} has: {', '.join(wrong)}; leave these out, as "
            "configs/finetune.py does"
        )
    own = {name: getattr(wanted, name) for name in OWN}
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(there, **own),
        sample=dataclasses.replace(cfg.sample, stop_tokens=cfg.sample.stop_tokens or config.sample.stop_tokens),
    )
    check_seq_len(cfg)
    return Start(cfg, tokenizer, source)
