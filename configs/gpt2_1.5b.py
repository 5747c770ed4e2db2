"""GPT-2 XL, 1.5 billion parameters: 48 layers, 25 heads, 1600 wide, context 1024.

python -m llm_jax.main --config=configs/gpt2_1.5b.py --config.data.path=FOLDER --config.data.tokenizer=tokenizer.json
python -m llm_jax.plan --config=configs/gpt2_1.5b.py --topology=v5e:2x4

FOLDER holds train.bin and val.bin, or shards, of uint16 tokens as nanoGPT or llm.c write them; tokenizer.json is
GPT-2's.
Parameters: 1,557,686,400, 1,475,561,600 without embeddings.
Hardware: by llm_jax.plan it fits on v5e:2x4 (5.9 of 15.8 GiB), split by fsdp, four sequences on each chip at a time.
Time, score: not yet run.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 1600
    config.model.n_head = 25
    config.model.n_layer = 48
    config.model.block_size = 1024
    config.model.use_rope = False
    config.model.use_rmsnorm = False
    config.model.mlp = "gelu_tanh"
    config.model.use_bias = True
    config.model.vocab_size = 50304  # GPT-2's 50257, up to a multiple of 128
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "block"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.data.source = "bin"
    config.optim.peak_lr = 2e-4
    config.optim.final_lr = 2e-5
    config.optim.warmup_steps = 2000
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.95
    config.train.batch_size = 512
    config.train.accumulation_steps = 16
    config.train.num_steps = 600_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
