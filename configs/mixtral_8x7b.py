"""Mixtral 8x7B: 32 layers, 4096 wide, 8 experts of which a token goes through 2, context 4096, on TPUs.

python -m llm_jax.main --config=configs/mixtral_8x7b.py --config.data.path=FOLDER --config.data.tokenizer=FILE
python -m llm_jax.plan --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4

FOLDER holds text; FILE is Mixtral's tokenizer.json.
Parameters: 46,702,792,704, 46,440,648,704 without embeddings. Its published context is 32,768.
Hardware: by llm_jax.plan it fits on v5p:4x4x4 (one sequence on a chip, 23.3 of 95.7 GiB), split by experts and fsdp.
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
    config.model.block_size = 4096
    config.model.vocab_size = 32000
    config.model.n_expert = 8
    config.model.n_expert_per_token = 2
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 1000000.0
    config.model.tie_embeddings = False
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "block"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
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
