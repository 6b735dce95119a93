"""Compiled for GPUs and TPUs that are not here: the reader of programs, the roofline, the words."""

import dataclasses
import datetime
import pathlib
import re

import jax
import pytest

from qkjax import chips, errors
from qkjax import config as config_lib
from qkjax.targets import estimate, hlo, launch, matrix, programs, roofline, target

# As XLA prints: a loop of 3 turns around a fusion that multiplies, updates 1 of 4 rows in place and
# reads 1 of 4; a sum over devices; fused attention; a scatter; a solver.
TEXT = (pathlib.Path(__file__).parent / "stored" / "program.hlo").read_text()
# Pieces of a real train step, compiled for a v5e: one layer of stacked kernels, read by a fusion in
# a fusion and multiplied, the result kept in a stack; copies to vector memory; splash attention.
TPU_TEXT = (pathlib.Path(__file__).parent / "stored" / "tpu_program.hlo").read_text()


def test_a_compiled_program_is_read():
    program = hlo.Program(TEXT)
    by_name = {kernel.name: kernel for kernel in program.kernels}
    assert list(by_name) == ["fused", "attended", "scattered", "solved", "result"]
    fused = by_name["fused"]
    assert fused.times == 3 and program.unknown_loops == 0
    (product,) = fused.products
    assert product == (("bf16", "bf16"), 2 * 8 * 32 * 16, False, "jit(step)/mlp/dot_general")
    # One row of x, all of w, the index; one row of the result, written in place.
    assert fused.bytes == 2 * 8 * 16 + 2 * 16 * 32 + 4 + 4 * 8 * 32
    assert by_name["attended"].attention == "forward"
    assert by_name["attended"].attention_flop == 2 * (2 * 128 * 4 * 32) * 128
    assert by_name["solved"].decompositions == 1 and not by_name["result"].decompositions
    assert by_name["result"].bytes == 2 * 4 * (4 * 8 * 32)
    assert by_name["scattered"].bytes == 4 * 8 + 3 * 4 * 8 * 16
    assert program.collectives == [("all-reduce", "f32", 4 * 4 * 8 * 32, 1)]
    assert program.donated() == {1}
    assert [unique for _, unique in program.scatters()] == [True]
    fused_away = {instruction.name for instruction, _ in program.buffers()}
    assert "dot" not in fused_away and {"fused", "scattered", "rows"} <= fused_away


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("((f32[4,8,32]), f32[8,8,32]) all-gather-start(%stack)", 2),
        ("f32[8,8,32] all-gather(%stack)", 2),
        ("((f32[4,8,32]), f32[2,8,32]) reduce-scatter-start(%stack)", 1),
        ("f32[2,8,32] reduce-scatter(%stack)", 1),
        ("((f32[4,8,32]), f32[4,8,32]) all-to-all-start(%stack)", 1),
        ("f32[4,8,32] all-reduce-start(%stack)", 1),
    ],
)
def test_transfers_count_all_of_what_is_gathered_or_scattered(instruction, expected):
    text = (
        "ENTRY %main (stack: f32[4,8,32]) -> f32[4,8,32] {\n"
        "  %stack = f32[4,8,32]{2,1,0} parameter(0)\n"
        f"  ROOT %moved = {instruction}, to_apply=%add\n"
        "}\n"
    )
    program = hlo.Program(text)
    (found,) = program.collectives
    kind = re.search(r" ([a-z-]+?)(-start)?\(%stack", instruction)[1]
    assert found == (kind, "f32", expected * 4 * 4 * 8 * 32, 1)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('f32[4,32,32]{2,1,0}, f32[4,32]{1,0}, s32[4]{0}) custom-call(%table), "gesvdj"', 1),
        ('f32[4,64,64]{2,1,0}, f32[4,64]{1,0}, s32[4]{0}) custom-call(%table), "gesvdj"', 4),
        ('f64[2,4,64,64]{3,2,1,0}, f64[2,4,64]{2,1,0}) custom-call(%table), "syevd"', 8),
        ('f64[2,4,64,64]{3,2,1,0}, f64[2,4,64]{2,1,0}) custom-call(%table), "syevd", jacobi', 1),
    ],
)
def test_decompositions_count_those_that_run_one_after_another(call, expected):
    """cuSOLVER has batches of SVD up to 32 x 32, and of Jacobi's eigenvalues."""
    shape, _, name = call.partition(") custom-call(%table), ")
    line = (
        f"  %solved = ({shape}) custom-call(%table), "
        f'custom_call_target="cusolver_{name.split(chr(34))[1]}_ffi"'
        + (", backend_config={algorithm = 2 : ui8, lower = true}" if "jacobi" in name else "")
    )
    (solved,) = (x for x in TEXT.splitlines() if x.startswith("  %solved"))
    kernels = hlo.Program(TEXT.replace(solved, line)).kernels
    assert sum(kernel.decompositions for kernel in kernels) == expected


