"""The README does what it says: its blocks run, its table is the records'."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- not run here: [^>]+ -->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)
RECORDS = sorted((ROOT / "tests" / "measured").glob("*.json"))
RECORD_KEYS = {"what", "figure", "command", "commit", "hardware", "versions", "date", "repetitions"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, clean_env):
    """A folder where the README's commands work, with configs/tiny.py in the place of small.py."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    tiny = (ROOT / "configs" / "tiny.py").read_text()
    (folder / "configs" / "small.py").write_text(tiny.replace('tokenizer = "byte"', 'tokenizer = "bpe"'))
    (folder / "my.txt").write_text("All work and no play makes Jack a dull boy.\n" * 400)
    environment = clean_env | {
        "PATH": f"{Path(sys.executable).parent}:{clean_env['PATH']}",
        "LLM_JAX_CACHE": str(folder / "cache"),
    }
    train = [sys.executable, "-m", "llm_jax.main", "--config=configs/small.py", "--config.data.path=my.txt"]
    subprocess.run([*train, "--workdir=runs/small"], cwd=folder, env=environment, check=True, capture_output=True)
    return folder, environment


@pytest.mark.slow
def test_the_blocks_run_one_after_the_other(workplace):
    """Some need what an earlier one has made."""
    folder, environment = workplace
    for mark, language, code in BLOCKS:
        if mark:
            continue
        command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_blocks_are_found():
    assert len(BLOCKS) >= 6 and sum(bool(mark) for mark, _, _ in BLOCKS) == 6


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_complete_and_in_the_table(path):
    record = json.loads(path.read_text())
    assert record.keys() >= RECORD_KEYS
    cells = (record["what"], record["figure"], f"`{record['command']}`", record["hardware"], record["commit"])
    assert f"| {' | '.join(cells)} |\n" in README


def test_the_table_holds_nothing_but_records():
    table = re.search(r"<!-- results -->\n(.*?)<!-- end of results -->", README, re.DOTALL)[1]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(RECORDS) > 0


def test_the_table_of_plans_is_the_record():
    record = json.loads((ROOT / "tests" / "measured" / "plans.json").read_text())
    for plan in record["repetitions"]:
        cells = (
            f"{plan['name']}, {plan['topology']}",
            f"{plan['mfu']:.1%}",
            f"{plan['published_mfu']:.1%}",
            f"{plan['tokens_per_second_and_chip']:,.0f}",
            f"{plan['published_tokens_per_second_and_chip']:,}",
            f"{plan['peak'] / 2**30:.1f} of {plan['memory'] / 2**30:.1f}",
            f"{plan['compile_seconds']:.0f} s",
        )
        assert f"| {' | '.join(cells)} |\n" in README
