"""Opens what `LanguageModel.export` wrote, and continues text with it, without any model code.

The programs in it run on this machine's devices as any compiled function does. They can reach no file and no network,
but open only what you would run.
"""

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.flax
from jax import export as jax_export
from jaxtyping import Int

from llm_jax import decoding, generate, ops
from llm_jax.errors import InputError
from llm_jax.text_model import TextModel
from llm_jax.tokenizers import Tokenizer, load_tokenizer

FORMAT = 2


def load_exported(path: str | Path) -> "ExportedModel":
    """Opens the folder that `LanguageModel.export` wrote.

    Raises:
        InputError: there is none, or it is for other platforms than this machine's.
    """
    path = Path(os.path.expanduser(path))
    try:
        facts = json.loads((path / "export.json").read_text())
        numbers = [facts[name] for name in ("format", "vocab_size", "block_size", "chunk")]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError("its numbers are no numbers")
        if facts["format"] == FORMAT and not all(isinstance(token, int) for token in facts["stop_tokens"]):
            raise ValueError("its stop_tokens are no ids")
        platforms = [str(platform) for platform in facts["platforms"]]
    except OSError as error:
        raise InputError(
            f"{str(path)!r} holds no export ({error.strerror}: export.json); give the folder of lm.export"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'export.json'} is not what lm.export writes: {error!r}") from None
    if facts["format"] != FORMAT:
        raise InputError(f"{str(path)!r} is an export of format {facts['format']}, and this version reads {FORMAT}")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in platforms:
        raise InputError(
            f"{str(path)!r} is exported for {', '.join(platforms)}, not for this machine's {platform}; export it "
            f"with platforms=[{platform!r}]"
        )
    require_flatbuffers()
    return ExportedModel(ExportedEngine(path, facts["chunk"]), load_tokenizer(path), facts)


def require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError("exported programs need flatbuffers, which is not installed: pip install 'llm_jax[export]'")


class ExportedModel(TextModel):
    """An exported model with its tokenizer: `generate`, `generate_detailed`, `stream` and `chat` of `LanguageModel`.

    Neither top_logprobs nor a draft: its programs have no place for them.
    """

    def __init__(self, engine: "ExportedEngine", tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
        super().__init__(
            tokenizer,
            vocab_size=facts["vocab_size"],
            block_size=facts["block_size"],
            stop_tokens=facts["stop_tokens"],
        )
        self._exported = engine

    def start(self, context: Any, *, top_logprobs: int = 0, **settings: Any) -> Any:
        if top_logprobs:
            raise InputError(f"top_logprobs ({top_logprobs}): an exported model has no place for them; leave it out")
        return super().start(context, **settings)

    def _engine(self, length: int, draft: Any, draft_tokens: int) -> decoding.Engine:
        if draft is not None:
            raise InputError(f"draft ({draft!r}): an exported model guesses nothing; leave it out")
        return self._exported


class ExportedEngine:
    """The programs of a folder, as an engine of `decoding.run`."""

    def __init__(self, path: Path, chunk: int) -> None:
        self.chunk = chunk
        try:
            self._params = safetensors.flax.load_file(path / "params.safetensors")
            # By jit, which keeps what it compiles for each length.
            self._prefill, self._decode = (
                jax.jit(jax_export.deserialize(bytearray((path / name).read_bytes())).call)
                for name in ("prefill.jax", "decode.jax")
            )
        except Exception as error:  # each library has its own
            raise InputError(f"{str(path)!r} is not a whole export ({' '.join(str(error).split())})") from None

    def prefill(
        self,
        tokens: Int[np.ndarray, "b T"],
        starts: Int[np.ndarray, "B"],
        ends: Int[np.ndarray, "B"],
        request: decoding.Request,
    ) -> tuple[Any, generate.State, generate.Drawn]:
        kept = {
            "starts": starts,
            "ends": ends,
            "seed": np.uint32(request.seed),
            "numbers": np.array(request.numbers, np.uint32),
            "stop_tokens": decoding.padded(request.stop_tokens),
            "sampling": {name: np.asarray(value) for name, value in request.sampling._asdict().items()},
        }
        tokens = np.repeat(tokens, request.num_samples, axis=0)
        return kept, *_parts(self._prefill(self._params, tokens, kept))

    def grow(self, kept: Any, state: generate.State, slots: int) -> tuple[Any, generate.State]:
        cache = tuple(ops.grow_cache(ring, slots, pad=decoding.pad) for ring in state.cache)
        return kept, state._replace(cache=cache)

    def decode(
        self, kept: Any, state: generate.State, request: decoding.Request, text: Int[np.ndarray, "B S"]
    ) -> tuple[Any, generate.State, generate.Drawn]:
        return kept, *_parts(self._decode(self._params, plain(state, None)[0], kept, request.stopped))


# -- What crosses the border of a program is of dicts and lists, which need no registration.


def named(params: Any) -> dict[str, jax.Array]:
    """Name -> leaf, in the order of the tree's leaves: names begin with their number."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    digits = len(str(len(leaves)))
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {f"{i:0{digits}}/{keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def plain(state: generate.State, drawn: generate.Drawn | None) -> tuple[dict[str, Any], dict[str, Any]]:
    cache = [{name: x for name, x in ring._asdict().items() if x is not None} for ring in state.cache]
    return state._asdict() | {"cache": cache}, {} if drawn is None else drawn._asdict()


def state_of(plain: dict[str, Any]) -> generate.State:
    return generate.State(**plain | {"cache": tuple(ops.LayerCache(**ring) for ring in plain["cache"])})


def rows_of(request: dict[str, Any]) -> generate.Rows:
    """Keys are made anew from seed and numbers: as typed arrays they could not cross."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(request["seed"]), request["numbers"])
    sampling = generate.SamplingConfig(**request["sampling"])
    return generate.Rows(keys, request["starts"], request["ends"], sampling, request["stop_tokens"])


def _parts(outcome: tuple[dict[str, Any], dict[str, Any]]) -> tuple[generate.State, generate.Drawn]:
    return state_of(outcome[0]), generate.Drawn(**outcome[1])