def test_a_loop_without_a_known_number_of_turns_is_counted_and_taken_once():
    program = hlo.Program(TEXT.replace('{"known_trip_count":{"n":"3"}}', "{}"))
    assert program.unknown_loops == 1 and program.kernels[0].times == 1


def test_a_tpus_loop_says_its_turns_in_its_condition():
    text = TEXT.replace('{"known_trip_count":{"n":"3"}}', "{}").replace(
        "  ROOT %yes = pred[] constant(true)\n",
        "  %limit = s32[]{:T(128)} constant(22)\n"
        "  %turn = s32[]{:T(128)} get-tuple-element(%carry.1), index=0\n"
        "  ROOT %yes = pred[]{:T(512)} compare(%turn, %limit), direction=LT\n",
    )
    program = hlo.Program(text)
    assert program.unknown_loops == 0 and program.kernels[0].times == 22


def test_a_tpu_writes_products_as_convolutions_and_keeps_arrays_on_the_chip():
    text = TEXT.replace(
        "%dot = f32[8,32]{1,0} dot(%flat, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%dot = f32[8,32]{1,0} convolution(%flat, %p1), dim_labels=bf_io->bf",
    ).replace("%w = bf16[16,32]{1,0} c", "%w = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} c")
    fused = hlo.Program(text).kernels[0]
    assert fused.products[0].flop == 2 * 8 * 32 * 16
    assert fused.bytes == 2 * 8 * 16 + 4 + 4 * 8 * 32  # w is not read from memory


@pytest.mark.parametrize(
    ("left", "right", "result", "words", "flop"),
    [
        # As real programs have: 22 x 3 matrices; heads side by side, by padding; a sum over a batch
        # of 4; a batch by padding and dilation.
        (
            "f32[22,3,512,1344]",
            "f32[22,3,1344,512]",
            "f32[22,3,512,512]",
            "window={size=22x3 stride=21x2 lhs_dilate=22x3}, dim_labels=01bf_01io->01bf",
            2 * 66 * 512 * 1344 * 512,
        ),
        (
            "bf16[4,2048,512,1]",
            "bf16[8,64,512,1]",
            "bf16[4,2048,8,64]",
            "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 4 * 2048 * 512 * 8 * 64,
        ),
        (
            "bf16[4,512,2048]",
            "bf16[4,2048,256]",
            "f32[512,256,1]",
            "window={size=4}, dim_labels=0bf_0io->bf0",
            2 * 4 * 2048 * 512 * 256,
        ),
        (
            "bf16[4,8,256,32]",
            "bf16[4,8,32,64]",
            "f32[4,8,256,64]",
            "window={size=4x8 stride=4x7 pad=3_3x0_0 lhs_dilate=3x8 rhs_reversal=1x0}, "
            "dim_labels=01bf_01io->01bf",
            2 * 32 * 256 * 32 * 64,
        ),
    ],
)
def test_a_batch_of_products_on_a_tpu_is_a_window(left, right, result, words, flop):
    """Each result meets one element of a batch's axis, and all of one that is summed over."""
    text = (
        "HloModule m, entry_computation_layout={}\n\nENTRY %main () -> f32[] {\n"
        f"  %a = {left}{{0}} parameter(0)\n  %b = {right}{{0}} parameter(1)\n"
        f"  ROOT %c = {result}{{0}} convolution(%a, %b), {words}\n}}\n"
    )
    (kernel,) = hlo.Program(text).kernels
    assert [product.flop for product in kernel.products] == [flop]


