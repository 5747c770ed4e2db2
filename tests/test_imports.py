"""The one-way imports of DESIGN section 1, and what importing costs."""

import ast
import json

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "llm_jax"
# Bottom row first; a module imports rows below its own. errors.py is everybody's.
ROWS = [
    {"files", "chat", "progress", "sampling_rules", "sentencepiece", "hlo"},
    {"ops", "config", "tokenizers", "cache", "hlo_traffic", "hlo_memory"},
    {"hlo_cost"},
    {"sharding", "chips", "cpu", "config_file", "config_rules", "documents", "continuation"},
    {"parallel", "distributed"},
    {"layers", "hosts"},
    {"model", "optim", "checkpoint", "corpus", "data", "interop"},
    {"train_step", "generate", "report", "run_folder", "decode_weights"},
    {"pretrained"},
    {"published", "init_from"},
    {"programs", "runs", "decoding", "speculative", "roofline", "kernel_flops"},
    {"planning", "stopping"},
    {"auto_fit", "plan_search"},
    {"text_model", "engine"},
    {"planning_decode"},
    {"plan_report"},
    {"exported"},
    {"export"},
    {"language_model"},
    {"train"},
    {"flags"},
    {"main", "sample", "convert", "plan", "bench", "evaluate", "serve", "compare"},
]
COMMANDS = ROWS[-1]
NUMPY_ONLY = set("documents corpus data tokenizers interop config config_file config_rules".split())
NUMPY_ONLY |= set("hlo hlo_traffic hlo_cost hlo_memory".split())
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file):
    """Dotted names that a file imports anywhere in it: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(name):
    """ "model.py" -> "model", "ops/rope.py" -> "ops": what the table of rows calls it."""
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_rows_below(name):
    own = {dotted.split(".")[1] for dotted in imports(FILES[name]) if dotted.startswith("llm_jax.")} - {"errors"}
    if name in ("__init__.py", "errors.py"):
        allowed = set()
    elif module(name) == "ops":
        allowed = {"ops"} if name == "ops/__init__.py" else set()  # each file can be lifted alone
    else:
        row = next(i for i, row in enumerate(ROWS) if module(name) in row)  # StopIteration: give it a row
        allowed = set().union(*ROWS[:row])
    if name in ("train_step.py", "generate.py"):
        allowed -= {"layers", "model"}  # they are given apply_fn and params
    if module(name) in ("interop", "bench"):  # one topic in several files
        allowed |= {module(name)}
    assert own <= allowed


@pytest.mark.parametrize("name", FILES)
def test_outside_packages_are_imported_where_they_belong(name):
    roots = {dotted.split(".")[0] for dotted in imports(FILES[name])}
    if module(name) == "ops":
        assert not roots & {"flax", "optax", "orbax", "ml_collections", "grain", "tokenizers", "absl"}
    if module(name) in NUMPY_ONLY:
        assert not roots & {"jax", "flax"}  # numpy in, numpy out
    if module(name) not in COMMANDS | {"flags"}:
        assert "absl" not in roots
    if name != "bench/torch_peers.py":
        assert not roots & {"torch", "transformers"}


def modules_after(run_python, statement):
    result = run_python("-c", f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_importing_ops_loads_neither_flax_nor_orbax(run_python):
    loaded = modules_after(run_python, "import llm_jax.ops")
    assert "llm_jax.ops.rope" in loaded
    assert not loaded & {"flax", "orbax", "orbax.checkpoint", "ml_collections", "optax", "grain", "tokenizers"}


def test_importing_the_package_loads_nothing_heavy(run_python):
    seconds = run_python("-c", "import time; t = time.perf_counter(); import llm_jax; print(time.perf_counter() - t)")
    assert float(seconds.stdout) < 1
    assert not modules_after(run_python, "import llm_jax") & {"jax", "flax", "numpy"}


def test_importing_every_module_starts_no_device(run_python):
    """ "Nothing runs at import but definitions": a TPU taken at import could not be given to anyone else."""
    names = [f"llm_jax.{name.removesuffix('.py').replace('/', '.')}" for name in FILES if "__init__" not in name]
    commands = {f"llm_jax.{name}" for name in COMMANDS - {"main"}} | {"llm_jax.bench.__main__"}
    names = [name for name in names if name not in commands]  # two define one flag
    code = f"import {', '.join(names)}\nfrom jax._src import xla_bridge\nprint(xla_bridge.backends_are_initialized())"
    result = run_python("-c", code)
    assert (result.stdout, result.returncode) == ("False\n", 0), result.stderr


def test_modules_that_the_documentation_names_need_no_import_of_their_own(run_python):
    code = "import llm_jax\nprint(llm_jax.config.default().model.n_embd, llm_jax.ops.rope, hasattr(llm_jax, 'main'))"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("128 <function rope") and result.stdout.endswith("False\n")


def test_public_names():
    import llm_jax

    for name in llm_jax.__all__:
        assert getattr(llm_jax, name).__name__ == name
        assert name in dir(llm_jax)
    assert llm_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm_jax.nothing
