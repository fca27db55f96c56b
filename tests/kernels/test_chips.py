"""Block sizes follow from what a chip says of itself, and a config that does not fit steps down."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from r1zero.kernels import chips
from r1zero.kernels.attention import BLOCKS, BLOCKS_OF_LATENTS, Heads, attention_config, shared_bytes
from r1zero.kernels.chips import KIB, KNOWN_CHIPS, Chip, chip_of, stepped_down
from r1zero.kernels.decode_attention import decode_attention_config
from r1zero.kernels.dispatch import HAS_TRITON
from r1zero.kernels.linear_logprob import SLICE, logprob_config
from r1zero.kernels.mlp import swiglu_config
from r1zero.kernels.rmsnorm import rmsnorm_bwd_config

LATENT = Heads(192, 128, 1)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = Chip(199, 48 * KIB, 7)  # nobody has thought of this one
EVERY_CHIP = [*KNOWN_CHIPS.values(), SMALL]


def test_a_chip_is_what_the_device_says(monkeypatch):
    said = SimpleNamespace(major=12, minor=1, shared_memory_per_block_optin=101_376, multi_processor_count=48,
                           name="whatever")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    chips._asked.cache_clear()
    assert chip_of(torch.device("cuda", 0)) == Chip(121, 101_376, 48)
    chips._asked.cache_clear()
    for device in ("cpu", "meta"):
        assert chip_of(torch.device(device)) is KNOWN_CHIPS[80]


def test_the_figures_of_known_chips():
    shared = {arch: chip.shared_memory for arch, chip in KNOWN_CHIPS.items()}
    assert shared == {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448,
                      103: 232_448, 120: 101_376}
    units = {arch: chip.matrix_unit for arch, chip in KNOWN_CHIPS.items()}
    assert {arch for arch, unit in units.items() if unit == "mma"} == {80, 86, 87, 89, 120}
    assert units[90] == "wgmma" and units[100] == units[103] == "tcgen05" and SMALL.matrix_unit == "mma"


def test_a_config_steps_down_in_order_until_it_fits():
    steps = (("BLOCK", 16), ("num_stages", 1), ("ROWS", 1))
    config = {"BLOCK": 64, "num_stages": 3, "ROWS": 4, "num_warps": 8}

    def at(room):
        return stepped_down(config, lambda c: c["BLOCK"] * c["num_stages"] * c["ROWS"],
                            replace(SMALL, shared_memory=room), steps)

    assert at(768) == config and at(767) == {**config, "BLOCK": 32}
    assert at(130) == {**config, "BLOCK": 16, "num_stages": 2}
    assert at(0) == {"BLOCK": 16, "num_stages": 1, "ROWS": 1, "num_warps": 8}  # no less than the smallest
    assert config["BLOCK"] == 64


@needs_triton
def test_attention_takes_the_table_where_it_fits_and_less_where_it_does_not():
    less = set()
    for chip in EVERY_CHIP:
        for dtype in DTYPES:
            for kernel in ("fwd", "dkdv", "dq"):
                unit = "fp32" if dtype == torch.float32 else chip.matrix_unit
                table = BLOCKS[kernel, unit]
                in_table = {Heads(D, D, 1): sizes for D, sizes in zip((32, 64, 128, 256), table, strict=True)}
                in_table[LATENT] = BLOCKS_OF_LATENTS[kernel, unit]
                for heads, sizes in in_table.items():
                    config = attention_config(kernel, heads, dtype, chip, 4096)
                    needed = shared_bytes(kernel, heads, dtype, chip, config)
                    assert needed <= chip.shared_memory or chip is SMALL and dtype == torch.float32
                    if sizes_of(config) != sizes:
                        less.add((chip.arch, kernel, heads[:2]))
    # 102,400 bytes, where these chips have 101,376
    assert {found for found in less if found[0] != SMALL.arch} == {
        (arch, "dq", widths) for arch in (86, 89, 120) for widths in ((256, 256), (192, 128))}
    assert (SMALL.arch, "fwd", (64, 64)) in less


@needs_triton
def test_the_wider_of_keys_and_values_picks_the_column_but_for_latents():
    def sizes(key_width, value_width, group=1):
        heads = Heads(key_width, value_width, group)
        return sizes_of(attention_config("dkdv", heads, torch.bfloat16, KNOWN_CHIPS[90], 4096))

    columns = BLOCKS["dkdv", "wgmma"]
    assert [sizes(*widths) for widths in ((24, 16), (48, 32), (32, 64), (128, 64))] == [
        columns[0], columns[1], columns[1], columns[2]]
    assert sizes(192, 128) == sizes(256, 8) == BLOCKS_OF_LATENTS["dkdv", "wgmma"]
    assert sizes(192, 129) == sizes(128, 192) == columns[3]
    # these would spill registers with larger tiles
    assert sizes(192, 128, 2) == sizes(64, 128) == sizes(32, 80) == columns[3]


def sizes_of(config):
    return tuple(config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))


# on sm_80 and sm_86, as compiled by Triton 3.7
MEASURED = [
    ("fwd", (64, 64), "bfloat16", (128, 64, 8, 3), 49_152),
    ("fwd", (128, 128), "bfloat16", (128, 32, 8, 2), 49_152),
    ("fwd", (256, 256), "bfloat16", (64, 32, 8, 2), 69_632),
    ("fwd", (128, 128), "bfloat16", (16, 32, 4, 2), 21_504),
    ("fwd", (128, 128), "float32", (16, 32, 8, 1), 26_688),
    ("fwd", (256, 256), "float32", (16, 16, 8, 1), 33_856),
    ("dkdv", (128, 128), "bfloat16", (32, 64, 8, 2), 53_504),
    ("dkdv", (256, 256), "bfloat16", (16, 64, 8, 1), 90_112),
    ("dkdv", (256, 256), "float32", (16, 16, 8, 1), 67_584),
    ("dq", (128, 128), "bfloat16", (64, 64, 8, 2), 69_632),
    ("dq", (256, 256), "bfloat16", (64, 32, 8, 2), 102_400),
    ("dq", (256, 256), "bfloat16", (64, 16, 8, 2), 86_016),
    ("dq", (128, 128), "float32", (32, 32, 8, 1), 65_536),
    ("dq", (256, 256), "float32", (16, 16, 8, 1), 65_536),
    ("fwd", (192, 128), "bfloat16", (128, 32, 8, 2), 90_112),
    ("dkdv", (192, 128), "bfloat16", (16, 64, 8, 2), 63_616),
    ("dq", (192, 128), "bfloat16", (64, 64, 8, 2), 102_400),
    ("dq", (192, 128), "bfloat16", (64, 32, 8, 2), 77_824),
]


@needs_triton
@pytest.mark.parametrize("kernel, widths, dtype, sizes, measured", MEASURED)
def test_the_compiler_takes_no_more_shared_memory_than_estimated(kernel, widths, dtype, sizes, measured):
    config = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))
    estimate = shared_bytes(kernel, Heads(*widths, 1), getattr(torch, dtype), KNOWN_CHIPS[86], config)
    assert measured <= estimate <= 2 * measured


@needs_triton
def test_the_other_ops_fit_as_well():
    for chip in EVERY_CHIP:
        for dtype in DTYPES:
            for softcap in (0.0, 1.0):
                config = logprob_config("tiles", dtype, chip, 2048, softcap)
                tiles = (config["BLOCK_T"] + config["BLOCK_V"]) * config["BLOCK_K"]
                buffers = chip.buffers(config["num_stages"])
                assert dtype.itemsize * buffers * tiles <= chip.shared_memory
                assert SLICE % config["BLOCK_V"] == 0 == config["BLOCK_V"] % config["BLOCK_K"]
            for head_dim in (16, 128, 256):
                config = decode_attention_config(head_dim, dtype, 6, chip)
                assert config["BLOCK_N"] >= 16
        stages = rmsnorm_bwd_config(8192, 10**6, chip)[1]["STAGES"]
        assert stages == (1 if chip is SMALL else 2)
    assert logprob_config("tiles", torch.bfloat16, SMALL, 2048)["num_stages"] == 2
    assert decode_attention_config(256, torch.bfloat16, 20, SMALL)["BLOCK_N"] == 16


@needs_triton
def test_small_programs_may_take_the_registers_they_need():
    chip, bf16 = KNOWN_CHIPS[120], torch.bfloat16

    def limit(kernel, head_dim, max_q, softcap=0.0):
        heads = Heads(head_dim, head_dim, 1)
        return attention_config(kernel, heads, bf16, chip, max_q, softcap).get("maxnreg")

    assert limit("fwd", 128, 1) == limit("dkdv", 16, 4096) == limit("dq", 64, 4096, 30.0) == 255
    # without a softcap three of them run at a time on sm_80; larger ones take what there is anyway
    assert limit("dq", 64, 4096) is limit("dq", 128, 4096, 30.0) is limit("fwd", 64, 4096, 30.0) is None
    assert decode_attention_config(16, bf16, 6, chip)["maxnreg"] == 255
    assert "maxnreg" not in decode_attention_config(64, bf16, 6, chip)
    assert [swiglu_config(F)["num_warps"] for F in (1, 24, 33, 4864)] == [8, 8, 4, 4]


@needs_triton
def test_rmsnorm_has_as_many_programs_as_the_chip_runs_at_one_time():
    for chip in EVERY_CHIP:
        assert rmsnorm_bwd_config(1024, 10**6, chip)[0] == 8 * chip.processors
        assert rmsnorm_bwd_config(8192, 10**6, chip)[0] == chip.processors
        assert rmsnorm_bwd_config(1024, 80, chip)[0] == min(10, 8 * chip.processors)
