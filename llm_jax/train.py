"""The training loop: the only place with logging, saving, evaluating and step arithmetic."""

import contextlib
import dataclasses
import functools
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from llm_jax import data, hosts, init_from, model, run_folder, sharding, train_step
from llm_jax.auto_fit import choose_micro_batch
from llm_jax.cache import cache_folder, keep_compiled_programs
from llm_jax.config import Config, as_dict
from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze
from llm_jax.corpus import Corpus, prepare
from llm_jax.errors import InputError
from llm_jax.language_model import LanguageModel
from llm_jax.programs import IN_FLIGHT, Programs, check_trainable, make_programs
from llm_jax.progress import say, silence_standard_output
from llm_jax.report import Report, mean_and_deviation, plot_losses, read_metrics
from llm_jax.runs import Runs
from llm_jax.stopping import Stopped, stop_signals
from llm_jax.tokenizers import Tokenizer

# Data is the same by data.content_hash, and the tokenizer by its own.
SAME_BY_CONTENT = frozenset("data.source data.path data.tokenizer data.cache_dir".split())
# A continued run may change how far it goes, when it looks, and how the same numbers are computed: nothing else.
MAY_DIFFER = SAME_BY_CONTENT | frozenset(
    "train.num_steps train.eval_every train.save_every train.log_every train.sample_every train.keep_checkpoints "
    "train.profile_steps train.accumulation_steps train.micro_batch "
    "model.attention model.layer_execution model.remat".split()
    + [f"mesh.{axis}" for axis in (*sharding.AXES, "num_slices")]
)
DECIDED_BY_CORPUS = frozenset({"model.vocab_size", "data.content_hash"})

BATCHES_AHEAD = 2  # cut and on the device before their step is due


@hosts.noticing_loss()
def fit(config: ConfigDict | str | Path, *, workdir: str | Path) -> LanguageModel:
    """Trains, or continues, the run in `workdir`, and returns the model with its last parameters.

    Writes config.json, tokenizer.json, metrics.jsonl, loss.png and checkpoints/ there. With `train.seeds` or
    `optim.peak_lrs` it trains several runs as one program: each gets a folder run_<n>/ that loads like any run's,
    and the one with the lowest validation loss is returned.

    Several processes of jax.distributed train as one: all call this, with the same config and a workdir that all of
    them see; the first writes what a run has once, all write the checkpoints, and each returns the model. One that
    is too large for a single device is returned as it lies on all of them.

    The device memory of the model that an earlier call returned is freed: that model moves to the host's, and goes
    on working, but arrays that were taken from its `params` before are deleted.

    Args:
        config: a ConfigDict from `llm_jax.config.default()`, or the path of a config file.

    Raises:
        InputError: an impossible config or corpus, a workdir whose run was made with another config, or a loss
            that is no number any more (what was saved before stays).
        Stopped: by SIGINT or SIGTERM, to this process or another of the run, after saving.
        PeerLost: another process of the run is gone; the same call in all of them goes on from the last checkpoint.
    """
    _free_last_model()
    workdir = Path(os.path.expanduser(workdir))
    cfg = freeze(config if isinstance(config, ConfigDict) else load_file(str(config)))
    keep_compiled_programs(cache_folder(cfg.data.cache_dir))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices())
    start = init_from.find(cfg, workdir)
    cfg = start.config
    check_trainable(cfg, mesh)
    _check_same_run(workdir, cfg, None)  # what is known before the corpus is read
    hosts.check_same({key: str(value) for key, value in _flat(cfg).items() if key not in SAME_BY_CONTENT})
    corpus = prepare(cfg.data, start.tokenizer)
    cfg = _resolve(cfg, corpus)
    sharding.check_model(cfg.model, cfg.seq_len, mesh)  # of a vocabulary that is known now
    cfg = choose_micro_batch(cfg, mesh)
    tokenizer = corpus.tokenizer
    hosts.check_same({"corpus": corpus.content_hash, "tokenizer": tokenizer.fingerprint(), "jax": jax.__version__})
    try:
        LanguageModel(cfg, {}, tokenizer).encode_prompt(cfg.sample.prompt)
    except InputError as error:  # now, and not when the training is done
        raise InputError(f"sample.prompt ({cfg.sample.prompt!r}): {error}; or set another sample.prompt") from None
    runs = Runs(cfg, workdir)
    batches = _Batches(cfg, corpus, runs, mesh)
    run_folder.make_folder(workdir)
    total, without_embeddings = model.count_params(cfg.model)
    device = mesh.devices.flat[0]
    say(f"{total:,} parameters, {without_embeddings:,} without embeddings, on {mesh.size} x {device.device_kind}")
    say(f"{len(corpus.train):,} training tokens, {len(corpus.val):,} validation tokens")
    if runs.stacked:
        say(f"{len(runs)} runs in one program, in {runs.folders[0]} to {runs.folders[-1].name}")

    programs = make_programs(cfg, mesh, tokenizer.token_bytes())
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            stack.enter_context(run_folder.only_here(workdir))
        _check_same_run(workdir, cfg, tokenizer)
        if hosts.is_first():
            run_folder.write_run(workdir, cfg, tokenizer)
            runs.write(tokenizer)
        hosts.check_shared(workdir)
        stack.enter_context(runs.open_checkpoints())
        stack.enter_context(hosts.noticing_loss())  # before the checkpoints are closed, which would wait for the lost
        last_step = runs.last_step()
        saved_step = hosts.agree(-1 if last_step is None else last_step)  # -1: none
        first_step = max(saved_step, 0)
        if first_step < cfg.train.num_steps:
            programs = _compile_ahead(programs, batches, stack)
        if saved_step < 0:
            state = programs.init()
            if start.source is not None:
                placed = programs.placed.params
                state = state._replace(params=runs.all_from(start.params(placed), placed))
        else:
            state = runs.restore(saved_step, jax.eval_shape(programs.init), programs.placed)
        is_done = any("val_loss_full" in line for line in read_metrics(workdir))
        if first_step < cfg.train.num_steps or not hosts.agree(is_done):
            if first_step:
                say(f"continues after step {first_step}")
            state = _Loop(cfg, runs, programs, batches, tokenizer, mesh, workdir).run(state, first_step)
        else:
            say(f"already trained for {first_step} steps; a larger train.num_steps continues it")
    best = hosts.agree(_best_run(runs, workdir))
    params = runs.part(state.eval_params, best)
    whole = hosts.everywhere(params, mesh)
    return _remember(LanguageModel(runs.configs[best], params if whole is None else whole, tokenizer))


