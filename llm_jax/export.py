"""A model as an artefact: prefill and decoding as `jax.export` programs, parameters and tokenizer beside them.

    export.json                      what `exported.py` must know
    prefill.jax, decode.jax          StableHLO for any number of rows, lengths of prompts and of the cache
    params.safetensors               laid out by decode_weights.py
    tokenizer.json, tokenizer_config.json
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax
from jax import export as jax_export

from llm_jax import engine, exported, generate, model, ops
from llm_jax.config import ModelConfig
from llm_jax.errors import InputError
from llm_jax.files import write_whole
from llm_jax.tokenizers import Tokenizer

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    path: str | Path,
    program: engine.Program,
    params: model.Params,
    tokenizer: Tokenizer,
    *,
    stop_tokens: Sequence[int],
    platforms: Sequence[str] = (),
) -> None:
    """Writes the folder; `params` are laid out. Caches are as long as the text, whatever the model's windows.

    Raises:
        InputError: a platform that is none; the folder holds an export already; flatbuffers is not installed.
    """
    path = Path(path)
    platforms = [platforms] if isinstance(platforms, str) else [*platforms]
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(f"platforms ({platform!r}) must be of {', '.join(PLATFORMS)}")
    if (path / "export.json").exists():
        raise InputError(f"{str(path)!r} holds an export already; export to another folder")
    exported.require_flatbuffers()
    cfg = dataclasses.replace(program.cfg, attention="plain")  # kernels are of one platform, and of known lengths
    apply_fn, _ = dataclasses.replace(program, cfg=cfg).functions()
    named = exported.named(params)
    like = jax.tree.structure(params)
    dtype = cfg.compute_dtype if program.cache_dtype is None else program.cache_dtype

    def prefill(named: dict[str, Any], tokens: jax.Array, request: dict[str, Any]) -> Any:
        empty = ops.EmptyCache(tokens.shape[1], jnp.dtype(dtype))
        params = jax.tree.unflatten(like, named.values())
        cache = (empty,) * cfg.n_layer
        return exported.plain(*generate.prefill(apply_fn, params, tokens, exported.rows_of(request), cache))

    def decode(named: dict[str, Any], state: dict[str, Any], request: dict[str, Any], stopped: jax.Array) -> Any:
        params = jax.tree.unflatten(like, named.values())
        state = exported.state_of(state)
        state = state._replace(
            done=state.done | stopped, cache=model.split_cache(state.cache, state.lengths - 1, slots=engine.CHUNK)
        )
        state, drawn = generate.decode(apply_fn, params, state, exported.rows_of(request), length=engine.CHUNK)
        return exported.plain(state._replace(cache=model.merge_cache(state.cache, state.lengths - 1)), drawn)

    specs = jax.tree.map(lambda leaf: _spec(*leaf.shape, of=leaf.dtype), named)
    b, t, n = jax_export.symbolic_shape("b, t, n", constraints=["b >= 1", "t >= 16", "n >= 1"])
    how = dict(platforms=platforms or None)
    prefilled = jax_export.export(jax.jit(prefill), **how)(specs, _spec(b, t), _request(cfg, b, n))
    b, s, n = jax_export.symbolic_shape("b, s, n", constraints=["b >= 1", "s >= 128", "n >= 1"])
    request = _request(cfg, b, n)
    state, _ = jax.eval_shape(prefill, specs, _spec(b, s), request)  # as after a prompt of s tokens
    decoded = jax_export.export(jax.jit(decode), **how)(specs, state, request, _spec(b, of=jnp.bool_))
    facts = {
        "format": exported.FORMAT,
        "vocab_size": cfg.vocab_size,
        "block_size": cfg.block_size,
        "chunk": engine.CHUNK,
        "stop_tokens": list(stop_tokens),
        "platforms": list(prefilled.platforms),
        "jax": jax.__version__,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({error.strerror}); export to another folder") from None
    tokenizer.save(path)
    safetensors.flax.save_file(named, path / "params.safetensors")
    (path / "prefill.jax").write_bytes(prefilled.serialize())
    (path / "decode.jax").write_bytes(decoded.serialize())
    # Last: a folder that has it is whole.
    write_whole(path / "export.json", json.dumps(facts, indent=2) + "\n")


def _request(cfg: ModelConfig, b: Any, n: Any) -> dict[str, Any]:
    """Shapes of what `exported.rows_of` takes, of b rows and n stop tokens."""
    whole = {name: _spec(b) for name in ("top_k", "min_new_tokens")}
    sampling = {name: _spec(b, of=jnp.float32) for name in generate.SamplingConfig._fields} | whole
    return {
        "starts": _spec(b),
        "ends": _spec(b),
        "seed": _spec(of=jnp.uint32),
        "numbers": _spec(b, of=jnp.uint32),
        "stop_tokens": _spec(n),
        "sampling": sampling | {"logit_bias": _spec(b, cfg.vocab_size, of=jnp.float32)},
    }


def _spec(*shape: Any, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, of)
