"""Every file in configs/: frozen, shaped as a closed formula says, and trained for one step at a tiny size."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax import layers, model
from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
CHARACTERS = {"tinyshakespeare": 65, "python_stdlib": 215}  # the second on Python 3.11


def load(path, data_path):
    """The ConfigDict of a file, with the text and tokenizer that some leave for the user to give."""
    cfg = load_file(str(path))
    if cfg.data.source in ("text", "bin"):
        cfg.data.path = str(data_path)
        cfg.data.tokenizer = "byte"
    if path.stem == "finetune":  # without the model that it starts from
        cfg.train.init_from = None
    return cfg


def frozen_model(path):
    """The model's part, with the vocabulary that its tokenizer has on the corpus it is for."""
    source = load_file(str(path)).data.source
    cfg = freeze(load(path, "some.txt"))
    sizes = {"byte": 256, "bpe": cfg.data.vocab_size, "char": CHARACTERS.get(source)}
    return dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or sizes[cfg.data.tokenizer])


def closed_form(m):
    """(all, without embeddings) parameters, from the numbers of the config alone."""
    heads, kv_heads = m.n_head * m.head_dim, m.n_kv_head * m.head_dim
    mlp = m.n_embd * m.mlp_dim * (3 if "glu" in m.mlp else 2)
    mlp = mlp if m.n_expert is None else m.n_expert * (mlp + m.n_embd)  # each with its row of the router
    matrices = m.n_embd * (2 * heads + 2 * kv_heads) + mlp
    biases = heads + 2 * kv_heads + m.n_embd + m.mlp_dim * (2 if "glu" in m.mlp else 1) + m.n_embd
    norm = m.n_embd * (2 if m.use_bias and not m.use_rmsnorm else 1)
    head_norms = 2 * m.head_dim * (2 if m.use_bias and not m.use_rmsnorm else 1) if m.qk_norm else 0
    inside = m.n_layer * (matrices + m.use_bias * biases + 2 * norm + head_norms) + norm
    embeddings = m.n_embd * (m.vocab_size * (1 if m.tie_embeddings else 2) + (0 if m.use_rope else m.block_size))
    return inside + embeddings, inside


def test_the_files_that_the_readme_names_are_there():
    names = {path.stem for path in FILES}
    assert names >= {"small", "legacy", "tiny", "shakespeare_char", "gpt2_124m", "llama_1b"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shapes(path):
    cfg = frozen_model(path)
    assert model.count_params(cfg) == closed_form(cfg)
    sizes = layers.axis_sizes(cfg)
    axes, shapes = model.param_axes(cfg), model.param_shapes(cfg)
    assert jax.tree.structure(axes) == jax.tree.structure(shapes)
    for letters, leaf in zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True):
        assert leaf.shape == tuple(sizes[letter] for letter in letters)
        assert leaf.dtype == cfg.param_dtype


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring_says_command_and_parameters(path):
    text = path.read_text().split('"""')[1]
    assert f"python -m llm_jax.main --config=configs/{path.name}" in text
    counts = re.findall(r"Parameters: ([\d,]+), ([\d,]+) without embeddings", text)
    if path.stem not in ("tiny", "finetune"):
        assert len(counts) == 1
    for numbers in counts:
        assert tuple(int(number.replace(",", "")) for number in numbers) == closed_form(frozen_model(path))


def test_known_shapes():
    """The published parameter counts of what the files say they are."""
    by_name = {path.stem: frozen_model(path) for path in FILES}
    # GPT-2's 124,439,808 (transformers' GPT2LMHeadModel) and the 47 rows of padding.
    assert model.count_params(by_name["gpt2_124m"])[0] == 124_439_808 + 47 * 768
    # meta-llama/Llama-3.2-1B's model card: 1.23B; the tensors of its file add up to this.
    assert model.count_params(by_name["llama_1b"])[0] == 1_235_814_400
    # nanoGPT's shakespeare_char: 65 characters, 256 learned positions, no biases, LayerNorm weights.
    nanogpt = (65 + 256) * 384 + 6 * (12 * 384**2 + 2 * 384) + 384
    assert model.count_params(by_name["shakespeare_char"])[0] <= nanogpt
    # The same of its CPU recipe, without the normed queries and keys too.
    nanogpt = (65 + 64) * 128 + 4 * (12 * 128**2 + 2 * 128) + 128
    cpu = by_name["shakespeare_char_cpu"]
    assert model.count_params(dataclasses.replace(cpu, qk_norm=False))[0] < model.count_params(cpu)[0] <= nanogpt


