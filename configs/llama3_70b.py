"""Llama 3 70B: 80 layers, 8192 wide, 64 heads over 8 key/value heads, context 8192, on a slice of TPUs.

python -m llm_jax.main --config=configs/llama3_70b.py --config.data.path=FOLDER --config.data.tokenizer=tokenizer.json
python -m llm_jax.plan --config=configs/llama3_70b.py --topology=v5p:4x4x8

FOLDER holds text; tokenizer.json is Llama 3's.
Parameters: 70,553,706,496, 68,452,360,192 without embeddings.
Hardware: by llm_jax.plan it fits on v5p:4x4x8 (two sequences a chip, 41.0 of 95.7 GiB) and v6e:16x16 (one, 20.8 of
31.2), split by fsdp alone.
Time, score: not yet run.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 8192
    config.model.n_head = 64
    config.model.n_kv_head = 8
    config.model.n_layer = 80
    config.model.mlp_dim = 28672
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
    config.optim.peak_lr = 1.5e-4
    config.optim.warmup_steps = 2000
    config.optim.b2 = 0.95
    config.train.batch_size = 256
    config.train.num_steps = 1_000_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
