"""The training loop: the only place with logging, saving, evaluating and step arithmetic."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llm_jax import checkpoint, data, model, ops, optim, pretrained, sharding, train_step
from llm_jax.cache import cache_folder, keep_compiled_programs
from llm_jax.config import Config, ModelConfig, as_dict, freeze, load_file
from llm_jax.corpus import Corpus, prepare
from llm_jax.errors import InputError
from llm_jax.language_model import LanguageModel
from llm_jax.report import Report, plot_losses, read_metrics, say
from llm_jax.tokenizers import Tokenizer

# A continued run may change how far it goes, when it looks, and how the same numbers are computed: nothing else.
MAY_DIFFER = frozenset(
    "train.num_steps train.eval_every train.save_every train.log_every train.sample_every train.keep_checkpoints "
    "train.profile_steps train.accumulation_steps model.attention model.layer_execution model.remat "
    # Data is the same by data.content_hash, and the tokenizer by its own.
    "data.path data.tokenizer data.cache_dir mesh.data".split()
)


class Interrupted(KeyboardInterrupt):
    """A second signal came before the first one's save: nothing was saved since the last checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted before saving; the same command continues from the last checkpoint")
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state of `step` is saved, and the same call continues from it."""

    def __init__(self, signum: int, step: int, workdir: Path) -> None:
        super().__init__(f"stopped at step {step}, saved in {workdir}; the same command continues from there")
        self.signum = signum


def fit(config: ConfigDict | str | Path, *, workdir: str | Path) -> LanguageModel:
    """Trains, or continues, the run in `workdir`, and returns the model with its last parameters.

    Writes config.json, tokenizer.json, metrics.jsonl, loss.png and checkpoints/ there. The device memory of
    the model that an earlier call returned is freed: that model moves to the host's, and goes on working, but
    arrays that were taken from its `params` before are deleted.

    Args:
        config: a ConfigDict from `llm_jax.config.default()`, or the path of a config file.

    Raises:
        InputError: an impossible config or corpus, a workdir whose run was made with another config, or a loss
            that is no number any more (what was saved before stays).
        Stopped: by SIGINT or SIGTERM, after saving.
    """
    _free_last_model()
    workdir = Path(workdir)
    cfg = freeze(config if isinstance(config, ConfigDict) else load_file(str(config)))
    keep_compiled_programs(cache_folder(cfg.data.cache_dir))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices())
    sharding.check_batch(cfg.train.batch_size, cfg.train.accumulation_steps, mesh)
    optim.check_name(cfg.optim.name)
    corpus = prepare(cfg.data)
    cfg = _resolve(cfg, corpus)
    tokenizer, token_bytes = corpus.tokenizer, corpus.tokenizer.token_bytes()
    if (workdir / "config.json").exists():
        _check_same_run(*pretrained.read_run(workdir), cfg, tokenizer, workdir)
    try:
        LanguageModel(cfg, {}, tokenizer).encode_prompt(cfg.sample.prompt)
    except InputError as error:  # now, and not when the training is done
        raise InputError(f"sample.prompt ({cfg.sample.prompt!r}): {error}; or set another sample.prompt") from None
    block_size, batch_size = cfg.model.block_size, cfg.train.batch_size
    accumulation_steps = cfg.train.accumulation_steps
    batches = data.train_batches(corpus.train, block_size=block_size, batch_size=batch_size, seed=cfg.train.seed)
    # In micro-batches, as training is: what fits there fits here.
    eval_shape = dict(block_size=block_size, batch_size=batch_size // accumulation_steps)
    val_part = data.eval_batches(corpus.val, **eval_shape, max_batches=cfg.train.eval_batches * accumulation_steps)
    val_whole = data.eval_batches(corpus.val, **eval_shape)
    pretrained.write_run(workdir, cfg, tokenizer)

    total, without_embeddings = model.count_params(cfg.model)
    device = mesh.devices.flat[0]
    say(f"{total:,} parameters, {without_embeddings:,} without embeddings, on {mesh.size} x {device.device_kind}")
    say(f"{len(corpus.train):,} training tokens, {len(corpus.val):,} validation tokens")

    num_steps = cfg.train.num_steps
    init, train_fn, eval_fn = make_programs(cfg, mesh, token_bytes)
    tokens_per_step = batch_size * block_size
    put = functools.partial(jax.device_put, device=sharding.split_batch(mesh))
    language_model = None
    with checkpoint.open_checkpoints(workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as checkpoints:
        state = _restore_or_init(checkpoints, init, mesh)
        first_step = int(state.step)
        if first_step >= num_steps and any("val_loss_full" in line for line in read_metrics(workdir)):
            say(f"already trained for {first_step} steps; a larger train.num_steps continues it")
            return _remember(LanguageModel(cfg, state.eval_params, tokenizer))
        if first_step:
            say(f"continues after step {first_step}")
        try:
            with Report(workdir, first_step=first_step, num_steps=num_steps) as report:
                clock = _Clock(report.seconds_before, first_step)
                profile_start = min(first_step + 11, num_steps)
                profiled = range(profile_start, profile_start + cfg.train.profile_steps)
                with _stop_signals() as stop, contextlib.ExitStack() as trace:
                    for step in range(first_step + 1, num_steps + 1):
                        due = functools.partial(_is_due, step, num_steps)
                        if profiled and step == profiled[0]:
                            trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
                        state, metrics = train_fn(state, put(batches[step - 1]))
                        if step == first_step + 1 or (profiled and step == profiled[-1]):
                            jax.block_until_ready(metrics)
                            trace.close()
                        stopping = stop.signum

                        if due(cfg.train.log_every):
                            line = {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
                            line |= clock.read(step, tokens_per_step)
                            _check_finite(line, step)
                            report.log(step, line)
                            report.progress(step, line)
                        val_loss = None
                        if due(cfg.train.eval_every) or due(cfg.train.save_every):
                            val_loss, bits_per_byte = _evaluate(eval_fn, state.eval_params, map(put, val_part))
                            _check_finite({"val_loss": val_loss}, step)
                            report.log(step, {"val_loss": val_loss, "bits_per_byte": bits_per_byte})
                            say(f"step {step}: val_loss {val_loss:.4f}, {bits_per_byte:.4f} bits per byte")
                            plot_losses(workdir)
                        if due(cfg.train.save_every) or stopping:
                            checkpoint.save(checkpoints, step, _saved(state), val_loss=val_loss)
                        if stopping:
                            checkpoints.wait_until_finished()
                            raise Stopped(stopping, step, workdir)
                        if due(cfg.train.sample_every) and step < num_steps:
                            _print_sample(LanguageModel(cfg, state.eval_params, tokenizer))
                        if step == first_step + 1 or val_loss is not None or due(cfg.train.sample_every):
                            clock.restart(step)  # compiling, evaluating and sampling are not training speed
                if stop.signum:  # it came while the last step was evaluated and saved
                    raise Stopped(stop.signum, num_steps, workdir)

                val_loss, bits_per_byte = _evaluate(eval_fn, state.eval_params, map(put, val_whole))
                last_step = max(first_step, num_steps)  # a run may be told to end before the step it has reached
                report.log(last_step, {"val_loss_full": val_loss, "bits_per_byte_full": bits_per_byte})
                say(f"whole validation split: val_loss {val_loss:.4f}, {bits_per_byte:.4f} bits per byte")
                language_model = LanguageModel(cfg, state.eval_params, tokenizer)
                _print_sample(language_model)
        except BaseException:
            # A notebook keeps an error's traceback, and with it this frame: its buffers would outlive it.
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise
    return _remember(language_model)


def _resolve(cfg: Config, corpus: Corpus) -> Config:
    """Fills in what the corpus decides."""
    needed, vocab_size = corpus.tokenizer.vocab_size, cfg.model.vocab_size
    if vocab_size is not None and vocab_size < needed:
        raise InputError(f"model.vocab_size ({vocab_size}) must be at least the tokenizer's ({needed}); leave it out")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=vocab_size or needed),
        data=dataclasses.replace(cfg.data, content_hash=corpus.content_hash),
    )


def _check_same_run(
    recorded: Config, recorded_tokenizer: Tokenizer, cfg: Config, tokenizer: Tokenizer, workdir: Path
) -> None:
    old, new = (
        {f"{group}.{name}": value for group, values in as_dict(c).items() for name, value in values.items()}
        for c in (recorded, cfg)
    )
    may_differ = MAY_DIFFER - ({"train.accumulation_steps"} if cfg.model.dropout else set())  # a mask a micro-batch
    changed = [key for key in new if old[key] != new[key] and key not in may_differ]
    if tokenizer.fingerprint() != recorded_tokenizer.fingerprint():
        if cfg.data.tokenizer == recorded.data.tokenizer:
            raise InputError(
                f"{workdir} holds a run with another tokenizer than data.tokenizer ({cfg.data.tokenizer!r}) gives "
                "now; give the same one, such as the run's own tokenizer.json, or choose another workdir"
            )
        changed.append("data.tokenizer")
    if changed:
        differences = ", ".join(f"{key} {old[key]!r} there and {new[key]!r} here" for key in changed)
        raise InputError(f"{workdir} holds a run with another config: {differences}; choose another workdir")


# Logits that the loss takes at a time, on each device. Every chunk adds to the whole gradient of the output matrix,
# which on an accelerator costs the time of some 400 rows' products (about 300 flops for a byte moved), and on
# several CPUs is sent each time: chunks of 1000 rows and more hide it. By arithmetic, not measured.
CHUNK_ELEMENTS = 2**27


def _loss_fn(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> train_step.LossFn:
    """Next-token cross entropy of the network as it is best executed on the mesh."""
    network = model.Transformer(model.for_mesh(cfg, mesh))
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    chunk_elements = None if one_cpu else mesh.size * CHUNK_ELEMENTS

    def loss_fn(params: model.Params, batch: data.Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        dropout = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        hidden, output, _ = network.apply({"params": params}, batch.tokens, method="hidden", **dropout)
        return ops.linear_cross_entropy(
            hidden, output, batch.targets, batch.mask, softcap=cfg.final_softcap, chunk_elements=chunk_elements
        )

    return loss_fn


def make_programs(cfg: Config, mesh: jax.sharding.Mesh, token_bytes: np.ndarray) -> tuple[Callable[..., Any], ...]:
    """(init, train_step, eval_step), compiled for the mesh: the state on every device, the batch split."""
    axes = model.param_axes(cfg.model)
    optimizer = optim.make_optimizer(cfg.optim, num_steps=cfg.train.num_steps, axes=axes)
    schedule = optim.make_schedule(cfg.optim, num_steps=cfg.train.num_steps)
    loss_fn = _loss_fn(cfg.model, mesh)
    init_key, run_key = jax.random.split(jax.random.key(cfg.train.seed))

    def init() -> train_step.TrainState:
        return train_step.init_state(
            model.init_params(cfg.model, init_key), optimizer, average=cfg.optim.ema_decay > 0
        )

    train_fn = train_step.make_train_step(
        loss_fn, optimizer, schedule, accumulation_steps=cfg.train.accumulation_steps, run_key=run_key
    )
    if cfg.optim.ema_decay:
        train_fn = train_step.with_average(train_fn, cfg.optim.ema_decay)
    padded_bytes = np.zeros(cfg.model.vocab_size, np.int32)
    padded_bytes[: len(token_bytes)] = token_bytes
    everywhere = sharding.replicated(mesh)
    return (
        jax.jit(init, out_shardings=everywhere),
        jax.jit(train_fn, donate_argnums=0, out_shardings=everywhere),
        jax.jit(train_step.make_eval_step(loss_fn, padded_bytes), out_shardings=everywhere),
    )


def _restore_or_init(
    checkpoints: Any, init: Callable[[], train_step.TrainState], mesh: jax.sharding.Mesh
) -> train_step.TrainState:
    if not checkpoints.all_steps():
        return init()
    everywhere = sharding.replicated(mesh)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), jax.eval_shape(init)
    )
    step = checkpoint.pick_step(checkpoints, "last")
    trees = checkpoint.restore(checkpoints, step, _saved(like))
    return train_step.TrainState(jax.device_put(np.int32(step), everywhere), **trees)


def _saved(state: train_step.TrainState) -> dict[str, Any]:
    """The trees of a checkpoint: all of the state but the step, which is the checkpoint's number."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


