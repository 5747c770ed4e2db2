"""The network's products on a mesh that splits it: what each device computes, and what is sent between them.

Written out, so that what is sent is known: a weight that is split along "fsdp" is gathered for a product, and
again for its gradient, which is summed and split again at once; along "tensor" each device has its own columns or
rows, and the sums of products of rows are sent (Shoeybi et al. 2019, "Megatron-LM"); along "context" the keys and
values of a text are gathered; along "expert" tokens are, and each device's experts take theirs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from llm_jax import ops, sharding
from llm_jax.sharding import ROWS, SPLIT, param_spec

TOKENS = P(ROWS, "context")
ACTIVATIONS = P(ROWS, "context", None)
PRODUCT = "product"  # what remat="dots" keeps: products with weights, not those of attention


def constrain(x: Float[Array, "B T D"], mesh: Mesh) -> Float[Array, "B T D"]:
    """x with each device's own texts, or parts of them, on it."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ACTIVATIONS))


def _shard_map(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gathered(weight: Array, spec: P, mesh: Mesh) -> Array:
    """Whole along "fsdp"."""
    if "fsdp" not in spec or mesh.shape["fsdp"] == 1:
        return weight
    return _all_gather(weight, tuple(spec).index("fsdp"), mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(weight, axis, mesh):
    for groups in reversed(_stages(mesh)) if sharding.torus_axes(mesh) > 2 else [None]:
        weight = jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
    return weight


def _scatter(axis, mesh, _, gradient):
    return (_sum_scattered(gradient, axis, mesh).astype(gradient.dtype),)


_all_gather.defvjp(lambda weight, axis, mesh: (_all_gather(weight, axis, mesh), None), _scatter)


def _sum_scattered(gradient: Array, axis: int, mesh: Mesh) -> Float32[Array, "..."]:
    """The sum over "fsdp", of which each device keeps its part."""
    gradient = gradient.astype(jnp.float32)  # sums of bfloat16 would lose digits
    for groups in _stages(mesh):
        gradient = jax.lax.psum_scatter(
            gradient, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=groups
        )
    return gradient


def _stages(mesh: Mesh) -> list[list[list[int]] | None]:
    """Groups of places along "fsdp" in which a sum is split, one set of groups after the other.

    Over a whole torus at once XLA for TPUs (libtpu 0.0.42) splits no sum (v6e:4x4, v6e:16x16, v5p:2x2x2), and if it
    has three axes it gathers nothing either (v5p:4x4x4): it sums, and each device has all of it, for twice the bytes.
    Along one axis, before or after the others, it does both.
    """
    lines, length = sharding.lines(mesh)
    if lines == 1:
        return [None]
    places = np.arange(lines * length).reshape(lines, length)
    return [places.T.tolist(), places.tolist()]


def _sum(x: Array, names: tuple[str, ...], mesh: Mesh) -> Array:
    names = tuple(name for name in names if mesh.shape[name] > 1)
    return jax.lax.psum(x, names) if names else x


# --- Products with a matrix --------------------------------------------------------------------------


class _How(NamedTuple):
    """What of a product is known when it is compiled."""

    mesh: Mesh
    letters: tuple[str, ...]
    inputs: int
    keeps_apart: bool

    @property
    def weights(self) -> tuple[P, ...]:
        return tuple(map(param_spec, self.letters))

    @property
    def x(self) -> P:
        return _rows(self.letters[0][: self.inputs])

    @property
    def ys(self) -> tuple[P, ...]:
        return tuple(_rows(letters[self.inputs :]) for letters in self.letters)


def _rows(letters: str) -> P:
    """Where activations lie whose last axes these are: whole along "fsdp"."""
    return P(*TOKENS, *(SPLIT.get(letter) if letter != "D" else None for letter in letters))


def linear(
    x: Float[Array, "B T ..."],
    weights: Sequence[Float[Array, "..."]],
    *,
    letters: Sequence[str],
    inputs: int,
    mesh: Mesh,
    keeps_apart: bool = False,
) -> tuple[Float[Array, "B T ..."], ...]:
    """The products of x's last axes with each weight's first, `inputs` of them; all as `param_spec` splits them.

    Args:
        letters: of each weight's axes.
        keeps_apart: the gradient gathers the weights again, where a compiler sees both passes and would keep them.
    """
    return _linear(x, tuple(weights), _How(mesh, tuple(letters), inputs, keeps_apart))


def _whole(weight: Array, spec: P, how: _How) -> tuple[Array, P]:
    """The matrix that x is multiplied by, and how its axes are split before it is gathered.

    Of two axes: of a weight with heads, whose last axis is split, XLA for TPUs sums the whole gradient everywhere.
    """
    axes = P(*("fsdp" if "fsdp" in part else None for part in (spec[: how.inputs], spec[how.inputs :])))
    matrix = weight.reshape(math.prod(weight.shape[: how.inputs]), -1)
    return _gathered(matrix, axes, how.mesh), axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, weights, how):
    def product(x, weight, spec):
        matrix, axes = _whole(weight, spec, how)
        outputs = weight.shape[how.inputs :] if axes[1] is None else (matrix.shape[1],)
        y = ops.linear(x.reshape(*x.shape[:2], -1), matrix).reshape(*x.shape[:2], *outputs)
        return _sum(y, ("tensor",), how.mesh) if "tensor" in how.x else y

    def products(x, weights):
        return tuple(product(x, weight, spec) for weight, spec in zip(weights, how.weights, strict=True))

    return _shard_map(products, how.mesh, (how.x, how.weights), how.ys)(x, weights)


def _linear_forward(x, weights, how):
    return _linear(x, weights, how), (x, weights)


def _linear_backward(how, residuals, d_ys):
    def gradient(x, weight, spec, d_y):
        matrix, axes = _whole(weight, spec, how)
        _, pull = jax.vjp(ops.linear, x.reshape(*x.shape[:2], -1), matrix)
        d_x, d_matrix = pull(d_y.reshape(*x.shape[:2], -1))
        d_weight = _summed_gradient(d_matrix, axes, how.mesh).reshape(weight.shape)
        return d_x.reshape(x.shape), d_weight.astype(weight.dtype)

    def gradients(x, weights, d_ys):
        if how.keeps_apart:
            weights, d_ys = jax.lax.optimization_barrier((weights, d_ys))
        each = zip(weights, how.weights, d_ys, strict=True)
        d_xs, d_weights = zip(*(gradient(x, *one) for one in each), strict=True)
        d_x = functools.reduce(jnp.add, d_xs)
        return _sum(d_x, ("tensor",), how.mesh) if "tensor" in how.ys[0] else d_x, d_weights

    specs = (how.x, how.weights)
    return _shard_map(gradients, how.mesh, (*specs, how.ys), specs)(*residuals, d_ys)


_linear.defvjp(_linear_forward, _linear_backward)


def _summed_gradient(gradient: Array, spec: P, mesh: Mesh) -> Float32[Array, "..."]:
    """Of a whole weight by this device's rows -> by all rows, split as the weight is."""
    if "fsdp" in spec and mesh.shape["fsdp"] > 1:
        gradient = _sum_scattered(gradient, tuple(spec).index("fsdp"), mesh)
    return _sum(gradient.astype(jnp.float32), ("data", "expert", "context"), mesh)


# --- Attention ---------------------------------------------------------------------------------------


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    mesh: Mesh,
    **how: Any,
) -> Float[Array, "B T N H"]:
    """`ops.attention`, causal: each device its own texts, heads, and part of each text, to keys of all before it."""
    attend = functools.partial(ops.attention, device=mesh.devices.flat[0], **how)
    if mesh.size == 1:
        return attend(q, k, v)
    parts = mesh.shape["context"]

    def on_device(q, k, v):
        if parts == 1:
            return attend(q, k, v)
        k, v = (jax.lax.all_gather(each, "context", axis=1, tiled=True) for each in (k, v))
        time = q.shape[1]

        def part(i: int) -> Callable[..., Array]:
            return lambda q, k, v: attend(q, k[:, : (i + 1) * time], v[:, : (i + 1) * time])

        return jax.lax.switch(jax.lax.axis_index("context"), [part(i) for i in range(parts)], q, k, v)

    heads = P(ROWS, "context", "tensor", None)
    return _shard_map(on_device, mesh, (heads,) * 3, heads)(q, k, v)


