"""nanoGPT's CPU recipe (tinyshakespeare by character, 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000
steps, no dropout) with RMSNorm, RoPE, SwiGLU and normed queries and keys in the block, by Muon.

python -m llm_jax.main --config=configs/shakespeare_char_cpu.py

Parameters: 787,968, 779,648 without embeddings; nanoGPT's shape, with its learned positions, has 804,096.
Hardware: 2 cores of an Intel Xeon. Time: 133 seconds, median of three seeds. Score: val loss 1.553 over the whole
validation split, mean of three seeds; nanoGPT's own is 1.886.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 128
    config.model.n_head = 4
    config.model.n_layer = 4
    config.model.block_size = 64
    config.model.qk_norm = True
    config.data.source = "tinyshakespeare"
    config.data.tokenizer = "char"
    config.optim.name = "muon"
    config.optim.schedule = "wsd"
    config.optim.peak_lr = 3e-3
    config.optim.final_lr = 0.0
    config.optim.adamw_lr = 1e-2
    config.optim.muon_momentum = 0.9
    config.optim.warmup_steps = 50
    config.optim.decay_fraction = 0.5
    config.train.batch_size = 12
    config.train.num_steps = 2000
    config.train.eval_every = 500
    config.train.save_every = 1000
    config.sample.max_new_tokens = 300
    config.sample.temperature = 0.8
    return config
