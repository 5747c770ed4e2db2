"""Converts a model: python -m llm_jax.convert SRC DST [--dtype=bfloat16] [--to=hf]

SRC is what llm_jax.load opens: a run's workdir, a Hugging Face folder, a GGUF file, or llama2.c's model.bin. DST is a
GGUF file if its name ends in .gguf, llama2.c's if in .bin, and otherwise a Hugging Face folder, or with --to=run a
run's. One tensor is read and written at a time, but a run is as a whole. DST is there when all of it is.
"""

import os
from pathlib import Path

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.errors import InputError
from llm_jax.progress import say

DTYPES = ("float32", "bfloat16", "float16", "q8_0")
# Format -> the dtypes that it can be written in.
FORMATS = {
    "hf": ("float32", "bfloat16", "float16"),
    "gguf": DTYPES,
    "llama2c": ("float32",),
    "run": ("float32", "bfloat16"),
}

_DTYPE = absl_flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of weights; q8_0, blocks of 8 bits, in GGUF alone. Default: as they are."
)
_TO = absl_flags.DEFINE_enum("to", None, tuple(FORMATS), "Format of DST. Default: by its name.")
_STEP = absl_flags.DEFINE_string("step", "best", "Of a run: best (by val_loss), last, or a number.")
_TOKENIZER = absl_flags.DEFINE_string(
    "tokenizer", None, "Folder, tokenizer.json or tokenizer.model to take in the place of SRC's own."
)


def main(src: str, dst: str) -> None:
    path = Path(os.path.expanduser(dst))
    to = _TO.value or {".gguf": "gguf", ".bin": "llama2c"}.get(path.suffix, "hf")
    dtype = _DTYPE.value or ("float32" if to == "llama2c" else None)
    if dtype is not None and dtype not in FORMATS[to]:
        raise InputError(f"--dtype={dtype} is not known of {to}; it is one of {', '.join(FORMATS[to])}")
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise InputError(f"{dst!r} is there already; give another DST")
    with flags.importing():
        from llm_jax import pretrained, published
        from llm_jax.language_model import load
        from llm_jax.tokenizers import load_tokenizer
    tokenizer = None if _TOKENIZER.value is None else load_tokenizer(_TOKENIZER.value)
    if to == "run":
        load(src, step=_STEP.value, dtype=dtype, tokenizer=tokenizer).save(path)
    else:
        source = pretrained.open_model(src, step=_STEP.value, tokenizer=tokenizer)
        try:
            if to == "hf":
                published.save_hf(source, path, dtype=dtype)
            elif to == "gguf":
                published.save_gguf(source, path, dtype=dtype)
            else:
                published.save_llama2c(source, path)
        except InputError as error:
            raise InputError(f"{src}: {error}") from None
    say(f"wrote {dst}" + (", which holds no tokenizer" if to == "llama2c" else ""))


if __name__ == "__main__":
    flags.run(main, arguments=("SRC", "DST"))
