"""One optimizer step and one evaluation step: pure functions, ready for jit."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from llm_jax import sharding
from llm_jax.data import Batch

# (params, batch, dropout key; None: no dropout) -> (sum of the loss over the batch's mask, sum of the mask)
LossFn = Callable[[Any, Batch, Array | None], tuple[Float[Array, ""], Float[Array, ""]]]
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    step: Int[Array, ""]  # finished updates
    params: Any
    opt_state: Any
    ema: Any = None  # running average of the parameters, float32; None: off

    @property
    def eval_params(self) -> Any:
        """What evaluation, samples and the finished model take: the average where there is one."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), self.ema, self.params)


def init_state(params: Any, optimizer: optax.GradientTransformation, *, average: bool = False) -> TrainState:
    ema = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int,
    run_key: Array,
    mesh: jax.sharding.Mesh | None = None,
    place: Callable[[Any], Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics): one update by the gradient of sum / count of `loss_fn`.

    With accumulation_steps = A the batch is taken in A micro-batches, one after the other; sums of nats and
    of gradients are divided once, by the whole batch's count, so that uneven masks weigh as in one batch.
    With a mesh, `loss_fn` sees the rows of one device at a time, which may not matter to it (as it does to dropout);
    None: those of all, for XLA to split. `place` puts gradients where the parameters lie.
    Metrics, before the update: loss (nats per token), grad_norm (before clipping), learning_rate.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params: Any, batch: Batch, key: Array) -> Any:
        def add(total: Any, xs: tuple[Batch, Array]) -> tuple[Any, None]:
            micro_batch, i = xs
            out = grad_fn(params, micro_batch, jax.random.fold_in(key, i))
            if place is not None:
                # Else XLA for TPUs tries to move sums over devices behind the loop, and fails a check of its own.
                out = jax.lax.optimization_barrier(out)
            sums, grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, out)
            return (sums, grads if place is None else place(grads)), None

        # Rows a, a + A, ... form micro-batch a: each device keeps the rows it has.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch)
        # In float32: sums of bfloat16 gradients would lose 1 % over 64 micro-batches.
        zero_grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        zero_grads = zero_grads if place is None else place(zero_grads)
        zeros = ((jnp.zeros(()), jnp.zeros(())), zero_grads)
        return jax.lax.scan(add, zeros, (micro_batches, jnp.arange(accumulation_steps)))[0]

    def at_once(params: Any, batch: Batch, key: Array) -> Any:
        sums, grads = grad_fn(params, batch, key)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    sums_fn = sharding.sum_over_rows(at_once if accumulation_steps == 1 else accumulated, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(run_key, state.step)
        (nats, count), grads = sums_fn(state.params, batch, key)
        grads = grads if place is None else place(grads)
        count = jnp.maximum(count, 1)  # a batch with nothing to predict has loss 0, not NaN
        grads = jax.tree.map(lambda g, leaf: (g / count).astype(leaf.dtype), grads, state.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": nats / count,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return train_step


def with_average(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], decay: float
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The same step, which also keeps `state.ema`, an exponential average of the parameters after each update.

    After t updates the average is sum_i decay^(t-i) params_i / sum_i decay^(t-i) over i = 1..t: Adam's bias
    correction (Kingma and Ba 2015, section 3), so that it never holds the initial parameters.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new_state, metrics = train_step(state, batch)
        # (1 - decay) / (1 - decay^t), which is 1 at t = 1; expm1, since decay^t is near 1 for long.
        weight = (1 - decay) / -jnp.expm1(new_state.step * math.log(decay))
        ema = jax.tree.map(lambda mean, leaf: (1 - weight) * mean + weight * leaf, state.ema, new_state.params)
        return new_state._replace(ema=ema), metrics

    return step


class EvalSums(NamedTuple):
    """What evaluation adds up over batches: nats / tokens is the loss, nats / (ln 2 * bytes) bits per byte."""

    nats: Float[Array, ""]
    tokens: Float[Array, ""]
    bytes: Float[Array, ""]


def make_eval_step(loss_fn: LossFn, token_bytes: Int[np.ndarray, "V"]) -> Callable[[Any, Batch], EvalSums]:
    """(params, batch) -> EvalSums. `token_bytes`: UTF-8 bytes that each token stands for, 0 for special ones."""

    def eval_step(params: Any, batch: Batch) -> EvalSums:
        nats, tokens = loss_fn(params, batch, None)
        return EvalSums(nats, tokens, jnp.sum(jnp.asarray(token_bytes)[batch.targets] * batch.mask))

    return eval_step
