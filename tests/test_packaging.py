"""What pip and a reader of the repository rely on."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import llm_jax

ROOT = Path(__file__).parents[1]

# Colab by its published package list of August 2026: the same on CPU, GPU and TPU.
COLAB = {
    "jax": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.8",
    "grain": "0.2.18",
    "orbax-checkpoint": "0.12.4",
    "tokenizers": "0.22.2",
    "numpy": "2.1.3",
}


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text):
    return [Requirement(line) for line in text.split("\n") if line.strip() and not line.startswith("#")]


def extras(setup):
    return {name: requirements(text) for name, text in setup["options.extras_require"].items()}


def test_extras(setup):
    names = {extra: {requirement.name for requirement in needed} for extra, needed in extras(setup).items()}
    assert names["test"] == {"pytest", "flatbuffers", "pytest-xdist", "beartype", "hypothesis"}
    assert names["parity"] >= {"torch", "transformers"}
    assert names.keys() >= {"test", "parity", "cuda12", "cuda13", "tpu", "notebooks"}
    for accelerator in ("cuda12", "cuda13", "tpu"):
        assert [(r.name, r.extras) for r in extras(setup)[accelerator]] == [("jax", {accelerator})]


def test_dependencies_are_the_fields_own_and_few(setup):
    names = {requirement.name for requirement in requirements(setup["options"]["install_requires"])}
    assert names == {
        *("jax", "flax", "optax", "orbax-checkpoint", "ml_collections", "grain", "tokenizers", "safetensors"),
        *("jinja2", "jaxtyping", "numpy", "absl-py", "tqdm", "matplotlib"),
    }


def test_lower_bounds_are_no_higher_than_colabs_and_there_is_no_upper_one(setup):
    needed = requirements(setup["options"]["install_requires"])
    for requirement in needed:
        assert [clause.operator for clause in requirement.specifier] == [">="], requirement
        if requirement.name in COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), requirement
    assert COLAB.keys() <= {requirement.name for requirement in needed}
    for extra in extras(setup).values():
        assert not any(requirement.specifier for requirement in extra)


def test_pythons(setup):
    assert setup["options"]["python_requires"] == ">=3.11"
    classifiers = setup["metadata"]["classifiers"]
    assert all(f":: 3.{minor}" in classifiers for minor in (11, 12, 13))


def test_what_is_installed_is_what_is_asked_for(setup):
    """Each name is a distribution's, spelt as pip knows it, and what the tests run with satisfies its bound."""
    for requirement in requirements(setup["options"]["install_requires"]):
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


def test_pyproject_names_only_the_build_backend():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text()) == {
        "build-system": {"requires": ["setuptools>=64"], "build-backend": "setuptools.build_meta"}
    }


def test_version_and_license(setup):
    assert setup["metadata"]["version"] == "attr: llm_jax.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", llm_jax.__version__)
    assert (ROOT / setup["metadata"]["license_files"]).is_file()


def test_every_module_is_a_package_that_is_installed(setup):
    assert setup["options.packages.find"]["include"] == "llm_jax*"
    folders = {path.parent for path in (ROOT / "llm_jax").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_module_is_on_the_readmes_map():
    readme = (ROOT / "README.md").read_text()
    modules = [path.name for path in (ROOT / "llm_jax").glob("*.py") if path.stem != "__init__"]
    assert {"train.py", "model.py"} <= set(modules)
    # By its own name: "train_step.py" does not name "step.py".
    assert [name for name in modules if not re.search(rf"(?<!\w){re.escape(name)}", readme)] == []


def test_the_top_level_is_the_users():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("git not installed")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    own = {"llm_jax", "configs", "tests", "notebooks", "setup.cfg", "README.md"}
    insisted_on = {"pyproject.toml", ".ci", "LICENSE", ".gitignore"}
    assert top <= own | insisted_on


def test_importing_is_light():
    """In a process of its own: the functions come without flax and orbax, the package without jax."""
    program = "import sys, llm_jax; print(*sys.modules); import llm_jax.ops; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    package, ops = (set(line.split()) for line in run.stdout.splitlines())
    assert package.isdisjoint({"jax", "flax", "orbax", "numpy"})
    assert "jax" in ops and ops.isdisjoint({"flax", "optax", "orbax", "grain", "ml_collections", "tokenizers"})
