"""Seconds on a GPU as its ceilings give them, and what they decide."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random
from torch import nn

from sparsec import registry, trace
from sparsec.backends.kernel.cuda import ceilings, roofline
from sparsec.backends.kernel.cuda.ceilings import H200
from sparsec.backends.kernel.cuda.choice import candidates, choose, seconds
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.cost import DENSE, TokenRange
from sparsec.errors import UsageError
from sparsec.pattern import NM, VNM, Pattern

PATTERNS = ("2:4", "64:2:5", "64:2:8", "128:2:8", "64:2:16", "32:2:8", "64:2:20", "64:2:8@strip")
sizes, counts = st.integers(1, 20_000), st.integers(1, 10_000)


def test_a_dense_product_takes_what_binds_first() -> None:
    assert 2.5e-6 == roofline.dense(H200, 64, 64, 1)  # a launch
    assert 2 * (4096 * 4096 + 2 * 16 * 4096) / 4.3e12 == pytest.approx(roofline.dense(H200, 4096, 4096, 16))  # memory
    assert 2 * 4096**3 / 790e12 == pytest.approx(roofline.dense(H200, 4096, 4096, 4096))  # tensor cores


def test_few_tokens_are_bound_by_the_weights_in_memory() -> None:
    """172 panels of 32 steps, and one token: 4672 bytes a step."""
    form = Form(VNM(64, 2, 8), 11008, 4096)
    moved = 172 * 32 * 4672 + 2 * (11008 + 4096)

    assert 1e-6 + moved / 4.3e12 == pytest.approx(roofline.panels(H200, form, 1))


def test_many_tokens_are_bound_by_the_tensor_cores_where_nothing_else_is() -> None:
    free = dataclasses.replace(H200, l2_bytes=1e18, gather_bytes={4: 1e18}, memory_bytes=1e18)
    form, tokens = Form(VNM(64, 2, 8), 132 * 256, 4096), 128  # one round of 132 thread blocks
    expected = 1e-6 + 2 * form.rows * (4096 // 2) * tokens / H200.sparse_flops  # half of the columns are gathered

    assert expected == pytest.approx(roofline.panels(free, form, tokens, side_by_side=True))
    assert expected + 2.5e-6 == pytest.approx(roofline.panels(free, form, tokens))  # and a copy of x


@given(st.sampled_from(PATTERNS), sizes, sizes, counts)
def test_no_product_is_faster_than_its_memory_or_a_launch(text: str, rows: int, cols: int, tokens: int) -> None:
    form = Form(Pattern.parse(text), rows, cols)
    least = max(2.5e-6, (form.nbytes + 2 * tokens * (rows + cols)) / H200.memory_bytes)

    assert least <= roofline.panels(H200, form, tokens)
    assert 2.5e-6 <= roofline.two_of_four(H200, rows, cols, tokens)


@given(st.sampled_from(PATTERNS), sizes, sizes, counts, st.floats(1.01, 4))
def test_a_gpu_that_does_more_is_never_slower(text: str, rows: int, cols: int, tokens: int, times: float) -> None:
    form, gather = Form(Pattern.parse(text), rows, cols), {m: times * rate for m, rate in H200.gather_bytes.items()}
    rates = {name: times * getattr(H200, name) for name in ("sparse_flops", "l2_bytes", "memory_bytes")}
    faster = roofline.panels(dataclasses.replace(H200, gather_bytes=gather, **rates), form, tokens)

    assert faster <= roofline.panels(H200, form, tokens)


def test_what_a_kernel_reached_slows_its_figures_only() -> None:
    half = dataclasses.replace(H200, reached={"window": 0.5})
    form = Form(VNM(64, 2, 8), 4096, 4096)
    before, after = (roofline.panels(one, form, 4096, side_by_side=True) for one in (H200, half))

    assert 2 * (before - 1e-6) == pytest.approx(after - 1e-6)
    assert roofline.panels(H200, form, 1) == roofline.panels(half, form, 1)


def test_an_unknown_m_gathers_like_the_next_smaller_one() -> None:
    assert [29.7e12, 15.4e12, 15.4e12, 12.7e12] == [H200.gather(m) for m in (4, 5, 7, 20)]


@pytest.mark.parametrize(
    ("pattern", "tokens", "expected"),
    [
        ("2:4", "16", "panels"),
        ("2:4", "2048-4096", "cuSPARSELt"),
        ("64:2:5", "1-16", "panels"),
        ("64:2:5", "2048-4096", "dense"),
        ("64:2:16", "2048-4096", "panels"),
        ("1:4", "1-512", "cuSPARSELt"),
        ("3:8", "1-512", "dense"),
    ],
)
def test_the_fastest_form_is_chosen_for_the_tokens(pattern: str, tokens: str, expected: str) -> None:
    chosen = choose(Pattern.parse(pattern), 4096, 4096, H200, TokenRange.parse(tokens))

    assert (expected, expected != "dense") == (chosen.kernel, chosen.sparse)
    assert bool(chosen.reason) == (expected == "dense")


def test_an_activation_counts_for_forms_that_do_not_apply_it() -> None:
    pattern, tokens = NM(2, 4), TokenRange.parse("2048-4096")
    plain = {kernel: seconds(H200, kernel, pattern, 4096, 4096, 4096) for kernel in ("panels", "cuSPARSELt", "dense")}
    behind = {kernel: seconds(H200, kernel, pattern, 4096, 4096, 4096, operators=8) for kernel in plain}

    assert plain["panels"] == behind["panels"]
    for kernel in ("cuSPARSELt", "dense"):
        assert plain[kernel] + 8 * 4 * 4096 * 4096 / 4.3e12 == pytest.approx(behind[kernel])
    assert 8 * 2.5e-6 == pytest.approx(8 * roofline.elementwise(H200, 64, 64))  # a launch each
    assert ["cuSPARSELt", "panels"] == [choose(pattern, 4096, 4096, H200, tokens, operators=n).kernel for n in (0, 8)]


def test_slower_is_a_reason_that_says_what_it_rests_on() -> None:
    chosen = choose(Pattern.parse("64:2:5"), 4096, 4096, H200)
    measured = choose(Pattern.parse("64:2:5"), 4096, 4096, dataclasses.replace(H200, basis="measured"))

    assert "x at 1-512 tokens on NVIDIA H200 (a model, not measured)" in chosen.reason
    assert "on NVIDIA H200 (measured kernels)" in measured.reason


def test_nothing_is_decided_by_speed_where_nothing_is_known() -> None:
    assert "panels" == choose(Pattern.parse("64:2:5"), 4096, 4096, None).kernel
    assert "every 32 rows anew" in choose(Pattern.parse("96:2:5"), 4096, 4096, None).reason


def test_torchs_product_is_a_candidate_for_what_is_2_4_in_a_shape_it_takes() -> None:
    of = {text: candidates(Pattern.parse(text), 4096, 4096) for text in ("2:4", "64:2:8", "64:2:5", "8:2:8", "3:8")}

    assert ("panels", "cuSPARSELt") == of["2:4"] == of["64:2:8"]
    assert (("panels",), ("cuSPARSELt",), ()) == (of["64:2:5"], of["8:2:8"], of["3:8"])
    assert ("panels",) == candidates(NM(2, 4), 4096, 4096, two_of_four=False) == candidates(NM(2, 4), 4090, 4096)
    assert ("panels",) == candidates(NM(2, 4), 4096, 4096, moved=True)


def test_seconds_of_a_form_are_those_of_its_kernel() -> None:
    for kernel, expected in [
        ("dense", roofline.dense(H200, 4096, 1024, 99)),
        ("cuSPARSELt", roofline.two_of_four(H200, 4096, 1024, 99)),
        ("panels", roofline.panels(H200, Form(NM(2, 4), 4096, 1024), 99)),
    ]:
        assert expected == seconds(H200, kernel, NM(2, 4), 4096, 1024, 99)


def test_a_table_is_read_as_it_was_written(tmp_path) -> None:
    table = dataclasses.replace(H200, basis="measured", reached={"decode": 0.8})
    ceilings.write(tmp_path / "new" / "table.json", table)

    assert table == ceilings.read(tmp_path / "new" / "table.json")
    assert ceilings.read(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    "damage",
    [{"l2_bytes": -1}, {"l2_bytes": "fast"}, {"gather_bytes": {"5": 1e12}}, {"basis": "guessed"}, {"more": 1},
     {"reached": None}, {"reached": {"gemm": 0}}],
)  # fmt: skip
def test_a_damaged_table_is_as_good_as_none(tmp_path, damage: dict) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(dataclasses.asdict(H200) | damage))

    assert ceilings.read(file) is None


def test_a_table_that_cannot_be_kept_is_told(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"the table of NVIDIA H200 cannot be kept: .*XDG_CACHE_HOME"):
        ceilings.write(tmp_path / "file" / "table.json", H200)


def hopper(monkeypatch, name: str, processors: int = 132) -> None:
    found = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=processors, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_the_table_of_a_gpu_is_the_measured_one_else_the_shipped_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hopper(monkeypatch, "NVIDIA H200")
    measured = dataclasses.replace(H200, basis="measured")

    assert H200 == ceilings.of_gpu(0) == ceilings.named("cuda") == ceilings.named("H200")
    ceilings.write(ceilings.cache_file("NVIDIA H200", H200.device), measured)
    assert measured == ceilings.of_gpu(0) == ceilings.named("cuda:0")
    hopper(monkeypatch, "NVIDIA H200", processors=16)  # a slice of one
    assert ceilings.of_gpu(0) is None


def test_a_device_without_a_table_is_told_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"no table of device 'a100'; expected cuda .* known: h200"):
        ceilings.named("a100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cuda: no CUDA GPU was found"):
        ceilings.named("cuda")
    hopper(monkeypatch, "NVIDIA A100", processors=108)
    with pytest.raises(UsageError, match="NVIDIA A100 was not measured yet; run: sparsec bench --calibrate"):
        ceilings.named("cuda")
    for device, words in (("cuda:3", "has 1 CUDA GPUs"), ("cudax", "cannot be read")):
        with pytest.raises(UsageError, match=words):
            ceilings.named(device)


def test_a_site_is_planned_and_timed_as_it_would_run_there() -> None:
    """Of a model in float32, which a GPU would run in bf16."""
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 8)).eval()
    program = trace(net, {"input": random(2, 64)}).clone()
    program = program.replace(sites=program.sites.with_targets({"*": "64:2:5"}))
    there, shape = registry.backend("kernel").on("h200"), (3, 4096, 4096)
    names = [site.name for site in program.sites.sparse]
    patterns = [Pattern.parse(text) for text in ("64:2:5", "2:4", "3:8")]

    assert [("panels", True)] * 2 == [(one.kernel, one.sparse) for one in there.plan(program)]
    assert names == [one.site for one in there.plan(program, tokens=TokenRange(2048, 2048))]
    assert {"dense"} == {one.kernel for one in there.plan(program, "int8")}
    assert "model" == there.cost_basis(patterns[0])
    assert (
        3 * roofline.dense(H200, 4096, 4096, 16) == there.cost(shape, DENSE, 16) == there.cost(shape, patterns[2], 16)
    )
    assert 3 * seconds(H200, "panels", patterns[0], 4096, 4096, 16) == there.cost(shape, patterns[0], 16)
    assert 3 * roofline.two_of_four(H200, 4096, 4096, 4096) == there.cost(shape, patterns[1], 4096)
    assert registry.backend("kernel").on("cpu").runs_on() == "this machine"


def test_a_prediction_takes_an_activation_as_what_would_be_chosen_does() -> None:
    """64:2:8 is 2:4 too; written out, the activation takes longer than the kernel that would apply it."""
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 8)).eval()
    program = trace(net, {"input": random(2, 64)})
    program = program.replace(sites=program.sites.with_targets({"*": "64:2:8"}))
    there, shape, pattern = registry.backend("kernel").on("h200"), (1, 4096, 4096), Pattern.parse("2:4")
    forms = {kernel: seconds(H200, kernel, pattern, 4096, 4096, 4096) for kernel in ("panels", "cuSPARSELt")}
    one = roofline.elementwise(H200, 4096, 4096)
    (first, *_) = program.sites.sparse

    assert {"gelu": first.name} == there.absorbed(program)
    assert forms["cuSPARSELt"] < forms["panels"] < forms["cuSPARSELt"] + 8 * one
    assert forms["cuSPARSELt"] == there.cost(shape, pattern, 4096) == there.cost_activated(shape, pattern, 4096, 0)
    assert [min(forms["cuSPARSELt"] + n * one, forms["panels"]) for n in (1, 8)] == [
        there.cost_activated(shape, pattern, 4096, n) for n in (1, 8)
    ]
    assert there.cost(shape, DENSE, 4096) == there.cost_activated(shape, DENSE, 4096, 8)
    there._table = UP_ON_PANELS
    assert ["panels", "cuSPARSELt"] == [each.kernel for each in there.plan(program, tokens=TokenRange(16, 16))]


# At 16 tokens 64 x 64 weights take a second dense or as 2:4, an activation one more, and panels 1.5 seconds.
UP_ON_PANELS = dataclasses.replace(
    H200, launch_seconds=1.0, sparse_flops=2 * 64 * 64 * 16 * H200.device.multiprocessors / 1.5
)
