"""Llama 3 8B: 32 layers, 4096 wide, 32 heads over 8 key/value heads, context 8192, on a slice of TPUs.

python -m llm_jax.main --config=configs/llama3_8b.py --config.data.path=FOLDER --config.data.tokenizer=tokenizer.json
python -m llm_jax.plan --config=configs/llama3_8b.py --topology=v5p:4x4x4

FOLDER holds text; tokenizer.json is Llama 3's.
Parameters: 8,030,261,248, 6,979,588,096 without embeddings.
Hardware: by llm_jax.plan it fits on v5p:2x2x2 (eight sequences a chip, 44.1 of 95.7 GiB), v5p:4x4x4 (one, 8.0)
and, with --config.train.accumulation_steps=4, v6e:4x4 (four, one at a time, 16.7 of 31.2), each split by fsdp alone.
Time, score: not yet run.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 4096
    config.model.n_head = 32
    config.model.n_kv_head = 8
    config.model.n_layer = 32
    config.model.mlp_dim = 14336
    config.model.block_size = 8192
    config.model.vocab_size = 128256
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 500000.0
    config.model.tie_embeddings = False
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "block"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.data.source = "text"
    config.optim.name = "adamw"
    config.optim.peak_lr = 3e-4
    config.optim.warmup_steps = 2000
    config.optim.b2 = 0.95
    config.train.batch_size = 64
    config.train.num_steps = 1_000_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