def _evaluate(
    eval_fn: Callable[[Any, Any], train_step.EvalSums], params: Any, batches: Iterable[Any]
) -> tuple[float, float]:
    """(nats per token, bits per byte) over all batches."""
    sums = jax.device_get([eval_fn(params, batch) for batch in batches])
    nats, tokens, num_bytes = (math.fsum(float(value) for value in column) for column in zip(*sums, strict=True))
    return nats / tokens, nats / math.log(2) / max(num_bytes, 1)


def _check_finite(values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"{name} is {value} at step {step}: training has diverged, and only what was saved before is kept; "
                "lower optim.peak_lr, raise optim.warmup_steps or set optim.grad_clip, in another workdir"
            )


def _is_due(step: int, num_steps: int, every: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _print_sample(language_model: LanguageModel) -> None:
    request = dataclasses.asdict(language_model.config.sample)
    print(language_model.generate(request.pop("prompt"), **request), flush=True)


class _Clock:
    """Wall time of the run, earlier parts included, and training speed since the last read or restart."""

    def __init__(self, seconds_before: float, step: int) -> None:
        self._run_start = time.monotonic() - seconds_before
        self.restart(step)

    def restart(self, step: int) -> None:
        self._since, self._step = time.monotonic(), step

    def read(self, step: int, tokens_per_step: int) -> dict[str, float]:
        tokens_per_second = (step - self._step) * tokens_per_step / (time.monotonic() - self._since)
        self.restart(step)
        return {"tokens_per_second": tokens_per_second, "wall_seconds": self._since - self._run_start}


class _Stop:
    signum: int | None = None


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes the first SIGINT or SIGTERM, for the loop to act on between two steps; a second one interrupts."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # only there does Python allow handlers
        yield stop
        return

    def note(signum: int, frame: Any) -> None:
        if stop.signum is not None:
            raise Interrupted(signum)
        stop.signum = signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


_last_model: weakref.ref[LanguageModel] | None = None


def _remember(language_model: LanguageModel) -> LanguageModel:
    global _last_model
    _last_model = weakref.ref(language_model)
    return language_model


def _free_last_model() -> None:
    """Moves the parameters that the last `fit` returned to host memory, if they are still in use."""
    last = _last_model and _last_model()
    if last is not None:
        on_device, last.params = last.params, jax.device_get(last.params)
        jax.tree.map(lambda leaf: isinstance(leaf, jax.Array) and leaf.delete(), on_device)
