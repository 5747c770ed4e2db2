"""Flops of the kernels in a compiled program, which a compiler does not tell, by formula."""

import math

from llm_jax import model, ops
from llm_jax.config import ModelConfig
from llm_jax.hlo import Instruction


class KernelFlops:
    """Of a call in the program of a model.

    Splash attention: of each product the blocks in which a query sees some key, on average over the layers and their
    windows. Forward two products, q k^T and its weights times v; for dq three, for dk and dv four: each computes the
    first again.

    Products of rows with their own expert's weights: of the rows that find their expert on this device when all
    experts are chosen alike.
    """

    PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

    def __init__(self, cfg: ModelConfig) -> None:
        self._windows, self._experts = model.layer_windows(cfg), cfg.n_expert

    def __call__(self, call: Instruction) -> float:
        if call.name.startswith("ragged-dot-none"):
            (rows, width), (experts, _, out_width) = [operand.shapes[0].dims for operand in call.operands[-2:]]
            return 2.0 * rows * experts / self._experts * width * out_width
        products = next((n for name, n in self.PRODUCTS.items() if name in call.name), None)
        if products is None:
            return 0.0
        # q, k and v are the floats of three axes or, of several texts, four: [B, N, T, H].
        shapes = [shape for operand in call.operands for shape in operand.shapes]
        q, k = [shape.dims for shape in shapes if shape.dtype in ("f32", "bf16") and len(shape.dims) >= 3][:2]
        rows, (time, width) = math.prod(q[:-2]), q[-2:]
        seen = [pairs_seen(time, k[-2], window) for window in self._windows]
        return products * 2.0 * rows * width * sum(seen) / len(seen)


def pairs_seen(time: int, keys: int, window: int) -> float:
    """Pairs of a query and a key in blocks of which some are visible; the queries are those of the last keys."""
    block, key_block = (next(size for size in ops.SPLASH_BLOCKS if each % size == 0) for each in (time, keys))
    pairs = 0
    for first in range(keys - time, keys, block):
        from_key = max(0, first - window + 1) // key_block * key_block
        to_key = min(keys, -(-(first + block) // key_block) * key_block)
        pairs += block * (to_key - from_key)
    return float(pairs)
