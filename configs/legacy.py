"""The "before" of configs/small.py, built as GPT-2: LayerNorm, learned positions, GELU, biases, tied embeddings;
64 wide, 4 heads, 4 layers, context 64, on the standard library's own source by character.

python -m llm_jax.main --config=configs/legacy.py

Parameters: 217,920, 200,064 without embeddings, with the 215 distinct characters of Python 3.11's standard library
(96 of them ASCII; 3.13 has 217). A prompt may hold no other character.
Hardware: 2 cores of an AMD EPYC. Time: 4.8 minutes. Score: val loss 1.826, 2.634 bits per byte, over the whole
validation split; small.py reaches 1.578 bits per byte.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 64
    config.model.n_head = 4
    config.model.n_layer = 4
    config.model.block_size = 64
    config.model.use_rope = False
    config.model.use_rmsnorm = False
    config.model.mlp = "gelu"
    config.model.use_bias = True
    config.data.tokenizer = "char"
    config.train.batch_size = 64
    config.sample.max_new_tokens = 300
    config.sample.temperature = 0.8
    return config
