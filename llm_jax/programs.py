"""What a run compiles: its first state, one training step, one evaluation step; for one run or several at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, UInt

from llm_jax import cpu, data, model, ops, optim, parallel, sharding, train_step
from llm_jax.config import Config, ModelConfig
from llm_jax.config_rules import split_runs
from llm_jax.errors import InputError

# Logits that the loss takes at a time, on each device. Every chunk adds to the whole gradient of the output matrix,
# which on an accelerator costs the time of some 400 rows' products (about 300 flops for a byte moved), and on
# several CPUs is sent each time: chunks of 1000 rows and more hide it. By arithmetic, not measured.
CHUNK_ELEMENTS = 2**27

# Steps that are dispatched before the first of them is waited for: the device always has one to do, and a signal
# waits for no more than these. With more than 32, XLA's CPU client with several devices waits for ever: it has a
# thread for each, and one that waits for its turn keeps the other's partner of a sum from running.
IN_FLIGHT = 2

# It runs once, in a few hundredths of a second; at XLA's usual level small.py's takes five seconds to compile on a
# CPU, at this one 1.2.
INIT_OPTIONS = {"xla_backend_optimization_level": 1}


class Programs(NamedTuple):
    """Compiled for the mesh: the state and the batch lie on it as `sharding` says.

    Of R > 1 runs in one program (`config_rules.split_runs`) every leaf of state, batch, metrics and sums has a
    leading axis R, but for the batch of an evaluation, which is the same for all.
    """

    init: Callable[[], train_step.TrainState]
    train_step: Callable[[train_step.TrainState, data.Batch], tuple[train_step.TrainState, train_step.Metrics]]
    eval_step: Callable[[Any, data.Batch], train_step.EvalSums]
    placed: train_step.TrainState  # where each part of the state lies


def check_trainable(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError, in one line, for what only these devices and libraries can tell of a config."""
    sharding.check_batch(cfg.train.batch_size, cfg.train.accumulation_steps, mesh)
    sharding.check_model(cfg.model, cfg.seq_len, mesh)
    if sharding.splits_model(mesh) and len(split_runs(cfg)) > 1:
        raise InputError(
            "several runs in one program (train.seeds, optim.peak_lrs) each need a whole model on every device; "
            "leave mesh.fsdp, mesh.tensor, mesh.context and mesh.expert at 1, or train one run"
        )
    optim.check_name(cfg.optim.name)
    m = cfg.model
    if m.attention == "auto":
        return
    q, k = (jax.ShapeDtypeStruct((1, cfg.seq_len, n, m.head_dim), m.compute_dtype) for n in (m.n_head, m.n_kv_head))
    attend = functools.partial(
        ops.attention, softcap=m.attn_softcap, implementation=m.attention, device=mesh.devices.flat[0]
    )
    try:
        jax.eval_shape(attend, q, k, k)
    except ValueError as error:
        raise InputError(f"model.attention ({m.attention!r}): {error}; 'auto' takes what can") from None


def make_programs(cfg: Config, mesh: jax.sharding.Mesh, token_bytes: Int[np.ndarray, "V"]) -> Programs:
    """The programs of all runs of a config whose `model.vocab_size` is known."""
    runs = split_runs(cfg)
    padded_bytes = np.zeros(cfg.model.vocab_size, np.int32)
    padded_bytes[: len(token_bytes)] = token_bytes
    if sharding.splits_model(mesh):
        eval_loss = make_loss_fn(cfg.model, mesh)
    else:
        eval_loss = sharding.sum_over_rows(make_loss_fn(cfg.model, sharding.one_device(mesh)), mesh)
    eval_step = train_step.make_eval_step(eval_loss, padded_bytes)
    if len(runs) == 1:
        (run,) = runs
        init, step = _of_one_run(run, run.train.seed, None, mesh)
    else:
        init, step, eval_step = _of_several_runs(runs, eval_step, mesh)
    everywhere = sharding.replicated(mesh)
    placed = sharding.state_shardings(jax.eval_shape(init), model.param_axes(cfg.model), mesh)
    return Programs(
        jax.jit(init, out_shardings=placed, compiler_options=INIT_OPTIONS if sharding.is_cpu(mesh) else None),
        jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere), compiler_options=step_options(mesh)),
        jax.jit(eval_step, out_shardings=everywhere, compiler_options=step_options(mesh)),
        placed,
    )


