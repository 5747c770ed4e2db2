"""Our training step beside nanoGPT's, eager and compiled, in turns; the last line is JSON: of each, seconds a step by
round, and how many times as fast ours was.

python tests/beside_nanogpt.py CLONE [group.key=value ...]

CLONE is a clone of nanoGPT; the changes are of configs/small.py, whose block they must make GPT-2's.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from llm_jax import cpu
from llm_jax.bench import training
from llm_jax.bench.contenders import Contender, Worker, alternate, random_batches, ratios
from llm_jax.config import Config
from llm_jax.config_file import load_file, override


class NanoGPT:
    """A step of nanoGPT's train.py: its model, its optimizer, clipped gradients; the batches lie in memory."""

    def __init__(self, cfg: Config, clone: str, compiled: bool) -> None:
        sys.path.insert(0, clone)
        import torch
        from model import GPT, GPTConfig  # of the clone

        torch.set_num_threads(cpu.cores())
        torch.manual_seed(0)
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
        model = GPT(GPTConfig(**{name: getattr(cfg.model, name) for name in names}, bias=cfg.model.use_bias))
        o = cfg.optim
        self._optimizer = model.configure_optimizers(o.weight_decay, o.peak_lr, (o.b1, o.b2), "cpu")
        self._model = torch.compile(model) if compiled else model
        self._clip = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        self._batches = [tuple(torch.from_numpy(a).long() for a in arrays[:2]) for arrays in random_batches(cfg)]
        self._parameters = sum(p.numel() for p in model.parameters())
        self._run(1)

    def parameters(self) -> int:
        return self._parameters

    def time(self, steps: int) -> float:
        self._run(1)
        return self._run(steps)

    def _run(self, steps: int) -> float:
        start = time.perf_counter()
        for i in range(steps):
            _, loss = self._model(*self._batches[i % len(self._batches)])
            loss.backward()
            self._clip()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start


def main(clone: str, *changes: str) -> None:
    config = load_file(str(Path(__file__).parents[1] / "configs/small.py"))
    override(config, changes)
    cfg = training.with_vocabulary(config)
    ours = Worker(training.Ours, cfg, environment=cpu.huge_pages(os.environ) | cpu.devices(os.environ, cfg))
    contenders, parameters = [Contender("llm_jax", ours)], ours.call("facts")["parameters"]
    for name, compiled in (("nanoGPT eager", False), ("nanoGPT compiled", True)):
        worker = Worker(NanoGPT, cfg, clone, compiled)
        assert worker.call("parameters") == parameters
        contenders.append(Contender(name, worker))
    alternate(contenders, 5)
    result: dict[str, Any] = {
        each.name: {"step_seconds": each.seconds, "speedup_of_llm_jax": ratios(contenders[0], each)}
        for each in contenders
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
