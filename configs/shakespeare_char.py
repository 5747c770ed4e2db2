"""nanoGPT's GPU recipe (tinyshakespeare by character, 6 layers, 6 heads, 384 wide, context 256, batch 64, 5000 steps,
dropout 0.2) with RMSNorm, RoPE and SwiGLU in the block.

python -m llm_jax.main --config=configs/shakespeare_char.py

For an accelerator; on a CPU, add --config.model.compute_dtype=float32 and hours of patience.
Parameters: 10,646,784, 10,621,824 without embeddings; nanoGPT's shape, with its learned positions, has 10,745,088.
Hardware, time, score: not yet run. nanoGPT's own is 1.4697, its best of about 20 evaluations on part of the split.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 384
    config.model.n_head = 6
    config.model.n_layer = 6
    config.model.block_size = 256
    config.model.mlp_dim = 1024  # three matrices of it are as many parameters as two of 4 x 384
    config.model.dropout = 0.2
    config.model.compute_dtype = "bfloat16"
    config.data.source = "tinyshakespeare"
    config.data.tokenizer = "char"
    config.optim.peak_lr = 1e-3
    config.optim.final_lr = 1e-4
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 5000
    config.train.eval_every = 250
    config.train.save_every = 250
    config.train.log_every = 50
    config.sample.max_new_tokens = 500
    config.sample.temperature = 0.8
    return config
