"""Trains a model that is there already on other text, in its own tokens.

    python -m llm_jax.main --config=configs/finetune.py --config.train.init_from=MODEL --config.data.path=my.txt

MODEL is anything that llm_jax.load opens: a run, a Hugging Face folder, a GGUF file, llama2.c's model.bin. The run
has its shape, so nothing of `model` is set here. The rate is a tenth of what training from nothing takes; it is not
tuned.
"""

from llm_jax.config import default


def get_config():
    config = default()
    config.train.init_from = ""  # give it: --config.train.init_from=MODEL
    config.train.seq_len = 256
    config.train.batch_size = 8
    config.train.num_steps = 200
    config.train.eval_every = 50
    config.train.save_every = 100
    config.optim.peak_lr = 1e-4
    config.optim.warmup_steps = 10
    return config
