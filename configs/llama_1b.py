"""The shape of Llama 3.2 1B: 16 layers, 2048 wide, 32 heads over 8 key/value heads, context 8192.

python -m llm_jax.main --config=configs/llama_1b.py --config.data.path=FOLDER --config.data.tokenizer=tokenizer.json

FOLDER holds text; tokenizer.json is Llama 3's. The published model is meant for 131,072 tokens, which
--config.model.block_size=131072 gives: with rope nothing else changes.
Parameters: 1,235,814,400, 973,146,112 without embeddings.
Hardware: meant for 8 accelerators of 80 GB, one sequence on each at a time: parameters, AdamW's moments and
gradients take 20 GB on every one. Change train.accumulation_steps for others.
Time, score: not yet run.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 2048
    config.model.n_head = 32
    config.model.n_kv_head = 8
    config.model.n_layer = 16
    config.model.mlp_dim = 8192
    config.model.block_size = 8192
    config.model.vocab_size = 128256
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 500000.0
    config.model.rope_scaling = "llama3"
    config.model.rope_factor = 32.0
    config.model.rope_low_freq_factor = 1.0
    config.model.rope_high_freq_factor = 4.0
    config.model.rope_original_length = 8192
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "block"
    config.data.source = "text"
    config.optim.peak_lr = 3e-4
    config.optim.warmup_steps = 2000
    config.optim.b2 = 0.95
    config.train.batch_size = 64
    config.train.accumulation_steps = 8
    config.train.num_steps = 100_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
