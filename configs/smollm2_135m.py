"""The shape of SmolLM2 135M: 30 layers, 576 wide, 9 heads over 3 key/value heads, context 8192.

python -m llm_jax.bench decode --config=configs/smollm2_135m.py
python -m llm_jax.main --config=configs/smollm2_135m.py --config.data.path=FOLDER --config.data.tokenizer=FILE

FOLDER holds text; FILE is a tokenizer.json, SmolLM2's, or any other of at most 49,152 ids.
Parameters: 134,515,008, 106,203,456 without embeddings.
Hardware: trains on one accelerator of 24 GB with attention's memory linear in the context; decodes on two CPU cores.
Time, score: how fast it decodes is in the README's table; training not yet run.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 576
    config.model.n_head = 9
    config.model.n_kv_head = 3
    config.model.n_layer = 30
    config.model.mlp_dim = 1536
    config.model.block_size = 8192
    config.model.vocab_size = 49152
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 100_000.0
    config.data.source = "text"
    config.optim.peak_lr = 3e-3
    config.optim.warmup_steps = 1000
    config.optim.b2 = 0.95
    config.train.batch_size = 32
    config.train.accumulation_steps = 32
    config.train.num_steps = 100_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
