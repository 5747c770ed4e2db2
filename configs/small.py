"""The modern small model: RMSNorm, RoPE, SwiGLU, 128 wide, 8 heads, 6 layers, context 256.

python -m llm_jax.main --config=configs/small.py
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 128
    config.model.n_head = 8
    config.model.n_layer = 6
    config.model.block_size = 256
    config.sample.max_new_tokens = 150
    config.sample.temperature = 0.8
    config.sample.top_p = 0.95
    return config
