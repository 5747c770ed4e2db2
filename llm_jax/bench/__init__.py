"""`python -m llm_jax.bench`: what training and attention cost here, beside PyTorch's.

`__main__` is the command, `training` and `attention` its measurements, `torch_peers` the other side of both,
`contenders` the processes and alternating rounds that time any of them.
"""
