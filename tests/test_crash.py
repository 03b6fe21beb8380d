"""Bad steps: what is kept of them, by whom, and that executing them again shows where numbers went bad."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import test_front
import torch
from conftest import redraw, script
from states import FullDisk
from test_precision import KEY, RUN, dataset, drawn_state, leaves_of, share_of

from odit import checkpoint, config, crash, data, ops, plan, saving, source, train, tree
from odit.config_json import to_json
from odit.crash import Replay, replay
from odit.data import loader
from odit.draws import draw
from odit.health import CheckpointError, Damaged, NumericError
from odit.parallel.mesh import single
from odit.storage import StorageError

ROOT = Path(__file__).parent.parent


def run_at(out, stage=0, sp=1, precision="fp32", **changes):
    changes = {"parallel": config.Parallel(zero=stage, sp=sp), **changes}
    return dataclasses.replace(RUN, out=out, micro_batch=4, precision=precision, **changes)


def told_of(composed, state):
    """As a run tells of itself."""
    shape = dataclasses.asdict(composed.shape)
    return {
        "step": state.step,
        "seed": 5,
        "config": to_json(composed.run),
        "shape": shape,
    }


FAULTS = {
    "nan": lambda x: x.fill_(math.nan),  # the loss is not finite
    "large": lambda x: x.fill_(3e4),  # in fp16: a finite loss, and gradients that fp16 cannot hold
}


def bad_steps_on(mesh, run, fault, culprit, num=1):
    """A good step, then ``num`` bad ones: sample 5 of those that the dp rank ``culprit`` has is of the fault.

    Returns the folders, the draw id of that sample in each, and whether the state stayed as it was.
    """
    composed = plan.make(run, dataset(), mesh)
    keeper, step = crash.Keeper(composed), train.make_step(composed)
    state, _ = step(drawn_state(composed), share_of(run, 0, mesh.dp.rank, mesh.dp.size), KEY)
    before, folders, ids = [leaf.clone() for leaf in leaves_of(state)], [], []
    for number in range(1, num + 1):
        batch = share_of(run, number, mesh.dp.rank, mesh.dp.size)
        x = batch.x.clone()
        if mesh.dp.rank == culprit:
            FAULTS[fault](x[5, 0, 2, 3])
        state, metrics = step(state, batch._replace(x=x), KEY)
        path = keeper.keep(state, batch._replace(x=x), KEY, metrics, told_of(composed, state), last=True)
        folders.append(path)
        ids.append(int(batch.ids_B[5]))
    same = all(torch.equal(a, b) for a, b in zip(before, leaves_of(state), strict=True))
    return folders, ids, same, state.step, int(state.opt.count)


CASES = [(2, 1, stage) for stage in range(4)] + [(2, 2, 0), (2, 2, 3), (4, 2, 2)]


@pytest.mark.parametrize("world, sp, stage", CASES, scope="session")
def test_the_sample_of_a_bad_loss_is_kept_and_shows_itself_again(ranks, tmp_path, world, sp, stage):
    culprit = world // sp - 1
    found = ranks.run(world, bad_steps_on, run_at(tmp_path, stage, sp), "nan", culprit, sp=sp)
    ((folder,), (bad,), same, steps, updates), rank = found[culprit * sp], culprit * sp
    assert all(f[0] == [folder] and f[2:] == (True, 2, 1) for f in found) and (same, steps, updates) == (True, 2, 1)
    assert folder == tmp_path / "crashes" / "step_00000002"
    facts = crash.read(folder)
    assert facts["bad_samples"] == {str(rank): [bad]} and facts["loss"] == "nan"
    (told,) = facts["batches"]
    assert (told["rank"], told["first"], len(told["samples"])) == (rank, 1, 4)  # its second micro-batch of four
    assert {p.name for p in folder.glob("batch-*")} == {f"batch-{rank:05d}.safetensors"}
    sample = bad & 0xFFFFFFFF
    message = (
        rf"step_00000002 on cpu in fp32: rank {rank}, micro-batch 1: loss nan \(of sample {sample}\); forward, the "
        r"first that is not finite is x as it enters the model; backward, the first is the gradient of what "
        r"final\.leave gave; the first bad leaf is grad\.final\.out\.b"
    )
    with pytest.raises(NumericError, match=message):
        replay(Replay(folder, "cpu"))


@pytest.mark.parametrize("world, sp, stage", CASES, scope="session")
def test_of_gradients_alone_all_is_kept_and_the_micro_batch_is_found(ranks, tmp_path, world, sp, stage):
    culprit = world // sp - 1
    run = run_at(tmp_path, stage, sp, "fp16")
    found = ranks.run(world, bad_steps_on, run, "large", culprit, sp=sp)
    (folder,), _, same, *_ = found[culprit * sp]
    facts = crash.read(folder)
    assert same and facts["bad_samples"] == {} and math.isfinite(facts["loss"])
    assert [told["rank"] for told in facts["batches"]] == list(range(0, world, sp))
    message = rf"in fp16: rank {culprit * sp}, micro-batch 1: loss \d[\d.e+]+; .*the first bad leaf is grad\."
    with pytest.raises(NumericError, match=message):
        replay(Replay(folder, "cpu"))
    told = replay(Replay(folder, "cpu", precision="fp32"))  # which holds them
    assert "in fp32 does not reproduce: grad." in told and told.endswith("and all gradients are finite")


def test_show_tells_what_was_kept(tmp_path, capsys):
    (folder,), ((bad,)), *_ = bad_steps_on(single(), run_at(tmp_path), "nan", 0)
    show = script("show")
    show.main(show.Show(folder))
    told = capsys.readouterr().out
    assert told.startswith(
        "kind: bad step 2, whose grad.patch.w was not finite (loss nan)\nlayout: ranks 1, dp 1, sp 1, "
    )
    assert f" {bad & 0xFFFFFFFF}" in told and "hashes: every byte is as it was written\n" in told


def test_a_norm_that_overflows_is_found_in_the_sum(tmp_path):
    """All gradients are finite, but of some the square is not."""
    composed = plan.make(run_at(tmp_path), dataset())
    state, batch = drawn_state(composed), share_of(composed.run, 0, 0, 1)
    state.params["final"]["out"]["w"].mul_(1e13)
    state, metrics = train.make_step(composed)(state, batch, KEY)
    folder = crash.Keeper(composed).keep(state, batch, KEY, metrics, told_of(composed, state))
    assert crash.read(folder)["bad"] == "grad_norm"
    with pytest.raises(
        NumericError, match="no micro-batch is bad, but the sum of their gradients is: the squared norm"
    ):
        replay(Replay(folder, "cpu"))


def test_the_first_are_kept_and_share_their_weights(tmp_path):
    folders, _, same, steps, updates = bad_steps_on(single(), run_at(tmp_path, crashes=2), "nan", 0, num=4)
    assert folders == [tmp_path / "crashes" / f"step_{step:08d}" for step in (2, 3)] + [None, None]
    assert (same, steps, updates) == (True, 5, 1)
    weights = [sorted(p.name for p in folder.glob("state-*")) for folder in folders[:2]]
    assert weights == [["state-00000-of-00001.safetensors"], []]
    for folder in folders[:2]:
        with pytest.raises(NumericError, match="micro-batch 1"):
            replay(Replay(folder, "cpu"))
    again = bad_steps_on(single(), run_at(tmp_path, crashes=3), "nan", 0, num=3)[0]  # a resumed run's are beside them
    assert again == [*folders[:2], tmp_path / "crashes" / "step_00000004"] and list(again[2].glob("state-*"))
    folders[0].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"has the weights of .*step_00000002, which is not there: put it back"):
        replay(Replay(folders[1], "cpu"))


def test_state_on_the_host_is_kept_as_any(tmp_path):
    layout = config.Parallel(zero=3, offload="optimizer")
    (folder,), *_, steps, updates = bad_steps_on(single(), run_at(tmp_path, parallel=layout), "nan", 0)
    assert (steps, updates) == (2, 1)
    with pytest.raises(NumericError, match="rank 0, micro-batch 1: loss nan"):
        replay(Replay(folder, "cpu"))


def test_what_encoders_made_is_kept_and_they_are_not_needed_again(tmp_path, monkeypatch):
    run = test_front.run_of(out=tmp_path)
    front = plan.load_front(run)
    found = data.open_dataset(run.data, front.tokenize)
    composed = plan.make(run, found, None, front)
    state, (batch,) = train.init_state(composed, KEY), loader.batches(found, KEY, global_batch=4, stop=1)
    state = state._replace(step=1, params=tree.map(torch.Tensor.float, redraw(composed.declared)))
    x = front.latents(batch.x, batch.ids_B, KEY)
    draws = draw(composed, batch.ids_B, tuple(x.shape[1:]), KEY)
    loss = float(train.losses(composed, state.params, composed.ops, x, batch.y, draws).detach().double().mean())
    folder = crash.Keeper(composed).keep(state, batch, KEY, METRICS, told_of(composed, state))
    monkeypatch.setattr(plan, "load_front", lambda *args: pytest.fail("an encoder is loaded"))
    assert f"here the loss is {loss:.6g} and all gradients are finite" in replay(Replay(folder, "cpu"))


METRICS = {"loss": 1.0, "grad_norm": math.nan, "lr": 1e-3, "draw_digest": "0", "bad": "grad.patch.w", "bad_samples": {}}


def test_what_is_finite_does_not_reproduce(tmp_path):
    composed = plan.make(run_at(tmp_path), dataset())
    state, batch = drawn_state(composed)._replace(step=1), share_of(composed.run, 0, 0, 1)
    loss_B, grads, _ = train.gradients(composed, state.params, batch, KEY)
    folder = crash.Keeper(composed).keep(state, batch, KEY, METRICS, told_of(composed, state))
    told = replay(Replay(folder, "cpu"))
    assert f"here the loss is {float(loss_B.double().mean()):.6g} and all gradients are finite" in told
    # and is what the step computed, bit for bit
    facts, params = crash.read(folder), checkpoint.load_weights(folder, composed, "param")
    total = None
    for _, inputs in crash.micro_batches(folder / "batch-00000.safetensors", facts["batches"][0]):
        total = train.add(total, crash.execute(composed, params, inputs).grads, params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(total), tree.leaves(grads), strict=True))


def test_an_overflow_that_the_loss_scale_mends_is_not_kept(tmp_path):
    composed = plan.make(run_at(tmp_path, precision="fp16"), dataset())
    metrics = {"loss": 1.0, "bad": "grad.patch.w", "bad_samples": {}, "loss_scale": 65536.0}
    assert (
        crash.Keeper(composed).keep(drawn_state(composed), None, KEY, metrics, {}) is None
        and not (tmp_path / "crashes").exists()
    )


# ------------------------------------------------------------------------------------------------- where it went bad


class Bad(torch.autograd.Function):
    """The identity, but for a NaN forward or in the gradient."""

    @staticmethod
    def forward(ctx, x, way):
        ctx.way = way
        return x * math.nan if way == "forward" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * math.nan if ctx.way == "backward" else grad), None


def breaking(name, at, way):
    """The plain record whose site goes bad in its call number ``at``, in its first result or that one's gradient."""
    site, calls = getattr(ops.Ops(), name), iter(range(100))

    def broken(*args):
        found = site(*args)
        if next(calls) != at:
            return found
        return (Bad.apply(found[0], way), *found[1:]) if isinstance(found, tuple) else Bad.apply(found, way)

    return dataclasses.replace(ops.Ops(), **{name: broken})


