"""The cache folder: tokens of a corpus, and compiled programs."""

import os
from pathlib import Path


def cache_folder(cache_dir: str | None = None) -> Path:
    """`cache_dir`, else $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.path.expanduser(cache_dir or os.environ.get("LLM_JAX_CACHE") or "~/.cache/llm_jax"))


def keep_compiled_programs(folder: Path) -> None:
    """Has jax keep what it compiles in `folder`/compiled, so that the next process need not compile it again.

    Whoever has set jax's own cache (jax_compilation_cache_dir, or jax_enable_compilation_cache to False) is left
    alone, and a folder that cannot be written is no error: a cache only saves time.
    """
    import jax  # here, so that tokenizing needs none
    from jax.experimental.compilation_cache import compilation_cache

    compiled = (folder / "compiled").absolute()
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        compiled.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(compiled, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:  # jax's default
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # a step's small helpers take that
    compilation_cache.reset_cache()  # jax looks at the setting once, at the process's first compilation
