"""GPT-2 124M with nanoGPT's recipe: 12 layers, 12 heads, 768 wide, context 1024, 480 sequences a step, 600,000 steps.

python -m llm_jax.main --config=configs/gpt2_124m.py --config.data.path=FOLDER --config.data.tokenizer=tokenizer.json

FOLDER holds train.bin and val.bin, or shards, of uint16 tokens as nanoGPT or llm.c write them; tokenizer.json is
GPT-2's.
Parameters: 124,475,904, 85,056,000 without embeddings.
Hardware: meant for 8 GPUs of 40 GB, 12 sequences on each at a time; change train.accumulation_steps for others.
Time, score: not yet run. nanoGPT's own is val 2.85 on OpenWebText.

Its speed beside PyTorch's on one GPU, on random tokens, with no data and no network:
python -m llm_jax.bench train --config=configs/gpt2_124m.py --config.train.batch_size=16 \
    --config.train.accumulation_steps=1
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.model.n_embd = 768
    config.model.n_head = 12
    config.model.n_layer = 12
    config.model.block_size = 1024
    config.model.use_rope = False
    config.model.use_rmsnorm = False
    config.model.mlp = "gelu_tanh"
    config.model.use_bias = True
    config.model.vocab_size = 50304  # GPT-2's 50257, up to a multiple of 128
    config.model.compute_dtype = "bfloat16"
    config.data.source = "bin"
    config.optim.peak_lr = 6e-4
    config.optim.final_lr = 6e-5
    config.optim.warmup_steps = 2000
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.95
    config.train.batch_size = 480
    config.train.accumulation_steps = 5
    config.train.num_steps = 600_000
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
