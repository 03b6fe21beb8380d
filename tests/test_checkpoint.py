"""Checkpoints: exact round trips, whole or not at all, and a refusal that says what is wrong."""

import dataclasses
import json
import shutil

import pytest
import torch

from odit import checkpoint, random, train, tree
from odit.health import CheckpointError

KEY = random.key(1)


def state_of(plan, step=7):
    state = train.init_state(plan, KEY)
    noisy = [tree.map(lambda p, i=i: torch.full_like(p, i + 0.1), state.params) for i in range(3)]
    opt = state.opt._replace(m=noisy[0], v=noisy[1], count=torch.tensor(5))
    return state._replace(step=step, opt=opt, ema=noisy[2], loss_scale=train.LossScale(8.0, 3))


@pytest.fixture
def saved(tiny, make_plan):
    plan = make_plan(tiny)
    return plan, checkpoint.save(plan, state_of(plan), {"note": "x"})


def test_round_trip_is_bit_exact(saved):
    plan, path = saved
    state, manifest = checkpoint.load(path, plan)
    expected = state_of(plan)
    assert (state.step, int(state.opt.count), state.loss_scale, manifest["note"]) == (7, 5, (8.0, 3), "x")
    for a, b in [(state.params, expected.params), (state.opt.v, expected.opt.v), (state.ema, expected.ema)]:
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_only_the_newest_are_kept_and_no_rubbish_stays(tiny, make_plan):
    plan = make_plan(tiny)
    for step in (1, 2, 3, 4):
        checkpoint.save(plan, state_of(plan, step), {})
    checkpoint.save(plan, state_of(plan, 4), {})
    assert sorted(p.name for p in (tiny.out / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def damage_bit(path):
    data = bytearray((path / "state-00000-of-00001.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "state-00000-of-00001.safetensors").write_bytes(data)


def damage_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def damage_step(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "updates": 99}))


DAMAGE = {
    "step": (damage_step, "manifest.json was changed after it was written"),
    "no files": (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "was changed after it was written"),
    "bit": (damage_bit, "state-00000-of-00001.safetensors was changed after it was written"),
    "short": (
        lambda p: open(p / "state-00000-of-00001.safetensors", "r+b").truncate(1000),
        "has 1000 bytes, the manifest says",
    ),
    "missing": (
        lambda p: (p / "state-00000-of-00001.safetensors").unlink(),
        "state-00000-of-00001.safetensors is missing",
    ),
    "manifest": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "format": (damage_format, "has format 99, this version reads 1"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_latest_steps_back(saved, kind):
    plan, path = saved
    newest = checkpoint.save(plan, state_of(plan, 9), {})
    damage, message = DAMAGE[kind]
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(checkpoint.find(str(newest), plan.run.out), plan)
    with pytest.warns(UserWarning, match="stepping back past a broken checkpoint"):
        assert checkpoint.find("latest", plan.run.out) == path


def test_what_is_not_there_is_said(saved):
    plan, path = saved
    with pytest.raises(CheckpointError, match=r"is no checkpoint \(no manifest.json\); steps in .*: 7"):
        checkpoint.find(str(path.with_name("step_00000008")), plan.run.out)
    shutil.rmtree(path)
    assert checkpoint.find("latest", plan.run.out) is None


def test_another_model_is_refused_with_both_shapes(saved, make_plan):
    plan, path = saved
    wider = make_plan(plan.run, model=dataclasses.replace(plan.run.model, width=64))
    with pytest.raises(CheckpointError, match=r"param/patch.w .* has shape \(32, 4\), this model wants \(64, 4\)"):
        checkpoint.load(path, wider)
    shallower = make_plan(plan.run, model=dataclasses.replace(plan.run.model, depth=1))
    with pytest.raises(CheckpointError, match=r"tensors this model has not, the first is param/blocks\.1"):
        checkpoint.load(path, shallower)
    deeper = make_plan(plan.run, model=dataclasses.replace(plan.run.model, depth=3))
    with pytest.raises(CheckpointError, match=r"has no tensor param/blocks\.2"):
        checkpoint.load(path, deeper)


def test_weights_file(saved, tmp_path):
    plan, path = saved
    ema = state_of(plan).ema
    checkpoint.save_weights(tmp_path / "w.safetensors", ema, {"step": 7})
    assert checkpoint.read_about(tmp_path / "w.safetensors") == {"step": 7}
    for source in (tmp_path / "w.safetensors", path):
        loaded = checkpoint.load_weights(source, plan)
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(loaded), tree.leaves(ema)))
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish rubbish rubbish")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is no safetensors file"):
        checkpoint.read_about(tmp_path / "bad.safetensors")