def step_options(mesh: jax.sharding.Mesh) -> dict[str, bool] | None:
    """XLA's. Where most of a CPU's cores have a device of their own, each works alone."""
    if sharding.is_cpu(mesh) and mesh.size > 1 and 2 * mesh.size > cpu.cores():
        return {"xla_cpu_multi_thread_eigen": False}
    return None


def make_loss_fn(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> train_step.LossFn:
    """Next-token cross entropy of the network as it is best executed on the mesh."""
    network = model.Transformer(model.for_mesh(cfg, mesh), mesh)
    chunk_elements = None if mesh.size == 1 and sharding.is_cpu(mesh) else mesh.size * CHUNK_ELEMENTS

    def loss_fn(params: model.Params, batch: data.Batch, key: Array | None) -> tuple[Array, Array]:
        dropout = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        hidden, output, _ = network.apply({"params": params}, batch.tokens, method="hidden", **dropout)
        rows = (hidden, output, batch.targets, batch.mask)
        with jax.named_scope("lm_head"):
            if sharding.splits_model(mesh):
                elements = CHUNK_ELEMENTS
                how = dict(softcap=cfg.final_softcap, chunk_elements=elements, mesh=mesh)
                return parallel.linear_cross_entropy(*rows, **how)
            return ops.linear_cross_entropy(*rows, softcap=cfg.final_softcap, chunk_elements=chunk_elements)

    return loss_fn


def _of_one_run(
    cfg: Config, seed: int | UInt[Array, ""], rates: optim.Rates | None, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(init, step); seed and rates, which stand for the config's, may be traced."""
    num_steps = cfg.train.num_steps
    axes = model.param_axes(cfg.model)
    splits = sharding.splits_model(mesh)
    muon_mesh = mesh if sharding.is_cpu(mesh) and not splits else None  # not measured elsewhere
    optimizer = optim.make_optimizer(cfg.optim, num_steps=num_steps, axes=axes, rates=rates, mesh=muon_mesh)
    init_key, run_key = jax.random.split(jax.random.key(seed))

    def init() -> train_step.TrainState:
        params = model.init_params(cfg.model, init_key)
        return train_step.init_state(params, optimizer, average=cfg.optim.ema_decay > 0)

    # A mask of dropout is drawn for the rows of all devices at once, so that their number does not change it. And of
    # one micro-batch an accelerator may sum the gradients of some layers while it computes those of others.
    one_sum = sharding.is_cpu(mesh) or cfg.train.accumulation_steps > 1
    by_device = one_sum and not cfg.model.dropout and not splits
    step = train_step.make_train_step(
        make_loss_fn(cfg.model, sharding.one_device(mesh) if by_device else mesh),
        optimizer,
        optim.make_schedule(cfg.optim, num_steps=num_steps, rates=rates),
        accumulation_steps=cfg.train.accumulation_steps,
        run_key=run_key,
        mesh=mesh if by_device else None,
        place=functools.partial(sharding.constrain_params, axes=axes, mesh=mesh) if splits else None,
    )
    return init, train_step.with_average(step, cfg.optim.ema_decay) if cfg.optim.ema_decay else step


def _of_several_runs(
    runs: tuple[Config, ...], eval_step: Callable[..., Any], mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], ...]:
    """(init, step, eval_step) over a leading axis of runs."""
    cfg = runs[0]
    seeds = np.array([run.train.seed for run in runs], np.uint32)
    rates = optim.Rates(
        np.array([run.optim.peak_lr for run in runs], np.float32),
        np.array([run.optim.final_lr for run in runs], np.float32),
    )

    def over_runs(function: Callable[..., Any], *arguments: Any) -> Any:
        if sharding.is_cpu(mesh):  # it is slow at batched products: eight vmapped runs took 7 to 12 times one's time
            return jax.lax.map(lambda xs: function(*xs), arguments)
        return jax.vmap(function)(*arguments)

    def init() -> Any:
        return over_runs(lambda seed, rates: _of_one_run(cfg, seed, rates, mesh)[0](), seeds, rates)

    def step(state: Any, batch: Any) -> Any:
        return over_runs(
            lambda seed, rates, state, batch: _of_one_run(cfg, seed, rates, mesh)[1](state, batch),
            seeds,
            rates,
            state,
            batch,
        )

    def evaluate(params: Any, batch: data.Batch) -> Any:
        return over_runs(lambda params: eval_step(params, batch), params)

    return init, step, evaluate
