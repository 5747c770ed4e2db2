"""Compiled programs are kept; where the cache folder lies is tests/test_corpus.py's."""

import jax

from llm_jax.cache import keep_compiled_programs

# What a step is to the cache: a program that takes longer than its 0.1 s to compile.
PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from llm_jax.cache import keep_compiled_programs

def program(x):
    for _ in range(60):
        x = jnp.tanh(x @ x) + jnp.sort(x, axis=0)
    return x

hits = []
jax.monitoring.register_event_listener(lambda event, **_: event.endswith("/cache_hits") and hits.append(event))
jax.jit(lambda x: x + 1)(1.0)  # whoever imports us has compiled something before
keep_compiled_programs(Path("cache"))
jax.jit(program)(jnp.ones((8, 8)))
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def test_the_next_process_finds_what_this_one_compiled(run_python, tmp_path):
    results = [run_python("-c", PROGRAM) for _ in range(2)]
    assert [done.stderr for done in results] == ["", ""]
    assert [done.stdout.split() for done in results] == [
        ["0", str(tmp_path / "cache/compiled")],
        ["1", str(tmp_path / "cache/compiled")],
    ]


def test_a_cache_of_ones_own_stays(run_python, tmp_path):
    done = run_python("-c", PROGRAM, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert done.stdout.split()[1] == str(tmp_path / "own") and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            keep_compiled_programs(tmp_path / "file")
            assert jax.config.jax_compilation_cache_dir is None
            patch.setattr("os.access", lambda *_: False)
            keep_compiled_programs(tmp_path / "folder")
            assert jax.config.jax_compilation_cache_dir is None
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