def test_small_and_legacy_are_the_users_after_and_before():
    by_name = {path.stem: frozen_model(path) for path in FILES}
    names = "n_embd n_head n_layer block_size use_rope use_rmsnorm".split()
    shapes = {stem: [getattr(by_name[stem], name) for name in names] for stem in ("small", "legacy")}
    assert shapes == {"small": [128, 8, 6, 256, True, True], "legacy": [64, 4, 4, 64, False, False]}


TINY_MODEL = dict(n_embd=16, n_head=4, n_layer=1, block_size=16)
TINY_TRAIN = dict(num_steps=1, eval_batches=1, eval_every=0, save_every=0, sample_every=0, log_every=1)


def shrunk(path, folder):
    """The file's config with the sizes of a toy and every switch as it was."""
    cfg = load(path, folder / "text.txt")
    if cfg.data.source == "bin":
        np.frombuffer((folder / "text.txt").read_bytes(), np.uint8).astype("<u2").tofile(folder / "train.bin")
        cfg.data.path = str(folder / "train.bin")
    else:
        cfg.data.path = str(folder / "text.txt")  # instead of a download, and of 11 MB of standard library
    cfg.data.cache_dir = str(folder / "cache")
    cfg.data.vocab_size = 300
    cfg.model.update(TINY_MODEL)
    cfg.model.vocab_size = cfg.model.vocab_size and 512
    cfg.model.n_kv_head = cfg.model.n_kv_head and 2
    cfg.model.mlp_dim = cfg.model.mlp_dim and 32
    if cfg.model.rope_scaling is not None:
        cfg.model.rope_original_length = 8
    cfg.mesh.expert = 1
    cfg.train.update(TINY_TRAIN)
    cfg.train.batch_size, cfg.train.seq_len = 2 * cfg.train.accumulation_steps, None
    cfg.sample.prompt, cfg.sample.max_new_tokens = "a", 0  # sampling is tested elsewhere
    return cfg


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_step(path, tmp_path, one_device, capfd):
    (tmp_path / "text.txt").write_text("a cat sees a bird.\n" * 60)
    cfg = shrunk(path, tmp_path)
    lm = llm_jax.fit(cfg, workdir=tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1
    # Near-uniform over the vocabulary, as an untrained model is.
    assert line["loss"] == pytest.approx(np.log(lm.config.model.vocab_size), abs=0.5)
    assert line["grad_norm"] > 0
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
    assert capfd.readouterr().out == "a\n"


@pytest.mark.parametrize(
    "path", [path for path in FILES if load_file(str(path)).mesh.fsdp == -1], ids=lambda path: path.stem
)
def test_one_step_on_its_mesh(path, tmp_path):
    (tmp_path / "text.txt").write_text("a cat sees a bird.\n" * 60)
    cfg = shrunk(path, tmp_path)
    cfg.mesh.expert = load_file(str(path)).mesh.expert
    cfg.train.batch_size = 8 * cfg.train.accumulation_steps
    lm = llm_jax.fit(cfg, workdir=tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.log(lm.config.model.vocab_size), abs=0.5)


def test_a_config_without_its_text_says_how_to_give_it():
    for name in ("gpt2_124m", "llama_1b"):
        with pytest.raises(llm_jax.InputError, match=r"--config\.data\.path="):
            freeze(load_file(str(FILES[0].parent / f"{name}.py")))


def test_shards_without_their_tokenizer_say_how_to_give_it(tmp_path, one_device):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    cfg = load_file(str(FILES[0].parent / "gpt2_124m.py"))
    cfg.data.path, cfg.data.cache_dir = str(tmp_path), str(tmp_path / "cache")
    with pytest.raises(llm_jax.InputError, match="tokenizer.json"):
        llm_jax.fit(cfg, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
