"""GPT and Llama style language models in JAX: train, sample, and borrow the pure functions.

    lm = llm_jax.fit("configs/small.py", workdir="runs/small")    # the loop that `python -m llm_jax.main` calls
    lm = llm_jax.load("runs/small")                               # a run -> LanguageModel
    lm.generate("def ", max_new_tokens=150, temperature=0.8, top_p=0.95)

`llm_jax.ops` holds the pure functions of arrays and needs jax alone; `llm_jax.config` every knob.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use, so that `import llm_jax.ops` stays free of flax and orbax.
_PUBLIC = {
    "LanguageModel": "language_model",
    "InputError": "errors",
    "fit": "train",
    "load": "language_model",
    "load_exported": "exported",
}
_MODULES = ("config", "cpu", "generate", "model", "ops")

__all__ = ["InputError", "LanguageModel", "fit", "load", "load_exported"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"llm_jax.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"llm_jax.{name}")
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