def _compile_ahead(programs: Programs, batches: "_Batches", stack: contextlib.ExitStack) -> Programs:
    """Compiles the training step in a thread, while the first state is compiled, made or read.

    It is traced in this one: jax's settings by context, such as a default dtype, are a thread's own.
    """
    state = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        jax.eval_shape(programs.init),
        programs.placed,
    )
    lowered = programs.train_step.lower(state, batches.train(1))
    step = stack.enter_context(ThreadPoolExecutor(1)).submit(lowered.compile)
    return programs._replace(train_step=lambda state, batch: step.result()(state, batch))


def _best_run(runs: Runs, workdir: Path) -> int:
    """The run with the lowest loss over the whole validation split."""
    losses = [math.inf] * len(runs)
    for line in read_metrics(workdir):
        if "val_loss_full" in line:
            run = next(n for n, label in enumerate(runs.labels) if label.items() <= line.items())
            losses[run] = line["val_loss_full"]
    return losses.index(min(losses))


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


def _flat(cfg: Config) -> dict[str, Any]:
    return {f"{group}.{name}": value for group, values in as_dict(cfg).items() for name, value in values.items()}


def _check_same_run(workdir: Path, cfg: Config, tokenizer: Tokenizer | None) -> None:
    """Raises InputError if the folder holds another run; without a tokenizer, by what the corpus does not decide."""
    if not (workdir / "config.json").exists():
        return
    recorded, recorded_tokenizer = run_folder.read_run(workdir)
    old, new = _flat(recorded), _flat(cfg)
    drawn_by = {"train.accumulation_steps", "train.micro_batch"} if cfg.model.dropout else set()  # a mask for each
    may_differ = MAY_DIFFER - drawn_by
    if tokenizer is None:
        may_differ |= {key for key in DECIDED_BY_CORPUS if new[key] is None}
    changed = [key for key in new if old[key] != new[key] and key not in may_differ]
    if tokenizer and tokenizer.fingerprint() != recorded_tokenizer.fingerprint():
        if cfg.data.tokenizer == recorded.data.tokenizer:
            raise InputError(
                f"{workdir} holds a run with another tokenizer than data.tokenizer ({cfg.data.tokenizer!r}) gives "
                "now; give the same one, such as the run's own tokenizer.json, or choose another workdir"
            )
        changed.append("data.tokenizer")
    if changed:
        differences = ", ".join(f"{key} {old[key]!r} there and {new[key]!r} here" for key in changed)
        raise InputError(f"{workdir} holds a run with another config: {differences}; choose another workdir")


