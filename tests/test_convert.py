"""python -m llm_jax.convert: any format to any other."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import run

import llm_jax
from llm_jax.config import freeze
from llm_jax.model import init_params
from llm_jax.tokenizers import train_bpe


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama with the tokenizer of a run: llama.cpp does not split text so, and a GGUF needs another."""
    tokenizer = train_bpe(["the cat and the dog"] * 5, 280)
    cfg = freeze({"model": dict(n_embd=32, n_head=4, n_kv_head=2, n_layer=2, block_size=16, vocab_size=280)})
    params = jax.jit(init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("small") / "run"
    llm_jax.LanguageModel(cfg, params, tokenizer).save(folder)
    return folder