def test_a_copy_to_the_chip_reads_its_array_once():
    copy = "  ROOT %result = f32[4,8,32]{2,1,0} copy(%same)\n"
    shapes = "f32[4,8,32]{2,1,0:S(1)}, f32[4,8,32]{2,1,0}, u32[]{:S(2)}"
    started = f"  %started = ({shapes}) copy-start(%same)\n"
    there, here = (
        hlo.Program(TEXT.replace(copy, start + copy)).kernels[-2]
        for start in (started, started.replace(":S(1)", ""))
    )
    assert there.name == "started" and there.bytes == 4 * 4 * 8 * 32
    assert here.bytes == 2 * there.bytes


def test_what_a_tpu_reads_and_writes_of_its_memory():
    by_name = {kernel.name: kernel for kernel in hlo.Program(TPU_TEXT).kernels}
    assert not any(name.startswith("custom-call") for name in by_name)  # they move nothing
    # Of 22 layers one is read and one is written; the other operand and result are on the chip.
    layer = by_name["bitcast_dynamic-update-slice_fusion.18"]
    assert layer.bytes == 2 * 512 * 1344 + 2 * 8192 * 1344
    assert [product.flop for product in layer.products] == [2 * 8192 * 512 * 1344]
    # What is sliced off to the chip is read, though no result is written.
    assert by_name["constant_dynamic-slice_fusion.35"].bytes == 2 * 256 * 128
    # Slices that overlap read nothing twice.
    last = "  ROOT %dynamic-slice.117 ="
    again = "  %slice.1 = bf16[3,1,256,128]{2,3,1,0:T(8,128)(2,1)} slice(%param_0.2262)\n"
    again += again.replace("slice.1", "slice.2")
    rows = hlo.Program(TPU_TEXT.replace(last, again + last))
    whole = next(k for k in rows.kernels if k.name == "constant_dynamic-slice_fusion.35")
    assert whole.bytes == 4 * 2 * 256 * 128
    assert by_name["copy-start.5"].bytes == 2 * 8192 * 512
    assert by_name["slice-start"].bytes == by_name["slice-start.1"].bytes == 2 * 2 * 2048 * 8 * 64
    assert by_name["copy.22"].bytes == 0  # from the chip to the chip
    assert {name for name, kernel in by_name.items() if kernel.is_copy} == {
        "copy-start.5",
        "slice-start",
        "slice-start.1",
    }


def test_arrays_of_a_tpu_are_padded_to_tiles():
    def bytes_of(array: str) -> int:
        text = TPU_TEXT.replace("%copy.22 = bf16[4,2048,8,64]{3,1,2,0:T(8,128)(2,1)S(1)}", array)
        assert text != TPU_TEXT
        return next(k.bytes for k in hlo.Program(text).kernels if k.name == "copy.22")

    whole = 4 * 2048 * 8 * 64
    for array, expected in (
        ("bf16[4,2048,8,64]{1,3,2,0:T(8,128)(2,1)}", 2 * whole),
        ("bf16[4,2048,8,64]{3,1,2,0:T(8,128)(2,1)}", 2 * 2 * whole),  # 64 lie in 128
        ("f32[4,2048,8,64]{2,3,1,0:T(8,128)}", 16 * 4 * whole),  # 8 lie in 128
        ("f32[4,2048,8,64]{3,2,1,0}", 4 * whole),
        ("f32[3,100]{1,0:T(4,128)}", 4 * 4 * 128),
        ("pred[300]{0:T(512)(128)(4,1)}", 512),
        ("s32[]{:T(128)}", 4 * 128),
        ("s32[]{:T(128)S(6)}", 0),  # scalar memory
    ):
        assert bytes_of(f"%copy.22 = {array}") == expected


