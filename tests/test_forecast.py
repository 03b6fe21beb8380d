"""Forecasts: bytes against a step that is weighed, on tensors without data and on four ranks; traffic; properties."""

import dataclasses
import functools
import json
from pathlib import Path

import conftest
import pytest
import torch
import tyro

from odit import checks, config, data, forecast, memory, pace, plan, random, rates, train
from odit.bench import forecasts
from odit.config import Parallel
from odit.data import loader
from odit.footprint import footprint, pretend, weights
from odit.models import dit
from odit.parallel import recorder

H200 = rates.load("h200")
KEY = random.key(5)
RUN = dataclasses.replace(
    config.presets()["digits"][1],
    global_batch=16,
    precision="bf16",
    evaluate=False,
    kernels="reference",
    graphs=False,  # as on a CPU
    data=data.Config(source="synthetic", image_size=16, channels=3, num_classes=10, held_out=0.0),
    model=dit.Config(width=64, depth=4, heads=4, patch=2),
)
LAYOUTS = {
    "zero 0": (Parallel(), None),
    "zero 0, micro": (Parallel(), 2),
    "zero 1": (Parallel(zero=1), None),
    "zero 2": (Parallel(zero=2), None),
    "zero 2, micro, selective": (Parallel(zero=2, remat="selective"), 2),
    "zero 3": (Parallel(zero=3), None),
    "zero 3, block": (Parallel(zero=3, remat="block"), None),
    "zero 3, bf16 sums": (Parallel(zero=3, reduce="bf16"), None),
    "zero 1, ulysses": (Parallel(zero=1, sp=2, sequence="ulysses"), None),
    "zero 3, fastseq": (Parallel(zero=3, sp=4, sequence="fastseq"), None),
    "zero 0, ring, block": (Parallel(sp=2, sequence="ring", remat="block"), 4),
    "zero 2, megatron": (Parallel(zero=2, sp=2, sequence="megatron"), None),
    "zero 3, megatron": (Parallel(zero=3, sp=4, sequence="megatron"), 8),
    "zero 1, usp": (Parallel(zero=1, sp=4, sequence="usp", ulysses=2), None),
}
CASES = pytest.mark.parametrize("layout", LAYOUTS)


def run_of(layout: str) -> config.Run:
    parallel, micro = LAYOUTS[layout]
    return dataclasses.replace(RUN, parallel=parallel, micro_batch=micro)


def told(run: config.Run, world: int = 4):
    return pretend(run, checks.expected_shape(run), world, H200.capability)


def held(run: config.Run, world: int = 4):
    return footprint(told(run, world), H200.capability)


@pytest.mark.every(3)
@CASES
def test_bytes_are_those_of_a_weighed_step(layout):
    run = run_of(layout)
    assert held(run).taken == pytest.approx(memory.predict(told(run)).peak, rel=0.05)


@pytest.mark.every(4)
@CASES
def test_bytes_and_traffic_are_those_of_four_ranks(layout, ranks):
    run = run_of(layout)
    p = run.parallel
    found = ranks.run(4, counted_on, run, dp=4 // (p.sp or 1), sp=p.sp or 1, ulysses=p.ulysses or 1)
    expected = held(run)
    for peak, standing, *_ in found:
        assert standing == expected.weights.standing + 8  # the count of updates
        assert expected.taken == pytest.approx(peak, rel=0.05)
    assert pace.passed(told(run)) == found[0][2:]


def counted_on(mesh, run):
    """Peak and standing bytes of tensors of a real step, and the bytes that came for weights and for gradients."""
    dataset = data.open_dataset(run.data)
    composed = plan.make(dataclasses.replace(run, device="cpu"), dataset, mesh)
    share = (mesh.dp.rank, mesh.dp.size)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=share)
    step = train.make_step(composed)
    with memory.Weigh([], torch.device("cpu")) as weigh:
        state = train.init_state(composed, KEY)
        standing = weigh.now()
        weigh.peak = 0  # initial draws are no part of a step
        with recorder.recording() as events:
            step(state, batch, KEY)
    ours = [e for e in events if e.phase == "started" and e.axis in ("all", "dp") and e.bytes < 8 * e.elements]
    gathered = sum(e.bytes for e in ours if e.op == "all_gather")
    return weigh.peak, standing, gathered, sum(e.bytes for e in ours) - gathered


PUBLISHED = dataclasses.replace(
    config.presets()["dit-s-2"][1], global_batch=64, micro_batch=4, precision="bf16", evaluate=False
)


