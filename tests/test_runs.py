"""Several runs in one program are those runs, each as if it had trained alone."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from conftest import only_one_device

import llm_jax
from llm_jax import programs, train
from llm_jax.config import as_dict, default
from llm_jax.config_file import override
from llm_jax.config_rules import freeze, split_runs
from llm_jax.errors import InputError
from llm_jax.train import fit

TIMING = ("tokens_per_second", "wall_seconds")
SMALL = {"model.n_embd": 16, "model.block_size": 16}


def lines(workdir, **of):
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in parsed if of.items() <= line.items()]
    return [{key: value for key, value in line.items() if key not in (*TIMING, *of)} for line in chosen]


def assert_lines_close(some, others, rtol):
    assert [list(line) for line in some] == [list(line) for line in others]
    for line, other in zip(some, others, strict=True):
        np.testing.assert_allclose([*line.values()], [*other.values()], rtol=rtol)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped, as on a CPU", "vmapped, as on accelerators"])
def test_each_run_is_as_it_is_alone(tiny, tmp_path, one_device, monkeypatch, capsys, mapped):
    every = {"train.num_steps": 30, "train.log_every": 5, "train.eval_every": 15, "train.save_every": 0}
    changes = SMALL | every | {"model.dropout": 0.1}
    monkeypatch.setattr(programs.sharding, "is_cpu", lambda mesh: mapped)
    best = fit(tiny(**changes, **{"train.seeds": 2, "optim.peak_lrs": (3e-3, 1e-2)}), workdir=tmp_path / "all")
    out, err = capsys.readouterr()
    order = [(3e-3, 0), (3e-3, 1), (1e-2, 0), (1e-2, 1)]
    finals = [lines(tmp_path / "all", seed=seed, peak_lr=peak_lr)[-1]["val_loss_full"] for peak_lr, seed in order]
    assert len({round(final, 3) for final in finals}) == 4  # else nothing would tell them apart
    for n in (0, 3):
        peak_lr, seed = order[n]
        alone = fit(tiny(**changes, **{"train.seed": seed, "optim.peak_lr": peak_lr}), workdir=tmp_path / f"alone{n}")
        folder = tmp_path / "all" / f"run_{n}"
        assert_lines_close(
            lines(tmp_path / "all", seed=seed, peak_lr=peak_lr), lines(tmp_path / f"alone{n}"), rtol=1e-4
        )
        loaded = llm_jax.load(folder, step="last")
        assert loaded.config == alone.config
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), loaded.params, alone.params)
    kept = llm_jax.load(tmp_path / "all" / f"run_{int(np.argmin(finals))}", step="last")
    jax.tree.map(np.testing.assert_array_equal, best.params, kept.params)
    # Mean and deviation over the seeds of each rate, the spread of two being |a - b| / sqrt(2).
    for peak_lr, (a, b) in (("0.003", finals[:2]), ("0.01", finals[2:])):
        whole = f"whole validation split, peak_lr {peak_lr}: val_loss {(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}, "
        assert whole in err
    assert out.count("the ") >= 1 and (tmp_path / "all" / "loss.png").exists()


def test_a_stop_costs_several_runs_nothing(tiny, tmp_path, one_device, monkeypatch):
    """Also where it came between the saves of two runs, with but one checkpoint to keep."""
    config = tiny(**SMALL, **{"train.seeds": 2, "train.keep_checkpoints": 1, "train.eval_every": 2})
    fit(config, workdir=tmp_path / "unstopped")
    log = train.Report.log

    def logging(self, step, values):
        if step == 5:
            raise RuntimeError("a full disk")
        log(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(train.Report, "log", logging)
        with pytest.raises(RuntimeError, match="full disk"):
            fit(config, workdir=tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/run_1/checkpoints/4")
    with monkeypatch.context() as patch:
        patch.setattr(train, "say", (said := []).append)
        fit(config, workdir=tmp_path / "stopped")
    assert "continues after step 2" in said
    assert lines(tmp_path / "stopped") == lines(tmp_path / "unstopped")
    for n in range(2):
        a, b = (llm_jax.load(tmp_path / name / f"run_{n}") for name in ("stopped", "unstopped"))
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_a_run_that_diverges_does_not_end_the_others(tiny, tmp_path, one_device, capsys):
    changes = SMALL | {"optim.grad_clip": 0.0, "optim.name": "sgd"}
    lm = fit(tiny(**changes, **{"optim.peak_lrs": (1e-2, 1e30)}), workdir=tmp_path / "one")
    assert "run_1: " in (err := capsys.readouterr().err) and err.count("diverged") == 1 and "the other runs" in err
    assert lm.config.optim.peak_lr == 1e-2
    written = (tmp_path / "one" / "metrics.jsonl").read_text()
    assert not any(word in written for word in ("NaN", "Infinity"))
    assert [line["step"] for line in lines(tmp_path / "one", peak_lr=1e-2) if "loss" in line] == [*range(1, 7)]
    # Continued, its state is as it was.
    again = fit(tiny(**changes, **{"optim.peak_lrs": (1e-2, 1e30), "train.num_steps": 8}), workdir=tmp_path / "one")
    assert again.config.optim.peak_lr == 1e-2
    with pytest.raises(InputError, match="run_1: .* diverged, and only"):
        fit(tiny(**changes, **{"optim.peak_lrs": (1e29, 1e30)}), workdir=tmp_path / "both")


def test_a_folder_of_several_runs_is_no_run(tiny, tmp_path, one_device):
    fit(tiny(**SMALL, **{"train.seeds": 2, "train.num_steps": 1}), workdir=tmp_path / "runs")
    with pytest.raises(InputError, match="holds 2 runs; give one of them, .*run_0 to run_1"):
        llm_jax.load(tmp_path / "runs")
    with pytest.raises(InputError, match="train.seeds 2 there and 3 here"):
        fit(tiny(**SMALL, **{"train.seeds": 3, "train.num_steps": 1}), workdir=tmp_path / "runs")


def test_a_run_whose_checkpoints_are_gone_does_not_cost_the_others_theirs(tiny, tmp_path, one_device):
    fit(tiny(**SMALL, **{"train.seeds": 2}), workdir=tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/run_1/checkpoints")
    with pytest.raises(InputError, match=r"no step is saved in all runs of .*run_0 \[2, 4, 6\]; run_1 \[\]"):
        fit(tiny(**SMALL, **{"train.seeds": 2, "train.num_steps": 8}), workdir=tmp_path / "runs")
    assert (tmp_path / "runs/run_0/checkpoints/6").is_dir()


def test_several_runs_on_several_devices(tiny, tmp_path):
    """Eight fake ones, with accumulation: as one run on one device."""
    changes = SMALL | {"train.batch_size": 16, "train.accumulation_steps": 2}
    lm = fit(tiny(**changes, **{"train.seeds": 2}), workdir=tmp_path / "all")
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(lm.params))
    with only_one_device():
        fit(tiny(**changes, **{"train.seed": 1}), workdir=tmp_path / "alone")
    assert_lines_close(lines(tmp_path / "all", seed=1, peak_lr=3e-3), lines(tmp_path / "alone"), rtol=1e-4)


def test_split_runs():
    config = default()
    config.optim.peak_lrs = (1e-3, 1)
    config.train.update({"seeds": 2, "seed": 5})
    cfg = freeze(config)
    assert cfg.optim.final_lr is None and freeze(as_dict(cfg)) == cfg
    runs = split_runs(cfg)
    assert [(run.optim.peak_lr, run.optim.final_lr, run.train.seed) for run in runs] == [
        (1e-3, 1e-4, 5),
        (1e-3, 1e-4, 6),
        (1.0, 0.1, 5),
        (1.0, 0.1, 6),
    ]
    assert all(split_runs(run) == (run,) == (freeze(as_dict(run)),) for run in runs)
    assert split_runs(freeze({})) == (freeze({}),)


@pytest.mark.parametrize("value", ["1e-3,0.001", "0", "-1,1", "nan", "inf", "", "x", "1e-3;1"])
def test_impossible_peak_lrs(value):
    with pytest.raises(InputError, match="optim.peak_lrs"):
        config = default()
        override(config, [f"optim.peak_lrs={value}"])
        freeze(config)


def test_mean_and_deviation():
    from llm_jax.report import mean_and_deviation

    assert mean_and_deviation([1.5]) == "1.5000"
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000" and math.isclose(np.std([1, 2, 3], ddof=1), 1)