def test_attention_of_one_sequence_a_device_has_no_batch_axis():
    text = re.sub(r"\[4,([48]),2048,(\d+)\]\{3,2,1,0", r"[\1,2048,\2]{2,1,0", TPU_TEXT)
    kernels = {k.attention: k for k in hlo.Program(text).kernels if k.attention}
    assert list(kernels) == ["forward", "backward of queries", "backward of keys"]
    square = 2 * 8 * 2048 * 2048 * 64
    assert [k.attention_flop for k in kernels.values()] == [square, 1.5 * square, 2 * square]


def test_attention_of_a_tpu_is_three_kernels():
    kernels = {k.attention: k for k in hlo.Program(TPU_TEXT).kernels if k.attention}
    assert list(kernels) == ["forward", "backward of queries", "backward of keys"]
    square = 2 * 4 * 8 * 2048 * 2048 * 64  # FLOP of a product; half of it is causal
    assert [k.attention_flop for k in kernels.values()] == [square, 1.5 * square, 2 * square]
    # 64 lie in 128, in device memory. Forward: keys and values; three arrays for sums, the output.
    keys, sums, out = 2 * 4 * 4 * 2048 * 128, 4 * 4 * 512 * 128, 2 * 4 * 8 * 2048 * 128
    assert kernels["forward"].bytes == 2 * keys + 3 * sums + out
    assert kernels["backward of queries"].bytes == 2 * keys + sums
    assert kernels["backward of keys"].bytes == 2 * keys + 2 * sums


def test_copies_hide_behind_products_as_far_as_the_memory_has_time():
    program = hlo.Program(TPU_TEXT)
    v5e = chips.table()["v5e"]
    slow = dataclasses.replace(v5e, bfloat16=1e9)  # products and attention take minutes
    computing = sum(p.flop for k in program.kernels for p in k.products) / (0.66 * 1e9)
    computing += sum(k.attention_flop for k in program.kernels) / (0.4 * 1e9)
    others = sum(
        k.bytes for k in program.kernels if not (k.products or k.attention or k.is_copy)
    ) / (0.9 * v5e.bandwidth)
    found = roofline.estimate(program, slow, 1)
    assert found.kernels == pytest.approx(computing + others, rel=1e-12)
    fast = dataclasses.replace(v5e, bfloat16=1e18)
    found = roofline.estimate(program, fast, 1)
    moved = sum(k.bytes for k in program.kernels)
    assert found.kernels == pytest.approx(moved / (0.9 * v5e.bandwidth))
    assert found.memory_bound == found.kernels


def test_the_roofline_takes_the_slower_of_moving_and_computing():
    program = hlo.Program(TEXT)
    h100 = chips.table()["h100"]
    alone = roofline.estimate(program, h100, 1)
    assert alone.transfers == 0 and alone.total == alone.kernels
    moved = sum(k.times * k.bytes for k in program.kernels) / (0.9 * h100.bandwidth)
    assert alone.kernels == pytest.approx(moved)  # nothing here computes for long
    slow = dataclasses.replace(h100, bfloat16=1e6)
    (product,) = program.kernels[0].products
    computing = 3 * product.flop / (0.66 * 1e6) + program.kernels[1].attention_flop / (0.4 * 1e6)
    found = roofline.estimate(program, slow, 8)
    rest = [k for k in program.kernels if not k.products and not k.attention]
    others = sum(k.bytes for k in rest) / (0.9 * h100.bandwidth)
    assert found.kernels == pytest.approx(computing + others)
    assert found.memory_bound == pytest.approx(others)
    assert found.transfers == pytest.approx(2 * 4096 * 7 / 8 / (0.8 * h100.link))


def test_targets_by_name():
    assert str(target.parse("H100")) == "h100:1" and target.parse("h200:8").num_devices == 8
    slice_ = target.parse("v5e:2x4")
    assert slice_.num_devices == 8 and slice_.chip.platform == "tpu"
    assert (slice_.extra, target.parse("a100").extra) == ("aot-tpu", "aot-gpu")
    for text, message in (
        ("h10", "unknown chip 'h10'. Did you mean 'h100'"),
        ("l4", "the compiler has no description of l4. Give one of h100, "),
        ("h100:", "expected a number of GPUs"),
        ("h100:2x4", "expected a number of GPUs"),
        ("v5e", "expected the sides of a slice"),
        ("v5e:0x4", "expected the sides of a slice"),
    ):
        with pytest.raises(errors.UsageError, match="--aot: ") as caught:
            target.parse(text)
        assert message in str(caught.value)


