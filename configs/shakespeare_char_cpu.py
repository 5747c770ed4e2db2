"""nanoGPT's CPU recipe (tinyshakespeare by character, 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000
steps, no dropout) with RMSNorm, RoPE and SwiGLU in the block.

python -m llm_jax.main --config=configs/shakespeare_char_cpu.py

Parameters: 787,712, 779,392 without embeddings; nanoGPT's shape, with its learned positions, has 804,096.
Hardware: 2 cores of an AMD EPYC. Score: val loss 1.680 over the whole validation split, mean of three seeds;
nanoGPT's own is 1.886.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 128
    config.model.n_head = 4
    config.model.n_layer = 4
    config.model.block_size = 64
    config.data.source = "tinyshakespeare"
    config.data.tokenizer = "char"
    config.optim.peak_lr = 3e-3
    config.optim.warmup_steps = 100
    config.train.batch_size = 12
    config.train.num_steps = 2000
    config.train.eval_every = 500
    config.train.save_every = 1000
    config.sample.max_new_tokens = 300
    config.sample.temperature = 0.8
    return config
