"""The notebooks: clean files whose code cells, run in order as a kernel would, give sensible results.

Each notebook's cells run in a process of their own, the two at once, with no Jupyter: plain Python,
matplotlib's Agg, a temporary folder. The cell tagged "settings" is followed by smaller values; the "install"
cell runs as in a kernel that has llm_jax, and once more with git and pip replaced by recorders.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = ("quickstart", "pure_functions")

# Stands where a kernel's inline backend would: each plt.show() saves and closes what was drawn.
PRELUDE = """
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as _plt
def _show(shown=[]):
    for number in _plt.get_fignums():
        shown.append(number)
        _plt.figure(number).savefig(f"figure_{len(shown)}.png")
    _plt.close("all")
_plt.show = _show
"""
EPILOGUE = """
import json as _json
_results = {{name: eval(expression) for name, expression in {expressions!r}.items()}}
open("results.json", "w").write(_json.dumps(_results))
"""

SMALL = {
    "NUM_STEPS": 60,
    "BATCH_SIZE": 8,
    "N_LAYER": 1,
    "N_HEAD": 2,
    "N_EMBD": 32,
    "BLOCK_SIZE": 32,
    "VOCAB_SIZE": 300,
    "PEAK_LR": 1e-2,
    "WARMUP_STEPS": 10,
    "PROMPT": "the ",
    "NEW_TOKENS": 40,  # as many as in the cells that have a number of their own: one program less
    "COMPARE_STEPS": 20,
}


def read(name):
    return json.loads((REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name, tag=None):
    """(tags, source) of each code cell."""
    cells = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    pairs = [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]
    return [pair for pair in pairs if tag is None or tag in pair[0]]


def run(name, folder, *, settings, expressions):
    """Runs the code cells in `folder`; returns (standard output, expressions' values at the end, figures)."""
    parts = [PRELUDE]
    for number, (tags, source) in enumerate(code_cells(name)):
        parts.append(f"# ---- code cell {number}\n{source}")
        if "settings" in tags:
            parts.append("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
    script = folder / f"{name}.py"
    script.write_text("\n\n".join([*parts, EPILOGUE.format(expressions=expressions)]), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
        "LLM_JAX_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        cwd=folder,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout, json.loads((folder / "results.json").read_text()), sorted(folder.glob("figure_*.png"))


# What each notebook's variables hold at its end.
QUICKSTART = {
    "losses": "[line['loss'] for line in metrics if 'loss' in line]",
    "val_losses": "[line['val_loss'] for line in metrics if 'val_loss' in line]",
    "last": "metrics[-1]",
    "num_steps": "lm.config.train.num_steps",
    "prompts": "prompts",
    "texts": "texts",
    "alone_is_same": "alone == texts[1]",
    "reload_is_same": "same",
    "kept": "[int(kept.sum()), len(probs)]",
    "parameters": "[sum(p.size for p in jax.tree.leaves(llm_jax.load(RUNS / (RUN_NAME + end)).params)) "
    "for end in ('-modern', '-old')]",
    "switches": "[llm_jax.load(RUNS / (RUN_NAME + end)).config.model.use_rope for end in ('-modern', '-old')]",
}
PURE_FUNCTIONS = {
    "rope_spread": "float(rope_spread)",
    "score_range": "float(np.ptp(scores))",
    "table_error": "table_error",
    "slow_down": "{kind: [float(s[0]), float(s[-1])] for kind, s in slow_down.items()}",
    "norm_grad_error": "norm_grad_error",
    "kept": "[int(jnp.isfinite(masked).sum()) for masked in masks.values()]",
    "drawn": "[len(set(np.asarray(drawn[:, row]).tolist())) for row in range(3)]",
    "weights": "{name: w.tolist() for name, w in weights.items()}",
    "attention_error": "attention_error",
    "loss": "[float(total), float(row_totals.sum()), float(count)]",
    "loss_grad_error": "loss_grad_error",
    "losses": "[float(losses[0]), float(losses[-1])]",
    "learned": "[float(learned[t, t - PERIOD + 1]) for t in range(PERIOD, len(learned))]",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_text):
    settings = SMALL | {"TEXT": str(tiny_text)}
    with ThreadPoolExecutor() as pool:
        start = lambda name, **how: pool.submit(run, name, tmp_path_factory.mktemp(name), **how)
        yield {
            "quickstart": start("quickstart", settings=settings, expressions=QUICKSTART),
            "pure_functions": start("pure_functions", settings={}, expressions=PURE_FUNCTIONS),
        }


@pytest.fixture
def quickstart(runs):
    return runs["quickstart"].result()


@pytest.fixture
def pure_functions(runs):
    return runs["pure_functions"].result()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_file_is_valid_and_clean(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell_id) for cell_id in ids)
    for cell in notebook["cells"]:
        required = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            required |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None and cell["outputs"] == [], f"clear the outputs of {cell['id']}"
        assert cell.keys() == required and cell["cell_type"] in ("code", "markdown")
        assert cell["metadata"].keys() <= {"tags"}, f"{cell['id']}: an editor left its metadata"
        source = "".join(cell["source"])
        assert source.strip() and not re.search(r"/(home|Users|work|tmp)/", source), cell["id"]
        assert all(line.endswith("\n") for line in cell["source"][:-1])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_cells_are_plain_python(name):
    for _, source in code_cells(name):
        ast.parse(source)  # no "!" and "%" lines, which only IPython reads


def test_small_settings_override_settings_that_are_there():
    [(_, source)] = code_cells("quickstart", "settings")
    names = {target.id for node in ast.parse(source).body for target in node.targets}
    assert {*SMALL, "TEXT"} <= names


def test_settings_are_those_of_small_py():
    """As the notebook says. It has intervals and a prompt of its own."""
    namespace = {"CACHE_DIR": None}
    for tags, source in code_cells("quickstart"):
        if "settings" in tags or "\nconfig = default()" in source:
            exec(source, namespace)
    small = load_file(str(REPOSITORY / "configs" / "small.py"))
    for cfg in (namespace["config"], small):
        cfg.train.update(eval_every=1, save_every=1, log_every=1)
        cfg.sample.prompt = ""
    assert freeze(namespace["config"]) == freeze(small)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_install_cell_leaves_jax_alone(name, monkeypatch, capsys):
    [(_, source)] = code_cells(name, "install")
    assert source == code_cells(NOTEBOOKS[0], "install")[0][1], "both notebooks install alike"
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name.split(".")[0] for node in imports for alias in node.names}
    assert imported <= sys.stdlib_module_names, "jax may be imported only after the installation"
    versions = {"jax": "0.7.2", "numpy": "2.1.3"}
    commands = []

    def distributions():
        return [types.SimpleNamespace(name=package, version=version) for package, version in versions.items()]

    def installer(changes):
        def record(words, **kwargs):
            commands.append(list(words))
            if "pip" in words:
                versions.update(changes)
            return types.SimpleNamespace(returncode=0, stdout="", stderr="")

        return record

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    exec(source, {})
    assert not commands and "already" in capsys.readouterr().out

    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="REPO"):
        exec(source, {})
    filled_in = source.replace("github.com/<you>", "github.com/someone")

    monkeypatch.setattr(subprocess, "run", installer({"llm_jax": "0.1.0"}))
    exec(filled_in, {})
    (git, clone, *_, address, folder), (python, *pip) = commands
    assert (git, clone, address) == ("git", "clone", "https://github.com/someone/llm_jax")
    assert python == sys.executable and pip == ["-m", "pip", "install", "--quiet", folder]
    assert not os.path.exists(folder)
    out = capsys.readouterr().out
    assert "new: llm_jax 0.1.0" in out and "changed: nothing" in out

    monkeypatch.setattr(subprocess, "run", installer({"jax": "0.10.2"}))
    with pytest.raises(RuntimeError, match="restart"):
        exec(filled_in, {})
    assert "jax 0.7.2 -> 0.10.2" in capsys.readouterr().out

    failed = types.SimpleNamespace(returncode=128, stdout="", stderr="fatal: no such repository")
    monkeypatch.setattr(subprocess, "run", lambda words, **kwargs: failed)
    with pytest.raises(RuntimeError, match="no such repository"):
        exec(filled_in, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_figure_is_drawn(name, request):
    _, _, figures = request.getfixturevalue(name)
    shows = sum(source.count("plt.show()") for _, source in code_cells(name))
    assert len(figures) == shows >= 3
    assert all(figure.stat().st_size > 10_000 for figure in figures)


@pytest.mark.slow
def test_quickstart_trains(quickstart):
    _, results, _ = quickstart
    assert results["num_steps"] == SMALL["NUM_STEPS"] == results["last"]["step"]
    assert results["losses"][0] > 5  # ln 300 = 5.7
    assert results["losses"][-1] < results["losses"][0] - 1
    assert len(results["val_losses"]) > 5 and results["val_losses"][-1] < results["val_losses"][0] - 1
    assert 0 < results["last"]["bits_per_byte_full"] < 8


@pytest.mark.slow
def test_quickstart_samples(quickstart):
    out, results, _ = quickstart
    assert all(f"--- temperature {temperature} ---\nthe " in out for temperature in ("0.0", "0.8", "1.3"))
    assert len(results["texts"]) == len(results["prompts"]) == 4
    for prompt, text in zip(results["prompts"], results["texts"], strict=True):
        assert text.startswith(prompt) and len(text) > len(prompt) + 20
    assert results["alone_is_same"] and results["reload_is_same"]
    kept, vocabulary = results["kept"]
    assert 1 <= kept < vocabulary == SMALL["VOCAB_SIZE"]


@pytest.mark.slow
def test_quickstart_compares_models_of_one_size(quickstart):
    _, results, _ = quickstart
    modern, old = results["parameters"]
    assert results["switches"] == [True, False]
    # The learned positions are 64 x 64 parameters that the modern model does without.
    assert abs(modern - (old - 64 * 64)) / modern < 0.02


@pytest.mark.slow
def test_pure_functions_of_positions_and_norms(pure_functions):
    _, results, _ = pure_functions
    assert results["rope_spread"] < 1e-4 and results["score_range"] > 1
    assert results["table_error"] < 1e-5
    fastest_and_slowest = {"linear": (8, 8), "ntk": (1, 8), "llama3": (1, 8), "yarn": (1, 8)}
    assert {k: tuple(round(x, 3) for x in v) for k, v in results["slow_down"].items()} == fastest_and_slowest
    assert results["norm_grad_error"] < 1e-5


@pytest.mark.slow
def test_pure_functions_of_logits(pure_functions):
    _, results, _ = pure_functions
    top_k, top_p, min_p = results["kept"]
    assert top_k == 6 and 1 < top_p < 24 and 1 < min_p < 24
    greedy, narrow, wide = results["drawn"]
    assert greedy == 1 < narrow <= 6 < wide
    total, by_row, count = results["loss"]
    assert count == 15 and total == pytest.approx(by_row, rel=1e-5)
    assert results["loss_grad_error"] < 1e-5


@pytest.mark.slow
def test_pure_functions_of_attention(pure_functions):
    _, results, _ = pure_functions
    causal, window, segments, softcap = results["weights"].values()
    for weights in (causal, window, segments, softcap):
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in weights)
        assert all(not any(row[t + 1 :]) for t, row in enumerate(weights))
    assert all(not any(row[: max(0, t - 7)]) for t, row in enumerate(window))
    assert all(not any(row[:12]) for row in segments[12:])
    # Scores within 1.5 of 0: no weight is above e^3 times another.
    assert all(max(row[: t + 1]) <= 20.1 * min(row[: t + 1]) for t, row in enumerate(softcap))
    assert results["attention_error"] < 1e-4


@pytest.mark.slow
def test_pure_functions_train_a_model(pure_functions):
    _, results, _ = pure_functions
    first, last = results["losses"]
    assert first > 2 and last < 0.3  # ln 16 = 2.8 is guessing
    assert min(results["learned"]) > 0.5
