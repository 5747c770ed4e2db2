"""Flops of kernels against counts by hand; test_hlo_tpu.py has those of real programs."""

from llm_jax import hlo, kernel_flops
from llm_jax.config import ModelConfig


def test_attention_counts_the_blocks_that_are_seen():
    assert kernel_flops.pairs_seen(128, 128, 128) == 128 * 128
    assert kernel_flops.pairs_seen(1024, 1024, 1024) == 512 * 512 * 3  # two blocks on the diagonal and one below it
    assert kernel_flops.pairs_seen(2048, 2048, 512) == 512 * 512 * (
        1 + 2 + 2 + 2
    )  # its own block, and the one before
    assert kernel_flops.pairs_seen(512, 2048, 2048) == 512 * 2048  # the last quarter of a text


# From a TPU's program: two of eight experts are on the device.
EXPERTS = """HloModule experts

ENTRY main (counts: s32[2], rows: bf16[256,64], weights: bf16[2,64,128]) -> bf16[256,128] {
  counts = s32[2]{0} parameter(0)
  rows = bf16[256,64]{1,0} parameter(1)
  weights = bf16[2,64,128]{2,1,0} parameter(2)
  meta = s32[2]{0} custom-call(counts), custom_call_target="tpu_custom_call"
  ROOT ragged-dot-none.1 = bf16[256,128]{1,0} custom-call(meta, rows, weights), custom_call_target="tpu_custom_call"
}
"""


def test_experts_take_their_share_of_the_rows():
    flops = kernel_flops.KernelFlops(ModelConfig(n_expert=8, n_expert_per_token=2))
    calls = hlo.parse(EXPERTS).entry.instructions
    assert flops(calls["ragged-dot-none.1"]) == 2 * (256 * 2 / 8) * 64 * 128
    assert flops(calls["meta"]) == 0