# of two blocks: the site, its call that goes bad, where that shows forward, of what the gradient is bad first, and the
# first bad leaf
PLACES = [
    ("enter", 0, "enter", None, "patch.b"),
    ("modulate", 1, "blocks.1.modulate", "blocks.0.gated", "blocks.1.adaln.b"),
    ("qkv", 0, "blocks.0.qkv", "blocks.0.modulate", "blocks.0.qkv.b"),
    ("attend", 1, "blocks.1.attend", "blocks.1.qkv", "blocks.1.qkv.b"),
    ("gated_modulate", 0, "blocks.0.gated_modulate", "blocks.0.out", "blocks.0.out.b"),
    ("mlp", 1, "blocks.1.mlp", "blocks.1.gated_modulate", "blocks.1.mlp.fc2.b"),
    ("gated", 0, "blocks.0.gated", "blocks.0.mlp", "blocks.0.mlp.fc2.b"),
    ("modulate", 2, "final.modulate", "blocks.1.gated", "final.adaln.b"),
    ("leave", 0, "final.leave", "final.modulate", "final.out.b"),
]


@pytest.mark.parametrize("site, at, forward, backward, leaf", PLACES)
def test_the_site_that_went_bad_is_named(tmp_path, site, at, forward, backward, leaf):
    composed = plan.make(run_at(tmp_path), dataset())
    params = tree.map(torch.Tensor.float, redraw(composed.declared))
    inputs = crash.entered(composed, share_of(composed.run, 0, 0, 6), KEY)
    good = crash.execute(composed, params, inputs)
    assert not good.bad
    broken = dataclasses.replace(composed, kernels=breaking(site, at, "forward"))
    assert crash.execute(broken, params, inputs).forward == forward
    broken = dataclasses.replace(composed, kernels=breaking(site, at, "backward"))
    found = crash.execute(broken, params, inputs)
    assert (found.forward, found.backward, found.leaf) == (None, backward, f"grad.{leaf}")
    assert torch.equal(found.loss_B, good.loss_B)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_fused_kernels_and_graphs_are_watched_too(tmp_path, precision):
    run = run_at(tmp_path, precision=precision, kernels="fused", model=dataclasses.replace(RUN.model, width=64))
    (folder,), (bad,), same, *_ = bad_steps_on(single(), run, "nan", 0)
    assert same and "cuda" in crash.read(folder)["layout"]["device"]
    for args, on in (({}, "cuda"), ({"kernels": "reference"}, "cuda"), ({"device": "cpu", "kernels": "auto"}, "cpu")):
        message = rf"on {on}.* micro-batch 1: loss nan \(of sample {bad & 0xFFFFFFFF}\); forward, .* is x as it enters"
        with pytest.raises(NumericError, match=message):
            replay(Replay(folder, **args))
    composed = crash.compose(crash.read(folder), Replay(folder))
    params = checkpoint.load_weights(folder, composed, "param")
    inputs = next(crash.micro_batches(folder / "batch-00000.safetensors", crash.read(folder)["batches"][0]))[1]
    inputs["x"] = torch.nan_to_num(inputs["x"])
    assert not crash.execute(composed, params, inputs).bad
    params["blocks"][1]["mlp"]["fc1"]["b"][3] = math.inf
    assert crash.execute(composed, params, inputs).forward == "blocks.1.mlp"