def test_chips_are_known_by_the_names_that_jax_gives_them():
    kinds = [kind for chip in chips.table().values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    for kind in ("NVIDIA B200", "NVIDIA L40S", "NVIDIA A10G", "NVIDIA L4", "TPU v6 lite"):
        chip = chips.of_kind(kind)
        assert chip is not None and 1e11 < chip.float32 < chip.bfloat16 < 3e15
        assert 1e10 < chip.memory < 3e11 < chip.bandwidth + 1e9 < 1e13
    assert chips.of_kind("cpu") is None
    lines = chips.hours_table(3600 * 989e12)  # an hour of an H100 at its peak
    h100 = next(line.split() for line in lines if line.startswith("h100 "))
    assert h100 == ["h100", "80", "GB", "2.50", "h", "5.00", "h"]
    lines = chips.hours_table(36 * 989e12)  # of a run at tiny: not 0.03 h
    h100 = next(line.split() for line in lines if line.startswith("h100 "))
    assert h100 == ["h100", "80", "GB", "90.00", "s", "180.00", "s"]


def small(**fields) -> config_lib.Config:
    """A model of 2 layers whose sizes are all different, in bfloat16 as on an accelerator."""
    values = config_lib.base("muon", "learned", "tiny")
    values.model.update(
        num_layers=2,
        d_model=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=160,
        vocab_size=640,
        sequence_length=256,
    )
    values.train.update(tokens_per_step=8 * 256, tokens=80 * 256, loss_chunk_tokens=512)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return config_lib.resolve(values)


def test_without_a_compiler_the_command_to_install_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.places, "checkout", lambda: tmp_path)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert launch.interpreter("gpu") is None
    with pytest.raises(
        errors.UsageError, match=r"--aot: the compiler for h100:1 .*the extra aot-gpu"
    ):
        launch.ask(small(), target.parse("h100"), ("train",))
    own = tmp_path / ".venv-aot" / "lib" / "python3.11" / "site-packages"
    (own / "libtpu").mkdir(parents=True)
    assert launch.interpreter("gpu") is None  # the other one's
    assert launch.interpreter("tpu") == str(tmp_path / ".venv-aot" / "bin" / "python")


def test_attention_of_other_devices_is_refused_before_compiling():
    for name, devices in (("splash", "TPUs"), ("cudnn", "NVIDIA GPUs")):
        config = small(model__attention=name).for_platform("cpu")
        with pytest.raises(errors.UsageError, match=f"{name} runs on {devices} only"):
            next(programs.compile_for(config, jax.devices()[:1]))


def test_a_compiler_that_fails_is_said_in_one_line(monkeypatch, tmp_path):
    python = tmp_path / "python"
    monkeypatch.setattr(launch, "interpreter", lambda platform: str(python))
    for script, kind, message in (
        ('echo \'{"error": "no memory", "exit_code": 1}\'', errors.OutOfMemoryError, "no memory"),
        ('echo \'{"error": "a field", "exit_code": 2}\'', errors.UsageError, "a field"),
        (
            "echo noise; echo broken plugin >&2; exit 3",
            errors.UsageError,
            r"code 3 \(broken plugin",
        ),
    ):
        python.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
        python.chmod(0o755)
        with pytest.raises(kind, match=message):
            launch.ask(small(), target.parse("h100"), ("train",))


def described(name: str, seconds: float, **fields) -> dict:
    return {
        "name": name,
        "device_bytes": 2_000_000_000,
        "kernels": 5,
        "bytes": 10,
        "decompositions": 0,
        "product_flop": {"bf16": 1e12},
        "attention_flop": 0.0,
        "collectives": {},
        "seconds": {"total": seconds, "memory_bound": 0.0, "transfers": 0.0, "kernels": seconds},
        **fields,
    }