def test_more_ranks_never_hold_more():
    """At the same micro-batch; so does each stage."""
    found = {}
    for world in (1, 2, 4, 8):
        for stage in range(4):
            run = dataclasses.replace(PUBLISHED, parallel=Parallel(zero=stage))
            found[world, stage] = sum(weights(told(run, world))[:6])
    for stage in range(4):
        sizes = [found[world, stage] for world in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True), stage
    for world in (2, 4, 8):
        assert found[world, 3] < found[world, 2] < found[world, 1] < found[world, 0]


def test_a_graph_takes_more_than_its_tensors():
    one = held(dataclasses.replace(PUBLISHED, kernels="auto"), 1)
    assert 0 < one.taken - one.peak <= one.weights.sums


def test_a_graph_of_several_ranks_stands_beside_what_they_sum():
    run = dataclasses.replace(PUBLISHED, kernels="auto", micro_batch=None)
    one, two = held(run, 1), held(dataclasses.replace(run, global_batch=128), 2)
    assert one.peak == two.peak and two.weights.sums <= two.taken - one.taken <= 1.2 * two.weights.sums


def test_while_ranks_sum_a_graph_the_sums_of_micro_batches_and_theirs_stand_at_once():
    two = held(dataclasses.replace(PUBLISHED, kernels="auto", micro_batch=16), 2)
    w = two.weights
    assert two.taken >= w.standing + w.working + two.kept.forward + 2 * w.sums


def test_what_a_graph_keeps_beside_sums_is_too_large_too():
    cluster = forecast.Cluster(1, 22.0, H200, "nvlink")
    run = dataclasses.replace(
        config.presets()["dit-xl-2"][1], global_batch=64, micro_batch=32, precision="bf16", evaluate=False
    )
    found = forecast.one(run, checks.expected_shape(run), cluster)
    assert found.footprint.peak < 22 * forecast.GIB < found.footprint.taken and found.verdict == "too large"


@functools.cache
def seconds(**changes):
    run = dataclasses.replace(PUBLISHED, kernels="auto", **changes)
    links = {name: H200.links["nvlink"] for name in ("sp", "all")}
    return pace.pace(told(run, 8), H200, H200.capability, links)


def test_what_costs_time():
    plain = seconds()
    assert plain.step == pytest.approx(sum(vars(plain).values()))
    selective, block = (seconds(parallel=Parallel(remat=r)) for r in ("selective", "block"))
    assert plain.products == selective.products < block.products < 1.4 * plain.products
    assert plain.attention == selective.attention < block.attention
    shared = seconds(parallel=Parallel(sp=2, sequence="ulysses"), micro_batch=8)
    assert plain.tokens == 0 < shared.tokens
    assert seconds(parallel=Parallel(zero=3)).optimizer < plain.optimizer


def test_rates_give_back_what_was_measured():
    for p in H200.products:
        assert H200.product_s(p.m, p.n, p.k, "bf16") == pytest.approx(2e-12 * p.m * p.n * p.k / p.tflops)
    entry = next(a for a in H200.attention if a.backend == "flash4" and a.size == 72)
    flops = 4 * entry.batch * entry.heads * entry.tokens**2 * entry.size
    forward, backward = H200.attention_s(entry.tokens, 72, flops, 0, "flash4")
    assert 1e3 * (forward + backward) == pytest.approx(5.375, rel=1e-3)
    rows = [H200.product_s(m, 1152, 1152, "bf16") for m in (1, 64, 1024, 8192, 65536)]
    assert rows == sorted(rows)
    assert H200.product_s(1, 6912, 1152, "bf16") > 2 * 6912 * 1152 / 4243e9  # the weight is read


def test_bad_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no products in fp32: use --precision bf16"):
        H200.product_s(8, 8, 8, "fp32")
    with pytest.raises(ValueError, match=r"machine is h300: use h100, h200, or the file"):
        rates.load("h300")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is no table of rates.*capability.*bench.py rates"):
        rates.load(tmp_path / "bad.json")


