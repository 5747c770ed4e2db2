"""nanoGPT's GPU recipe (tinyshakespeare by character, context 256) by a quarter of its parameters and a small part of
its tokens: RMSNorm, RoPE, SwiGLU and normed queries and keys in the block, 192 wide instead of 384, by Muon.

python -m llm_jax.main --config=configs/shakespeare_char.py

Parameters: 2,669,568, 2,657,088 without embeddings; nanoGPT's shape has 10,745,088.
Hardware: 2 cores of an Intel Xeon. Time: 11 minutes. Score: val loss 1.431 over the whole validation split after 3.1
million tokens; nanoGPT's own is 1.4697 within 82 million, its best of about 20 evaluations on parts of the split.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 192
    config.model.n_head = 6
    config.model.n_layer = 6
    config.model.block_size = 256
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
    config.train.batch_size = 8
    config.train.num_steps = 1500
    config.train.eval_every = 250
    config.train.save_every = 500
    config.sample.max_new_tokens = 500
    config.sample.temperature = 0.8
    return config