def test_hours_and_cost_of_a_run_are_those_of_its_programs(monkeypatch, capsys):
    config = small(eval__tokens=16 * 256, eval__at_tokens=())
    sums = {"all-reduce f32": {"times": 3, "bytes": 6_000_000}}
    answers = [
        described("train", 0.5, collectives=sums),
        described("evaluate", 7.0),
        described("decompose", 11.0, decompositions=1584),
    ]
    answers[2]["device_bytes"] = 1e9  # the others take 2
    monkeypatch.setattr(launch, "ask", lambda *arguments: answers)
    found = estimate.make(config, target.parse("h100:2"))
    assert capsys.readouterr().err == (
        "compiling muon_qk, scale tiny, for h100:2\n"
        "compiled muon_qk, scale tiny: 2.00 of 80 GB a device\n"
    )
    # 10 steps; evaluations before the first and after the last, each of one batch of 2 x 8 rows.
    assert found.hours == pytest.approx((10 * 0.5 + 2 * 7 + 2 * 11) / 3600)
    assert found.step.tokens_per_second == 8 * 256 / 0.5
    assert found.step.compiled_flop == 2e12
    assert found.step.mfu == pytest.approx(found.step.model_flop / 0.5 / (2 * 989e12))
    text = estimate.describe(found, 3600.0)
    assert "attention cudnn, bfloat16, 2 of 2 layers" in text
    assert f"{2 * 3600 * found.hours:,.2f} at 3600 an hour" in text
    assert "train: 3 all-reduce f32, 6.00 MB" in text and "1,584 calls" in text
    assert "2.00 of 80 GB" in text and "FIT" not in text
    answers[0]["device_bytes"] = 81e9
    assert "IT DOES NOT FIT" in estimate.describe(estimate.make(config, found.target), None)


def test_a_row_of_the_matrix_replaces_its_own_and_leaves_the_others():
    page = "# T\n\n<!-- table -->\n<!-- end of table -->\nafter\n"
    for row in (
        "| full | muon_qk | v5e:2x4 | 1 |",
        "| tiny | adamw_qk | h100:8 | 2 |",
        "| full | muon_qk | h100:1 | 3 |",
        "| full | muon_qk | v5e:2x4 | 4 |",
    ):
        page = matrix.with_row(page, row)
    lines = page.splitlines()
    assert lines[0] == "# T" and lines[-2:] == ["<!-- end of table -->", "after"]
    assert [line for line in lines if line.startswith(("| tiny", "| full"))] == [
        "| tiny | adamw_qk | h100:8 | 2 |",
        "| full | muon_qk | h100:1 | 3 |",
        "| full | muon_qk | v5e:2x4 | 4 |",
    ]
    assert page == matrix.with_row(page, "| full | muon_qk | v5e:2x4 | 4 |")


def test_the_matrix_names_what_is_refused_and_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(launch, "interpreter", lambda platform: "x" if platform == "gpu" else None)
    said = []

    def ask(config, aim, programs):
        said.append((str(aim), config.model.d_model, programs))
        if aim.num_devices == 8:
            raise errors.UsageError("train.tokens_per_step: 2 sequences a step for 8 devices")
        return [described("train", 0.5)]

    monkeypatch.setattr(launch, "ask", ask)
    found = list(matrix.rows(["small", "muon_qk", "h100:1", "h100:8", "v5e:2x4"]))
    assert [row.split(" | ")[:3] for row in found] == [
        ["| small", "muon_qk", name] for name in ("h100:1", "h100:8", "v5e:2x4")
    ]
    assert "| 2.00 of 80 | 0.0 | 0.00 | 500.0 | 1,024 | 0% |" in found[0]
    assert "refused: train.tokens_per_step: 2 sequences a step for 8 devices | |" in found[1]
    assert "aot-tpu is not installed" in found[2]
    assert said[0] == ("h100:1", 256, ("train",))
    assert {row.count("|") for row in found} == {11}
    made = [row.split("|")[-2].strip() for row in found]
    today = str(datetime.date.today())
    assert [words.split(" ")[:2] for words in made] == [[f"{today},", "jax"]] * 3
    assert "libtpu" not in made[0] and "cuda" not in made[2]  # the compiler of its own target
    with pytest.raises(errors.UsageError, match="h10: no target, scale or arm"):
        list(matrix.rows(["h10"]))