def test_the_script_tells_what_fits(tmp_path, capsys):
    script = conftest.script("plan")
    script.main(script.Plan("dit-s-8", gpus=1, memory_gib=4.5, global_batch=2048, out=tmp_path / "plan.json"))
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    fits, close, large = ([row for row in found if row["verdict"] == v] for v in ("fits", "close", "too large"))
    assert fits and close and large and len(fits + close + large) == len(found) == 45
    assert f"{len(fits)} of 45 layouts fit 1 x 4.5 GiB" in printed
    assert [row["ms"] for row in fits] == sorted(row["ms"] for row in fits)
    assert all(row["missing_gib"] == row["over_gib"] == 0 for row in fits)
    assert all(row["missing_gib"] > 0 and row["peak_gib"] <= 4.5 for row in close)
    assert all(0 < row["over_gib"] == pytest.approx(row["peak_gib"] - 4.5, abs=2e-3) for row in large)
    assert "run it:  python experiments/train.py dit-s-8 --global-batch 2048" in printed
    assert "too close to tell, so many GiB are missing" in printed and "too large, by so many GiB" in printed


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"global_batch": 0}, "global_batch is 0: use 1 or more"),
        ({"memory_gib": 0.0}, "memory_gib is 0.0: use a number of GiB above 0"),
        ({"memory_gib": -1.0}, "memory_gib is -1.0: use"),
        ({"memory_gib": float("nan")}, "memory_gib is nan: use"),
        ({"memory_gib": float("inf")}, "memory_gib is inf: use"),
        ({"out": Path("/")}, "out / is a folder: use a file such as /plan.json"),
    ],
)
def test_a_plan_of_numbers_without_meaning_is_refused(changes, words, capsys):
    script = conftest.script("plan")
    with pytest.raises(ValueError, match=words):
        script.main(script.Plan("dit-s-8", gpus=1, **changes))
    assert not capsys.readouterr().out


def test_edges_of_memory_are_tried_on_both_sides():
    gib = {}

    def runs(run, limit):
        gib[run.global_batch] = forecasts.told(run, H200, limit)
        return "tried"

    row = forecasts.edge_row("dit-s-8:4", H200, runs)
    (fits, fits_told, _), *close, (large, large_told, _), (more, more_told, _) = row["tried"]
    assert (fits_told, large_told, more_told) == ("fits", "too large", "too large") and fits < large < more
    assert [verdict for _, verdict, _ in close] == ["close"] and set(gib) == {n for n, *_ in row["tried"]}
    assert gib[fits].missing_gib <= 0 < gib[large].over_gib
    for n, verdict in ((fits + 1, "close"), (large - 1, "close")):
        assert forecasts.told(forecasts.run_of("dit-s-8", n, None, {}), H200, 4).verdict == verdict


def test_words_of_layouts():
    found = forecasts.parse("dit-xl-2:192/64+selective+offload3")
    assert found == ("dit-xl-2", 192, 64, {"remat": "selective", "zero": 3, "offload": "optimizer"})
    for word in ("dit-xl-2", "dit-xl-2:many", "dit-xl-2:8+fast", "dit-xl-2:8/x"):
        with pytest.raises(ValueError, match=r"is no layout: write PRESET:NUMBER, /MICRO-BATCH and \+selective"):
            forecasts.parse(word)
    for word in (*forecasts.Forecasts.layouts, *forecasts.Forecasts.edges):
        assert forecasts.run_of(*forecasts.parse(word)).kernels == "fused"


def test_commands_name_what_differs_from_the_default():
    run = dataclasses.replace(PUBLISHED, parallel=Parallel(dp=8, sp=2, sequence="ulysses", zero=3, remat="block"))
    cluster = forecast.Cluster(16, 80, H200, "nvlink")
    line = forecast.command("dit-s-2", forecast.one(run, checks.expected_shape(run), cluster), 16, 8)
    assert line == (
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint NODE0:29500 experiments/train.py "
        "dit-s-2 --global-batch 64 --micro-batch 4 --precision bf16 --parallel.sp 2 --parallel.sequence ulysses "
        "--parallel.zero 3 --parallel.remat block"
    )


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_train_py_takes_the_commands(deterministic):
    run = dataclasses.replace(PUBLISHED, deterministic=deterministic, parallel=Parallel(dp=4, sp=2, sequence="ulysses"))
    found = forecast.one(run, checks.expected_shape(run), forecast.Cluster(8, 80, H200, "nvlink"))
    line = forecast.command("dit-s-2", found, 8, 8)
    taken = tyro.extras.overridable_config_cli(config.presets(), args=line.split("train.py ")[1].split())
    assert taken.deterministic is deterministic and (taken.parallel.sp, taken.parallel.sequence) == (2, "ulysses")


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_shipped_table_tells_where_its_figures_come_from(name):
    table = json.loads(Path(rates.find(name)).read_text())
    named = {"products", "attention", "copy_gb_per_s", "of_copy", "wait_us", "launch_us", "host_gb_per_s", "links"}
    assert named | {"host_update_ns", "around_ms"} == set(table["sources"])