# ------------------------------------------------------------------------------------------------------------ refusals


def test_damage_and_other_folders_are_refused(tmp_path, monkeypatch):
    (folder,), *_ = bad_steps_on(single(), run_at(tmp_path), "nan", 0)
    for name in ("batch-00000.safetensors", crash.FACTS):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
        with pytest.raises(Damaged, match=rf"{name} was changed after it was written"):
            replay(Replay(folder, "cpu"))
        (folder / name).write_bytes(good)
    with pytest.raises(CheckpointError, match=r"is no folder of a kept step: give one of out/crashes/step_\*"):
        replay(Replay(tmp_path, "cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="replay runs on one device and these are 2 ranks: use python without torchrun"
    ):
        replay(Replay(folder, "cpu"))
    with pytest.raises(ValueError, match=r"replay .* takes the place of a run"):
        plan.compose(run_at(tmp_path, replay=folder), composed_shape())


def going_on(mesh, run):
    """What ``--resume`` says on this rank."""
    with pytest.raises(CheckpointError) as refused:
        script("train").restore(plan.make(run, dataset(), mesh), dataset())
    return str(refused.value)


def test_a_kept_step_is_no_state_to_go_on_from(ranks, tmp_path):
    run = run_at(tmp_path)
    (folder,), *_ = bad_steps_on(single(), run, "nan", 0)
    composed = plan.make(run, dataset())
    checkpoint.save(composed, drawn_state(composed)._replace(step=1), {})
    told = (
        f"{folder} is a bad step that was kept for --replay, and no state of a run: give one of out/checkpoints/step_*"
    )
    assert ranks.run(2, going_on, dataclasses.replace(run, resume=str(folder))) == [told, told]
    with pytest.raises(CheckpointError, match="is a bad step that was kept for --replay"):
        source.open_source(folder)


def composed_shape():
    return plan.make(RUN, dataset()).shape


def test_a_full_disk_keeps_nothing(tmp_path):
    composed = plan.make(run_at(tmp_path), dataset())
    metrics = {"loss": math.nan, "grad_norm": math.nan, "lr": 1.0, "draw_digest": "0", "bad": "loss", "bad_samples": {}}
    state, batch = drawn_state(composed)._replace(step=1), share_of(composed.run, 0, 0, 1)
    with pytest.raises(StorageError, match=r"crashes/step_00000001 cannot be written \(ENOSPC"):
        crash.Keeper(composed, FullDisk()).keep(state, batch, KEY, metrics, told_of(composed, state))
    assert not list((tmp_path / "crashes").iterdir())


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_keeps_its_bad_steps_and_the_command_line_executes_them(tiny, monkeypatch, capsys):
    train_script = script("train")
    whole = train_script.loader.batches

    def poisoned(*args, **kwargs):
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number in (1, 2):
                batch.x[7] = math.inf
            yield batch

    monkeypatch.setattr(train_script.loader, "batches", poisoned)
    train_script.main(dataclasses.replace(tiny, steps=4))
    folders = [tiny.out / "crashes" / f"step_{step:08d}" for step in (2, 3)]
    told = capsys.readouterr().out
    for step, folder in zip((2, 3), folders):
        (sample,) = {sample & 0xFFFFFFFF for sample in crash.read(folder)["bad_samples"]["0"]}
        assert (
            f"step {step}: grad.patch.w is not finite (the loss of sample {sample} on rank 0); the update was skipped"
            in told
        )
        assert f"; to execute it again: --replay {folder}" in told
    lines = [json.loads(line) for line in (tiny.out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("bad") for line in lines if "loss" in line] == [None, "grad.patch.w", "grad.patch.w", None]
    assert not any("bad_samples" in line for line in lines) and len(saving.steps(tiny.out)) == 1

    def command(*words):
        line = [sys.executable, str(ROOT / "experiments" / "train.py"), *words]
        return subprocess.run(line, capture_output=True, text=True)

    done = command("digits", "--replay", str(folders[1]), "--device", "cpu")
    assert done.returncode == 5 and done.stderr.startswith(
        f"error: {folders[1]} on cpu in fp32: rank 0, micro-batch 0: "
    ), done
    done = command("--replay", str(folders[1]), "--steps", "3")
    assert done.returncode == 2 and "--steps" in done.stdout + done.stderr