class _Batches:
    """What the programs take, by step, on the devices of the mesh."""

    def __init__(self, cfg: Config, corpus: Corpus, runs: Runs, mesh: jax.sharding.Mesh) -> None:
        self._place = functools.partial(hosts.place_batch, mesh=mesh)
        self._batch_size = cfg.train.batch_size
        shape = self._shape(self._batch_size, cfg, mesh)
        of_seed = {
            seed: data.train_batches(corpus.train, **shape, seed=seed)
            for seed in {run.train.seed for run in runs.configs}
        }
        self._of_runs = [of_seed[run.train.seed] for run in runs.configs]
        # In micro-batches, as training is: what fits there fits here.
        parts = cfg.train.accumulation_steps
        self._val_batch_size = self._batch_size // parts
        shape = self._shape(self._val_batch_size, cfg, mesh)
        self._val_part = data.eval_batches(corpus.val, **shape, max_batches=cfg.train.eval_batches * parts)
        self._val_whole = data.eval_batches(corpus.val, **shape)

    @staticmethod
    def _shape(batch_size: int, cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        return dict(block_size=cfg.seq_len, batch_size=batch_size, rows=hosts.local_rows(mesh, batch_size).tolist())

    def train(self, step: int) -> data.Batch:
        """Of the step that makes `step` finished updates: one, or the runs' own on a leading axis."""
        each = [batches[step - 1] for batches in self._of_runs]
        if len(each) == 1:
            return self._place(each[0], self._batch_size)
        return self._place(jax.tree.map(lambda *arrays: np.stack(arrays), *each), self._batch_size, axis=1)

    def validation(self, *, whole: bool) -> Iterator[data.Batch]:
        for batch in self._val_whole if whole else self._val_part:
            yield self._place(batch, self._val_batch_size)


class _Loop:
    """The steps of `fit`, and what is due between them."""

    def __init__(
        self,
        cfg: Config,
        runs: Runs,
        programs: Programs,
        batches: _Batches,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        workdir: Path,
    ) -> None:
        self._cfg, self._runs, self._programs, self._batches = cfg, runs, programs, batches
        self._tokenizer, self._mesh, self._workdir = tokenizer, mesh, workdir
        self._in_flight: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._diverged = [False] * len(runs)

    def run(self, state: train_step.TrainState, first_step: int) -> train_step.TrainState:
        """From the state after `first_step` updates to that after the last."""
        train, num_steps = self._cfg.train, self._cfg.train.num_steps
        profile_start = min(first_step + 11, num_steps)
        profiled = range(profile_start, min(profile_start + train.profile_steps, num_steps + 1))
        try:
            with Report(self._workdir, first_step=first_step, num_steps=num_steps) as self._report:
                self._clock = _Clock(self._report.seconds_before, first_step)
                # The last evaluation and sample come after: the state is saved by then, and a signal just ends them.
                with (
                    stop_signals(self._mesh) as stop,
                    ThreadPoolExecutor(1) as pool,
                    contextlib.ExitStack() as trace,
                ):
                    steps = range(first_step + 1, num_steps + 1)
                    for step, batch in _ahead(pool, self._batches.train, steps):
                        if profiled and step == profiled[0]:
                            self._finish_steps()
                            if hosts.is_first():
                                trace.enter_context(jax.profiler.trace(str(self._workdir / "profile")))
                        state, metrics = self._programs.train_step(state, batch)
                        self._in_flight.append((step, metrics))
                        stopping = stop.agreed()
                        evaluates = self._is_due(step, train.eval_every) or self._is_due(step, train.save_every)
                        saves = self._is_due(step, train.save_every) or bool(stopping)
                        samples = self._is_due(step, train.sample_every) and step < num_steps
                        traced = bool(profiled) and step == profiled[-1]
                        if step == steps[0] or traced or evaluates or saves or samples:
                            self._finish_steps()
                        else:
                            self._finish_steps(all_but=IN_FLIGHT)
                        if traced:
                            trace.close()
                        val_losses = self._evaluate(step, state) if evaluates else [None] * len(self._runs)
                        if saves:
                            self._runs.save(step, state, val_losses)
                        if stopping:
                            self._runs.wait_until_saved()
                            raise Stopped(stopping, step, self._workdir)
                        if samples:
                            self._print_sample(state, self._diverged.index(False))
                        if step == steps[0] or traced or evaluates or samples:
                            self._clock.restart(step)  # compiling, evaluating and the like are not training speed
                    if stopping := stop.agreed(now=True):  # it came while the last step was evaluated and saved
                        raise Stopped(stopping, num_steps, self._workdir)
                # A run may be told to end before the step it has reached.
                whole = self._evaluate(max(first_step, num_steps), state, whole=True)
                self._print_sample(state, int(np.nanargmin(whole)))
        except BaseException:
            # A notebook keeps an error's traceback, and with it this frame: its buffers would outlive it.
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise
        return state

    def _is_due(self, step: int, every: int) -> bool:
        return step == self._cfg.train.num_steps or (every > 0 and step % every == 0)

    def _finish_steps(self, all_but: int = 0) -> None:
        """Waits for the steps in flight, but for the last ones, and logs those that are due."""
        while len(self._in_flight) > all_but:
            step, metrics = self._in_flight.popleft()
            jax.block_until_ready(metrics)
            if self._is_due(step, self._cfg.train.log_every):
                self._log(step, jax.device_get(metrics))

    def _log(self, step: int, metrics: Mapping[str, Any]) -> None:
        speed = self._clock.read(step, self._cfg.train.batch_size * self._cfg.seq_len)
        lines = self._of_runs(metrics, ("loss", "learning_rate", "grad_norm"))
        self._check_finite(step, lines)
        lines = self._write(step, [line | speed for line in lines])
        self._report.progress(step, lines)

    def _evaluate(self, step: int, state: train_step.TrainState, *, whole: bool = False) -> list[float]:
        """Logs and returns the validation losses, NaN for a run that has diverged."""
        params = state.eval_params
        batches = self._batches.validation(whole=whole)
        sums, in_flight = [], deque()
        for batch in batches:
            in_flight.append(self._programs.eval_step(params, batch))
            if len(in_flight) > IN_FLIGHT:
                sums.append(jax.device_get(in_flight.popleft()))
        sums += jax.device_get(list(in_flight))
        nats, tokens, num_bytes = (np.sum(column, axis=0, dtype=np.float64) for column in zip(*sums, strict=True))
        values = {"val_loss": nats / tokens, "bits_per_byte": nats / math.log(2) / np.maximum(num_bytes, 1)}
        lines = self._of_runs(values, values)
        self._check_finite(step, lines)
        ending = "_full" if whole else ""
        self._write(step, [{f"{name}{ending}": value for name, value in line.items()} for line in lines])
        what = "whole validation split" if whole else f"step {step}"
        for label, chosen in self._groups():
            losses, bits = (mean_and_deviation([lines[n][name] for n in chosen]) for name in values)
            say(f"{what}{label}: val_loss {losses}, {bits} bits per byte")
        if not whole and hosts.is_first():
            plot_losses(self._workdir)
        return [math.nan if bad else line["val_loss"] for bad, line in zip(self._diverged, lines, strict=True)]

    def _groups(self) -> list[tuple[str, list[int]]]:
        """The runs that have not diverged, by peak_lr if that is what they differ in: (how to call them, which)."""
        by_lr: dict[float, list[int]] = {}
        for n, run in enumerate(self._runs.configs):
            if not self._diverged[n]:
                by_lr.setdefault(run.optim.peak_lr, []).append(n)
        several = len({run.optim.peak_lr for run in self._runs.configs}) > 1
        return [(f", peak_lr {peak_lr:g}" if several else "", chosen) for peak_lr, chosen in by_lr.items()]

    def _of_runs(self, values: Mapping[str, Any], names: Iterable[str]) -> list[dict[str, float]]:
        columns = {name: np.atleast_1d(values[name]) for name in names}
        return [{name: float(column[n]) for name, column in columns.items()} for n in range(len(self._runs))]

    def _write(self, step: int, lines: list[dict[str, float]]) -> list[dict[str, float]]:
        """Appends the lines of the runs that go on to metrics.jsonl, and returns them."""
        going = [n for n, bad in enumerate(self._diverged) if not bad]
        for n in going:
            self._report.log(step, self._runs.labels[n] | lines[n])
        return [lines[n] for n in going]

    def _check_finite(self, step: int, lines: list[dict[str, float]]) -> None:
        """Notes the runs that have diverged; the last one to do so is an error."""
        for n, line in enumerate(lines):
            bad = next(((name, value) for name, value in line.items() if not math.isfinite(value)), None)
            if bad is None or self._diverged[n]:
                continue
            self._diverged[n] = True
            which = f"{self._runs.folders[n].name}: " if self._runs.stacked else ""
            what = f"{which}{bad[0]} is {bad[1]} at step {step}: training has diverged"
            if all(self._diverged):
                raise InputError(
                    f"{what}, and only what was saved before is kept; lower optim.peak_lr, raise optim.warmup_steps "
                    "or set optim.grad_clip, in another workdir"
                )
            say(f"{what}; the other runs go on")

    def _print_sample(self, state: train_step.TrainState, n: int) -> None:
        run = self._runs.configs[n]
        params = hosts.everywhere(self._runs.part(state.eval_params, n), self._mesh)
        if params is None:
            say("no sample: one device has no room for the whole model")
            return
        if not hosts.is_first():
            return
        language_model = LanguageModel(run, params, self._tokenizer)
        request = dataclasses.asdict(run.sample)
        try:
            print(language_model.generate(request.pop("prompt"), **request), flush=True)
        except BrokenPipeError:  # who read our output has had enough: `... | head`
            silence_standard_output()
            say("nobody reads standard output any more; training goes on")


_Item, _Made = TypeVar("_Item"), TypeVar("_Made")


def _ahead(pool: Executor, make: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[tuple[_Item, _Made]]:
    """(item, make(item)) in order, with some of them made in the pool before they are asked for."""
    made: deque[Future[tuple[_Item, _Made]]] = deque()
    for item in items:
        made.append(pool.submit(lambda item=item: (item, make(item))))
        if len(made) > BATCHES_AHEAD:
            yield made.popleft().result()
    for future in made:
        yield future.result()


class _Clock:
    """Wall time of the run, earlier parts included, and training speed since the last read or restart."""

    def __init__(self, seconds_before: float, step: int) -> None:
        self._run_start = time.monotonic() - seconds_before
        self.restart(step)

    def restart(self, step: int) -> None:
        self._since, self._step = time.monotonic(), step

    def read(self, step: int, tokens_per_step: int) -> dict[str, float]:
        tokens_per_second = (step - self._step) * tokens_per_step / max(time.monotonic() - self._since, 1e-9)
        self.restart(step)
        return {"tokens_per_second": tokens_per_second, "wall_seconds": self._since - self._run_start}


_last_model: weakref.ref[LanguageModel] | None = None


def _remember(language_model: LanguageModel) -> LanguageModel:
    global _last_model
    _last_model = weakref.ref(language_model)
    return language_model


def _free_last_model() -> None:
    """Moves the parameters that the last `fit` returned to host memory, if they are still in use."""
    last = _last_model and _last_model()
    if last is not None:
        if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(last.params) if isinstance(leaf, jax.Array)):
            return  # of several processes, and too large for one
        on_device, last.params = last.params, jax.device_get(last.params)
        jax.tree.map(lambda leaf: isinstance(leaf, jax.Array) and leaf.delete(), on_device)
