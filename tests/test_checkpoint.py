import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax.errors import InputError


def trees(step):
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(2, step, jnp.bfloat16)},
        "opt_state": (jnp.int32(step), {"mu": jnp.ones(3) / step}),
    }


def save_all(folder, losses, keep=2):
    """Checkpoints 1, 2, ... with these val_losses."""
    with checkpoint.open_checkpoints(folder, keep=keep) as manager:
        for step, val_loss in enumerate(losses, 1):
            checkpoint.save(manager, step, trees(step), val_loss=val_loss)
    return checkpoint.open_checkpoints(folder, create=False)


def like(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)


def test_the_newest_and_the_best_are_kept(tmp_path):
    with save_all(tmp_path, [3.0, 1.0, 2.0, 2.5, 2.7]) as manager:
        assert sorted(manager.all_steps()) == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "4", "5"]


def test_pick_step(tmp_path):
    with save_all(tmp_path, [3.0, 1.0, 2.0, 2.5, 2.7]) as manager:
        assert checkpoint.pick_step(manager, "best") == 2
        assert checkpoint.pick_step(manager, "last") == 5
        assert checkpoint.pick_step(manager, 4) == checkpoint.pick_step(manager, "4") == 4
        for wrong in (3, "3", "first", "-1"):
            with pytest.raises(InputError, match=rf"{wrong}.*best, last, 2, 4, 5"):
                checkpoint.pick_step(manager, wrong)


def test_among_equal_losses_the_newest_is_best_and_without_losses_the_last(tmp_path):
    with save_all(tmp_path / "equal", [1.0, 1.0, None], keep=3) as manager:
        assert checkpoint.pick_step(manager, "best") == 2
    with save_all(tmp_path / "none", [None, None]) as manager:
        assert checkpoint.pick_step(manager, "best") == 2


@pytest.mark.parametrize(
    "losses, kept, best", [([3.0, 1.0, 2.0, math.nan, math.nan], [2, 4, 5], 2), ([math.nan, math.nan], [1, 2], 2)]
)
def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, losses, kept, best):
    with save_all(tmp_path, losses) as manager:
        assert sorted(manager.all_steps()) == kept
        assert checkpoint.pick_step(manager, "best") == best


def test_an_empty_folder_is_an_error(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as manager, pytest.raises(InputError, match="no checkpoint"):
        checkpoint.pick_step(manager, "last")


def test_what_is_saved_comes_back_bit_for_bit_and_each_tree_alone(tmp_path):
    with save_all(tmp_path, [None, None]) as manager:
        whole = checkpoint.restore(manager, 2, like(trees(2)))
        jax.tree.map(np.testing.assert_array_equal, whole, trees(2))
        assert whole["params"]["b"].dtype == jnp.bfloat16
        assert jax.tree.structure(whole) == jax.tree.structure(trees(2))
        params = checkpoint.restore(manager, 1, like({"params": trees(1)["params"]}))
        jax.tree.map(np.testing.assert_array_equal, params, {"params": trees(1)["params"]})


def test_a_checkpoint_that_cannot_be_read_says_so(tmp_path, caplog, capsys):
    with save_all(tmp_path, [None]) as manager:
        caplog.clear()
        for wrong, told in (
            ({"params": {"w": jnp.zeros((2, 4)), "b": jnp.zeros(2)}}, r"shapes \[2, 3\], .* makes \[2, 4\]"),
            ({"params": {"w": jnp.zeros((2, 3))}}, r"shapes \[2\], .* makes no more"),  # another tree
            ({"ema": {"w": jnp.zeros((2, 3))}}, "holds no ema, only opt_state, params"),
        ):
            with pytest.raises(InputError, match=told):
                checkpoint.restore(manager, 1, like(wrong))
        assert not caplog.records and capsys.readouterr().err == ""  # as orbax's threads would leave
    for file in (tmp_path / "1" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[::-1])
    with checkpoint.open_checkpoints(tmp_path, create=False) as manager:
        with pytest.raises(InputError, match="remove it"):
            checkpoint.restore(manager, 1, like({"params": trees(1)["params"]}))


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path):
    """Training donates the buffers that are being saved to the next step."""
    with checkpoint.open_checkpoints(tmp_path) as manager:
        tree = {"params": {"w": jnp.arange(100_000.0)}}
        checkpoint.save(manager, 1, tree, val_loss=None)
        overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
        overwrite(tree["params"]["w"]).block_until_ready()
    with checkpoint.open_checkpoints(tmp_path, create=False) as manager:
        shapes = like({"params": {"w": jnp.zeros(100_000)}})
        np.testing.assert_array_equal(checkpoint.restore(manager, 1, shapes)["params"]["w"], np.arange(100_000.0))