# --- Tables of the vocabulary --------------------------------------------------------------------------


TABLE = param_spec("VD")


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, mesh: Mesh) -> Float[Array, "B T D"]:
    """table[tokens]. Along "fsdp" either the table is gathered, or, of fewer tokens than it has rows, the tokens are,
    and each device looks them all up in its part of the width.
    """
    parts = {axis: mesh.shape[axis] for axis in sharding.AXES}
    own_tokens = tokens.size // math.prod(parts[axis] for axis in (*ROWS, "context"))
    return _embed(table, tokens, mesh, parts["fsdp"] > 1 and own_tokens < len(table) // parts["tensor"])


def _places(rows: int, tokens: Int[Array, "B T"], mesh: Mesh) -> Int[Array, "B T"]:
    """Of tokens in this device's rows of the table; behind them, of those that are not there."""
    if mesh.shape["tensor"] == 1:
        return tokens
    places = tokens - jax.lax.axis_index("tensor") * rows
    return jnp.where((places >= 0) & (places < rows), places, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table, tokens, mesh, sends_tokens):
    def look_up(table, tokens):
        if sends_tokens:
            tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        else:
            table = _gathered(table, TABLE, mesh)
        places = _places(len(table), tokens, mesh)
        found = _sum(table.at[places].get(mode="fill", fill_value=0), ("tensor",), mesh)
        # All rows of the group and a part of the width -> these rows, whole.
        return jax.lax.all_to_all(found, "fsdp", 0, 2, tiled=True) if sends_tokens else found

    return _shard_map(look_up, mesh, (TABLE, TOKENS), ACTIVATIONS)(table, tokens)


def _embed_forward(table, tokens, mesh, sends_tokens):
    return _embed(table, tokens, mesh, sends_tokens), (table, tokens)


def _embed_backward(mesh, sends_tokens, residuals, d_x):
    def gradient(table, tokens, d_x):
        if sends_tokens:
            tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
            d_x = jax.lax.all_to_all(d_x, "fsdp", 2, 0, tiled=True)
        d_table = jnp.zeros((len(table), d_x.shape[-1]), jnp.float32)
        d_table = d_table.at[_places(len(table), tokens, mesh)].add(d_x.astype(jnp.float32), mode="drop")
        spec = P() if sends_tokens else TABLE  # the group's rows are all in it
        return _summed_gradient(d_table, spec, mesh).astype(table.dtype)

    return _shard_map(gradient, mesh, (TABLE, TOKENS, ACTIVATIONS), TABLE)(*residuals, d_x), None


_embed.defvjp(_embed_forward, _embed_backward)


class _Loss(NamedTuple):
    """What of the loss is known when it is compiled."""

    softcap: float | None
    limit: int  # chunk_elements
    mesh: Mesh

    @property
    def vocab_axis(self) -> str | None:
        return "tensor" if self.mesh.shape["tensor"] > 1 else None

    def summed(self, sums: Any) -> Any:
        """Of the rows of all devices."""
        return jax.tree.map(lambda x: _sum(x, (*ROWS, "context"), self.mesh), sums)


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    softcap: float | None,
    chunk_elements: int,
    mesh: Mesh,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`ops.linear_cross_entropy`, summed over all devices, once. Differentiable in hidden and weight.

    Args:
        chunk_elements: logits that a device takes at a time, and numbers of the gradient of its weight, which is
            never whole.
    """
    return _cross_entropy(hidden, weight, targets, mask, _Loss(softcap, chunk_elements, mesh))


_LOSS_SPECS = (ACTIVATIONS, TABLE, TOKENS, TOKENS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, weight, targets, mask, how):
    def sums(hidden, weight, targets, mask):
        whole = _gathered(weight, TABLE, how.mesh)
        options = dict(softcap=how.softcap, chunk_elements=how.limit, vocab_axis=how.vocab_axis)
        return how.summed(ops.linear_cross_entropy(hidden, whole, targets, mask, **options))

    return _shard_map(sums, how.mesh, _LOSS_SPECS, (P(), P()))(hidden, weight, targets, mask)


def _cross_entropy_forward(hidden, weight, targets, mask, how):
    """The sums, and the gradients of the first: as in `ops.linear_cross_entropy`, while a chunk's logits are there.

    The logits' gradient is kept for as many rows as twice the width: in bfloat16 it takes no more than the weight's
    whole gradient would in float32, of which each device makes but a part at a time, and keeps its own of the sum.
    """

    def sums_and_gradients(hidden, weight, targets, mask):
        whole = _gathered(weight, TABLE, how.mesh)
        vocab, width = whole.shape
        rows, at_a_time = targets.size, max(1, how.limit // vocab)
        groups = math.ceil(rows / max(2 * width, at_a_time))
        chunks = math.ceil(rows / groups / at_a_time)

        def split(x):
            flat = x.reshape(rows, *x.shape[2:])
            filled = jnp.pad(flat, [(0, -rows % (groups * chunks))] + [(0, 0)] * (flat.ndim - 1))
            return filled.reshape(groups, chunks, -1, *flat.shape[1:])

        def add_group(totals, xs):
            nats, d_logits, d_hidden = jax.lax.map(lambda chunk: _of_chunk(*chunk, whole, how), xs)
            d_weight = _product_over_rows(xs[0].reshape(-1, width), d_logits.reshape(-1, vocab), how)
            return jax.tree.map(jnp.add, totals, (jnp.sum(nats), d_weight)), d_hidden

        zeros = (jnp.zeros(()), jnp.zeros((weight.shape[1], vocab)))
        (nats, d_weight), d_hidden = jax.lax.scan(add_group, zeros, (split(hidden), split(targets), split(mask)))
        d_hidden = d_hidden.reshape(-1, width)[:rows].reshape(hidden.shape)
        d_weight = _sum(d_weight, ("data", "expert", "context"), how.mesh).T.astype(weight.dtype)
        sums = how.summed((nats, jnp.sum(mask.astype(jnp.float32))))
        return sums, (_sum(d_hidden, ("tensor",), how.mesh), d_weight)

    specs = ((P(), P()), (ACTIVATIONS, TABLE))
    return _shard_map(sums_and_gradients, how.mesh, _LOSS_SPECS, specs)(hidden, weight, targets, mask)


def _of_chunk(rows, targets, mask, weight, how):
    """(nats, their gradient with respect to the logits and to the rows); of this device's part of the vocabulary."""

    def nats(logits):
        if how.softcap is not None:
            logits = how.softcap * jnp.tanh(logits / how.softcap)
        return ops.cross_entropy(logits, targets, mask, vocab_axis=how.vocab_axis)[0]

    found, pull = jax.vjp(nats, ops.einsum_f32("nd,vd->nv", rows, weight))
    # All devices of "tensor" have the same nats: of their sum, which is what `pull` takes, each has its part.
    d_logits = pull(jnp.float32(1 / how.mesh.shape["tensor"]))[0].astype(rows.dtype)
    return found, d_logits, ops.einsum_f32("nv,vd->nd", d_logits, weight).astype(rows.dtype)


def _product_over_rows(
    hidden: Float[Array, "M D"], d_logits: Float[Array, "M V"], how: _Loss
) -> Float32[Array, "P V"]:
    """hidden^T d_logits, summed over "fsdp": this device's part of the width, some channels of each at a time."""
    parts, (width, vocab) = how.mesh.shape["fsdp"], (hidden.shape[1], d_logits.shape[1])
    own = width // parts
    fits = (n for n in range(1, own + 1) if own % n == 0 and width // n * vocab <= how.limit)
    steps = next(fits, own)
    by_step = jnp.moveaxis(hidden.reshape(-1, parts, steps, own // steps), 2, 0)

    def step(channels):
        product = ops.einsum_f32("mc,mv->cv", channels.reshape(len(channels), -1), d_logits)
        return _sum_scattered(product, 0, how.mesh) if parts > 1 else product

    return jax.lax.map(step, by_step).reshape(own, vocab)


def _cross_entropy_backward(how, gradients, d_sums):
    d_hidden, d_weight = ((d_sums[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_weight, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# --- Experts -----------------------------------------------------------------------------------------


def experts(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    weights: dict[str, Float[Array, "E ..."]],
    mlp: Callable[..., Array],
    *,
    k: int,
    normalize: bool,
    mesh: Mesh,
) -> Float[Array, "B T D"]:
    """`ops.mix_experts`, each expert on one device of "expert", to which the tokens of the others are sent: all of
    them, since any number may choose the same expert.

    Args:
        weights: "up" and "gate", [E, D, F], and "down", [E, F, D].
    """
    specs = {name: param_spec("EFD" if name == "down" else "EDF") for name in weights}

    # Weights are gathered again for the gradient, instead of being kept whole.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
    def on_device(x, router, weights):
        weights = {name: _gathered(weight, specs[name], mesh) for name, weight in weights.items()}
        if mesh.shape["expert"] > 1:
            x = jax.lax.all_gather(x, "expert", axis=0, tiled=True)
        rows, count = x.reshape(-1, x.shape[-1]), len(weights["up"])
        part = dict(first=jax.lax.axis_index("expert") * count, count=count) if mesh.shape["expert"] > 1 else {}
        y = ops.mix_experts(rows, ops.linear(rows, router), weights, mlp, k=k, normalize=normalize, **part)
        y = _sum(y.reshape(x.shape), ("tensor",), mesh)
        if mesh.shape["expert"] > 1:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return y.astype(x.dtype)

    return _shard_map(on_device, mesh, (ACTIVATIONS, P(), specs), ACTIVATIONS)(x, router, weights)
