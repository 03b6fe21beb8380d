"""Fine-tuning: weights of another model as a start, frozen leaves, adapters; many ranks against one."""

import dataclasses
import functools

import pytest
import torch
from conftest import redraw
from PIL import Image
from safetensors.torch import load_file

from odit import checkpoint, config, convert, data, finetune, initial, memory, models, param, plan, random, tree
from odit import train as training
from odit.config_json import from_json, to_json
from odit.health import CheckpointError
from odit.models.config import Config, Shape
from odit.parallel.mesh import single

KEY = random.key(3)
MODEL = Config(width=24, depth=2, heads=2, patch=2)
SHAPE = Shape(1, 8, 10)
RUN = dataclasses.replace(
    config.presets()["digits"][1],
    steps=3,
    global_batch=12,
    evaluate=False,
    model=MODEL,
    # Adam's eps is 1e-4: with 1e-8 the rounding noise of the key bias' gradient becomes whole steps.
    optimizer=dataclasses.replace(config.presets()["digits"][1].optimizer, eps=1e-4, weight_decay=0.1, clip=0.5),
)


def variant(value, **changes):
    return dataclasses.replace(value, **changes)


def declared(model=MODEL, shape=SHAPE):
    return models.of(model).declare(model, shape)


def weights_of(model=MODEL, shape=SHAPE):
    return redraw(declared(model, shape), dtype=torch.float32)


def saved(path, model=MODEL, shape=SHAPE, run=RUN):
    """A weights file of a model with drawn weights, and these."""
    weights = weights_of(model, shape)
    told = {"config": to_json(variant(run, model=model)), "shape": dataclasses.asdict(shape), "step": 7}
    checkpoint.save_weights(path, weights, told)
    return weights


def started(path, shape=SHAPE, mesh=None, parallel=config.Parallel(), model=MODEL, text=None, **tuned):
    """(plan, start) of a run from these weights."""
    run = variant(RUN, init_from=path, model=model, parallel=parallel, finetune=finetune.Config(**tuned))
    if shape.outputs == 2:
        run = variant(run, diffusion=config.presets()["dit-s-2"][1].diffusion, sampling=config.Sampling(steps=2))
    composed = plan.compose(run, shape, mesh)
    drawn = training.init_state(composed, KEY).params
    return composed, initial.start(composed, drawn, KEY)


def fresh(path, model, shape):
    return param.draw(dict(tree.items(declared(model, shape)))[path], path, random.fold_in(KEY, "weights"))


# --- weights of another model ---

LABELS = {  # (classes, dropout) there and here -> rows of the new table by the old ones, None: drawn; and what is told
    "fewer": ((10, 0.1), (4, 0.1), [None] * 4 + [10], "label.w (10 -> 4 classes, null row kept)"),
    "more": ((3, 0.1), (5, 0.1), [None] * 5 + [3], "label.w (3 -> 5 classes, null row kept)"),
    "no null before": ((4, 0.0), (4, 0.1), [0, 1, 2, 3, None], "label.w (4 classes, null row drawn)"),
    "no null after": ((4, 0.1), (4, 0.0), [0, 1, 2, 3], "label.w (4 classes, no null row)"),
    "as many rows": ((5, 0.0), (4, 0.1), [None] * 5, "label.w (5 -> 4 classes, null row drawn)"),
    "the same": ((4, 0.1), (4, 0.1), [0, 1, 2, 3, 4], None),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(tmp_path, case):
    (theirs, old_dropout), (mine, dropout), rows, told = LABELS[case]
    old, new = (variant(MODEL, label_dropout=x) for x in (old_dropout, dropout))
    weights = saved(tmp_path / "w.safetensors", old, Shape(1, 8, theirs))
    shape = Shape(1, 8, mine)
    composed, (params, lines) = (
        started(tmp_path / "w.safetensors", shape, model=new)
        if dropout
        else no_guidance(tmp_path / "w.safetensors", shape, new)
    )
    drawn = fresh("label.w", new, shape)
    expected = torch.stack([drawn[i] if n is None else weights["label"]["w"][n] for i, n in enumerate(rows)])
    assert torch.equal(params["label"]["w"], expected)
    assert same(without(params, "label"), without(weights, "label"))
    assert (told or "tensors from") in lines[0] and (not dropout or int(composed.null) == mine)


def no_guidance(path, shape, model):
    sampling = dataclasses.replace(RUN.sampling, guidance=config.Guidance(scale=1.0))
    composed = plan.compose(variant(RUN, init_from=path, model=model, sampling=sampling), shape)
    return composed, initial.start(composed, training.init_state(composed, KEY).params, KEY)


def without(params, name):
    return {k: v for k, v in params.items() if k != name}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def inputs(num=3, size=(8, 8)):
    x = random.normal(KEY, (1, *size), torch.arange(num))
    return x, torch.tensor([1.0, 40.0, 900.0])[:num], torch.tensor([0, 3, 1])[:num]


def test_a_learned_variance_comes_and_goes(tmp_path):
    """What is predicted stays bit for bit; a variance that was not there is 0."""
    x, t, y = inputs()
    shapes = {n: dataclasses.replace(Shape(3, 8, 10), outputs=n) for n in (1, 2)}
    x = x.expand(-1, 3, -1, -1)
    for there, here in ((1, 2), (2, 1)):
        weights = saved(tmp_path / f"{there}.safetensors", shape=shapes[there])
        _, (params, _) = started(tmp_path / f"{there}.safetensors", shapes[here])
        before = models.dit.forward(weights, x, t, y, MODEL)
        after = models.dit.forward(params, x, t, y, MODEL)
        assert torch.allclose(before[:, :3], after[:, :3], rtol=1e-6, atol=1e-6)  # products of another width
        assert here == 1 or not after[:, 3:].any()


def test_captions_instead_of_classes_start_as_the_unconditional_model(tmp_path):
    weights = saved(tmp_path / "w.safetensors")
    run = variant(config.presets()["digits-text"][1], init_from=tmp_path / "w.safetensors", model=MODEL, evaluate=False)
    composed = plan.compose(run, Shape(1, 8, text_length=48))
    params, lines = initial.start(composed, training.init_state(composed, KEY).params, KEY)
    x, t, _ = inputs()
    before = models.dit.forward(weights, x, t, torch.tensor([10, 10, 10]), MODEL)
    after = models.dit.forward(params, x, t, composed.tokenize(["a seven", "one", ""]), MODEL)
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)
    assert "time.fc2.b (the null row of label.w added)" in lines[0] and "left out: label.w" in lines[0]
    with pytest.raises(ValueError, match=r"finetune.train label.w matches no leaf"):
        plan.compose(variant(run, finetune=finetune.Config(train=("label.w",))), composed.shape)
    frozen = variant(run, finetune=finetune.Config(train=("final.*", "text.*")))
    composed = plan.compose(frozen, composed.shape, front=composed.front)
    with pytest.raises(ValueError, match=r"^blocks.0.cross.q.w would stay as it is drawn at step 0, .* use .* .blocks"):
        initial.start(composed, training.init_state(composed, KEY).params, KEY)


def test_a_picture_model_starts_a_clip_model(tmp_path):
    """Of patches of one frame: each leaf is the same."""
    weights = saved(tmp_path / "w.safetensors")
    run = variant(RUN, init_from=tmp_path / "w.safetensors")
    composed = plan.compose(run, Shape(1, (4, 8, 8), 10))
    params, _ = initial.start(composed, training.init_state(composed, KEY).params, KEY)
    assert same(params, weights)


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_weights_of_other_projects(tmp_path, kind):
    shape = dataclasses.replace(Shape(4, 8, 10), outputs=2)
    model = MODEL if kind == "dit" else variant(MODEL, timestep_freqs="diffusers")
    weights, path = weights_of(model, shape), tmp_path / kind
    if kind == "dit":
        path = tmp_path / "model.pt"
        convert.write_pt(path, convert.to_dit(weights, model, shape))
    else:
        convert.save_diffusers(path, weights, model, shape)
    mine = dataclasses.replace(shape, num_classes=3)
    _, (params, lines) = started(path, mine, model=model)
    assert same(without(params, "label"), without(weights, "label"))
    assert torch.equal(params["label"]["w"][3], weights["label"]["w"][10])
    assert "10 -> 3 classes" in lines[0] and "weights predict" not in "".join(lines)
    other = variant(model, timestep_freqs="diffusers" if kind == "dit" else "dit")
    with pytest.raises(CheckpointError, match=r"timestep_freqs .* which no shape shows: use --model.timestep-freqs"):
        started(path, mine, model=other)


REFUSED = {
    "width": (dict(width=32), SHAPE, {}, r"patch.w in .* has shape \(24, 4\), .* wants \(32, 4\): model.width is 24"),
    "depth": (dict(depth=3), SHAPE, {}, "has no tensor blocks.2.* model.depth is 2 there and 3 here"),
    "less depth": (dict(depth=1), SHAPE, {}, "holds blocks.1.* model.depth is 2 there and 1 here"),
    "patch": (dict(patch=4), SHAPE, {}, "patch.w in .* model.patch is 2 there and 4 here"),
    "patch by channels": (dict(patch=1), Shape(4, 4, 10), {}, "with model.patch 2 and this run has 1, which no shape"),
    "frames": (dict(frame_patch=2), Shape(1, (4, 8, 8), 10), {}, "model.frame_patch is 1 there and 2 here"),
    "heads": (dict(heads=4), SHAPE, {}, "model.heads is 2 there and 4 here"),
    "positions": (dict(positions="rotary"), SHAPE, {}, "no shape shows: use --model.positions sincos"),
    "strict": ({}, Shape(1, 8, 4), dict(strict=True), r"finetune.strict wants .* \(10 -> 4 classes"),
    "frozen": (
        {},
        Shape(1, 8, 4),
        dict(train=("final.*",)),
        r"label.w \(10 -> 4 .* step 0, as .* has final.\*: use .* \"final.\*\" \"label.\*\"",
    ),
    "frozen by adapters": (
        {},
        Shape(1, 8, 4),
        dict(lora_rank=2),
        r"label.w .* step 0, as .* has adapters alone: use --finetune.train \"label.\*\"",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_weights(tmp_path, case):
    changes, shape, tuned, reason = REFUSED[case]
    changes = {"heads": 2, **changes}
    theirs = variant(MODEL, width=24)
    saved(tmp_path / "w.safetensors", theirs)
    with pytest.raises((CheckpointError, ValueError), match=reason):
        started(tmp_path / "w.safetensors", shape, model=variant(MODEL, **changes), **tuned)


SETTINGS = {
    "no weights": (dict(train=("final.*",)), "finetune.train is set but nothing is fine-tuned: give weights with"),
    "no weights, adapters": (dict(lora_rank=4), "finetune.lora_rank is set but nothing"),
    "no weights, strict": (dict(strict=True), "finetune.strict is set but nothing"),
    "targets alone": (dict(lora_targets=("qkv",)), "lora_targets is qkv but finetune.lora_rank is 0"),
    "alpha alone": (dict(lora_alpha=4.0), "lora_alpha is 4.0 but finetune.lora_rank is 0"),
    "rank": (dict(lora_rank=-1), "lora_rank is -1: use 1 or more"),
    "all and more": (dict(train=("all", "final.*")), "use all alone"),
    "pattern": (dict(train=("finl.*",)), r"finl.\* matches no leaf of this model: the nearest are final.\*"),
    "target": (dict(lora_rank=4, lora_targets=("kqv",)), "lora_targets kqv is no matrix .* use some of adaln, mlp"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_refused_settings(tmp_path, case):
    tuned, reason = SETTINGS[case]
    source = None if case.startswith("no weights") else tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=reason):
        plan.compose(variant(RUN, init_from=source, finetune=finetune.Config(**tuned)), SHAPE)


def test_there_must_be_weights_where_there_is_nothing_to_resume(tiny):
    from test_runs import train_script

    with pytest.raises(ValueError, match=r"finetune.lora_rank is set but nothing is fine-tuned"):
        train_script.main(variant(tiny, resume="latest", finetune=finetune.Config(lora_rank=2)))


def test_settings_survive_json():
    run = variant(RUN, finetune=finetune.Config(train=("label.*", "final.*", "x"), lora_rank=3, lora_targets=("qkv",)))
    assert from_json(config.Run, to_json(run)) == run


# --- frozen leaves and adapters ---

FROZEN = finetune.Config(train=("label.*", "final.*", "blocks.1.mlp.*"))
LORA = finetune.Config(lora_rank=4, lora_alpha=6.0, train=("label.*",), lora_targets=("qkv", "out", "mlp", "adaln"))
CASES = [
    (0, "none", "none"),
    (1, "none", "block"),
    (2, "none", "none"),
    (2, "optimizer", "block"),
    (3, "none", "block"),
    (3, "optimizer", "none"),
]


def tuning(tuned, **parallel):
    return variant(RUN, init_from="x", finetune=tuned, micro_batch=3, parallel=config.Parallel(**parallel))


@functools.cache
def drawn(tuned):
    """Weights of fp64, once a process."""
    return redraw(finetune.declare(tuned, declared()))


def batches(rank=0, size=1):
    """A rank's shares of three global batches."""
    for ids in torch.arange(3 * RUN.global_batch).chunk(3):
        mine = ids.chunk(size)[rank]
        yield data.Batch(mine, random.normal(KEY, (1, 8, 8), mine), mine % 10)


def fp64_state(composed):
    whole, axis = drawn(composed.run.finetune), composed.layout.axis
    params = tree.map(lambda w, s: s.take(w, axis.rank).clone(), whole, composed.layout.specs)
    ema = tree.map(torch.clone, params)
    opt = training.optimizer(composed).init(params)
    state = training.TrainState(0, params, opt, ema, training.LossScale(1.0, 0))
    return training.share_frozen(composed, state)


def three_steps(mesh, run):
    """[(loss, norm)], and {role: whole leaves by name} after three steps."""
    composed = dataclasses.replace(plan.compose(run, SHAPE, mesh), dtype=torch.float64)
    state, step, log = fp64_state(composed), training.make_step(composed), []
    for batch in batches(mesh.dp.rank, mesh.dp.size):
        state, metrics = step(state, batch, KEY)
        log.append((metrics["loss"], metrics["grad_norm"]))
    specs = tree.leaves(composed.layout.specs)
    roles = {"param": state.params, "m": state.opt.m, "v": state.opt.v, "ema": state.ema}
    return log, {role: list(zip(tree.paths(t), tree.leaves(t), specs)) for role, t in roles.items()}


@functools.lru_cache(maxsize=4)
def one_rank(tuned):
    return three_steps(single(), tuning(tuned))


def assert_equal_to_one_rank(found, tuned, bound=1e-11):
    """Each rank's parts against those of the whole leaves; frozen ones bit for bit those of the start."""
    log, wholes = one_rank(tuned)
    composed = plan.compose(tuning(tuned), SHAPE)
    begun, trains = (
        dict(tree.items(drawn(tuned))),
        dict(zip(tree.paths(composed.declared), composed.trained)),
    )
    for rank, (rank_log, roles) in enumerate(found):
        assert torch.allclose(torch.tensor(rank_log), torch.tensor(log), rtol=bound)
        for role, leaves in roles.items():
            for (path, part, spec), (_, whole, _) in zip(leaves, wholes[role], strict=True):
                expected = spec.take(whole if trains[path] else begun[path] * (role in ("param", "ema")), rank)
                if not trains[path]:
                    assert torch.equal(part, expected), f"{role} {path}"
                else:
                    assert (part - expected).norm() <= bound * max(1e-3, expected.norm()), f"{role} {path}"


@pytest.mark.parametrize("world", [2], scope="session")
@pytest.mark.parametrize("zero, offload, remat", CASES)
@pytest.mark.parametrize("tuned", [FROZEN, LORA], ids=["frozen", "lora"])
def test_two_ranks_equal_one(ranks, world, tuned, zero, offload, remat):
    run = tuning(tuned, zero=zero, offload=offload, remat=remat)
    assert_equal_to_one_rank(ranks.run(world, three_steps, run), tuned)


def test_frozen_leaves_take_no_memory_beside_their_weight():
    """What a state holds, and what the plan of memory says stands between steps."""
    composed = plan.compose(tuning(LORA), SHAPE)
    state = training.share_frozen(composed, training.init_state(composed, KEY))
    everything = tree.leaves([state.params, state.opt.m, state.opt.v, state.ema])
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in everything}
    num, few = (param.count(t) for t in (composed.declared, finetune.select(composed.declared, composed.trained)))
    zeros = 2 * 4 * (len(composed.trained) - sum(composed.trained))
    assert sum(found.values()) == 4 * num + 12 * few + zeros
    assert memory.predict(composed).standing == 4 * num + 12 * few


@pytest.mark.parametrize("world", [2], scope="session")
@pytest.mark.parametrize("sequence, zero", [("megatron", 0), ("megatron", 3), ("ulysses", 3)])
def test_adapters_under_a_sequence_strategy(ranks, world, sequence, zero):
    """Megatron claims heads and ffn of w, and of the adapters' dims with the same letters."""
    run = variant(tuning(LORA, zero=zero, sp=2, sequence=sequence), micro_batch=6)
    assert_equal_to_one_rank(ranks.run(world, three_steps, run, sp=2), LORA)


def test_frozen_steps_are_those_of_a_plain_optimizer():
    """torch.optim.AdamW over the trained leaves alone, clipped by their norm, from a model with nothing frozen."""
    log, wholes = one_rank(FROZEN)
    run = variant(RUN, micro_batch=3)
    composed = dataclasses.replace(plan.compose(run, SHAPE), dtype=torch.float64)
    params = redraw(composed.declared)
    trains = plan.compose(tuning(FROZEN), SHAPE).trained
    mine, cfg = finetune.select(params, trains), run.optimizer
    assert 0 < len(mine) < len(trains)
    adam = torch.optim.AdamW(mine, lr=0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay)
    for i, batch in enumerate(batches()):
        adam.param_groups[0]["lr"] = cfg.lr * (i + 1) / cfg.warmup
        _, grads, _ = training.gradients(composed, params, batch, KEY)
        found = finetune.select(grads, trains)
        norm = torch.stack([g.square().sum() for g in found]).sum().sqrt()
        assert abs(log[i][1] - norm) <= 1e-11 * norm and norm > cfg.clip
        for p, g in zip(mine, found):
            p.grad = g * cfg.clip / norm
        adam.step()
    for (path, found, _), expected in zip(wholes["param"], tree.leaves(params)):
        assert (found - expected).norm() <= 1e-11 * (1 + expected.norm()), path


def test_adapters_change_nothing_at_first(tmp_path):
    """Bit for bit: b is 0."""
    saved(tmp_path / "w.safetensors")
    x, t, y = inputs()
    outs = []
    for tuned in ({}, dict(lora_rank=4, lora_targets=("qkv", "out", "mlp", "adaln"))):
        composed, (params, lines) = started(tmp_path / "w.safetensors", **tuned)
        working, ops = composed.inference(params)
        outs.append(composed.forward(working, x, t, y, ops))
    assert torch.equal(*outs) and outs[0].any()
    assert params["blocks"][1]["mlp"]["fc1"]["lora"]["a"].std() > 0.1
    assert "blocks.*.qkv.lora.a" in lines[0]


@pytest.mark.parametrize("targets, joins", [(("qkv", "mlp"), True), (("qkv", "time.adaln"), False)])
def test_modulations_by_one_product_leave_adapters_alone(targets, joins):
    """Those of qkv are merged where a block runs; one adaLN layer with an adapter keeps all as they were."""
    model = variant(MODEL, arch="latte")
    tuned = finetune.Config(lora_rank=3, lora_targets=targets)
    composed = plan.compose(variant(RUN, init_from="x", model=model, finetune=tuned), Shape(1, (2, 8, 8), 10))
    params, ops = composed.inference(redraw(composed.declared, dtype=torch.float32))
    joined = models.of(model).joined(params)
    assert ("joined" in joined) is joins and (joined is params) is not joins
    x, t, y = inputs(2, (2, 8, 8))
    torch.testing.assert_close(composed.forward(joined, x, t, y, ops), composed.forward(params, x, t, y, ops))


@pytest.mark.parametrize(
    "model", [MODEL, variant(MODEL, arch="latte", mlp="swiglu", qk_norm=True)], ids=["dit", "latte"]
)
def test_gradients_of_adapters_by_hand(model):
    """With W = w + s b a and G = dL/dW of the plain model: db = s G a^T, da = s b^T G, and nothing else has one."""
    shape = Shape(1, (2, 8, 8), 10) if model.arch == "latte" else SHAPE
    tuned = finetune.Config(lora_rank=3, lora_alpha=6.0, lora_targets=("qkv", "out", "mlp.fc1", "adaln"))
    composed = plan.compose(variant(RUN, init_from="x", model=model, finetune=tuned), shape)
    composed = dataclasses.replace(composed, dtype=torch.float64)
    params = redraw(composed.declared)
    x, t, y = inputs(2, shape.size)
    held = composed.layout.hold(params)

    def loss(p, ops=None):
        view = composed.view(p, held) if ops is None else (p, ops)
        return composed.forward(view[0], x.double(), t, y, view[1]).square().sum(), None

    value, _, grads = training.value_and_grad(loss, params, composed.trained)
    plain = finetune.merge(params, 2.0)
    expected, _, by_w = training.value_and_grad(functools.partial(loss, ops=composed.ops), plain)
    assert abs(value - expected) <= 1e-12 * expected
    whole, found, by_w = (dict(tree.items(t)) for t in (params, grads, by_w))
    adapters = [path[: -len(".lora.a")] for path in whole if path.endswith(".lora.a")]
    assert len(adapters) == 8
    for path in adapters:
        a, b = whole[f"{path}.lora.a"].flatten(1), whole[f"{path}.lora.b"].flatten(0, -2)
        g = by_w[f"{path}.w"].reshape(len(b), -1)
        for name, by_hand in (("a", 2 * b.T @ g), ("b", 2 * g @ a.T)):
            assert torch.allclose(found[f"{path}.lora.{name}"].reshape(by_hand.shape), by_hand, rtol=1e-10, atol=1e-12)
    assert {path for path, g in found.items() if g is not None} == {f"{p}.lora.{n}" for p in adapters for n in "ab"}


@pytest.mark.parametrize("world", [2], scope="session")
def test_each_rank_starts_with_its_parts(ranks, world, tmp_path):
    saved(tmp_path / "w.safetensors")
    _, (whole, _) = started(tmp_path / "w.safetensors", Shape(1, 8, 4), **dict(train=("label.*",), lora_rank=4))
    for rank, parts in enumerate(ranks.run(world, start_parts, tmp_path / "w.safetensors")):
        assert all(
            torch.equal(spec.take(w, rank), part) for w, (part, spec) in zip(tree.leaves(whole), parts, strict=True)
        )


def start_parts(mesh, path):
    composed, (params, _) = started(
        path, Shape(1, 8, 4), mesh, config.Parallel(zero=3), train=("label.*",), lora_rank=4
    )
    return list(zip(tree.leaves(params), tree.leaves(composed.layout.specs)))


# --- whole runs ---


def write_pictures(folder, classes, each=12):
    dataset = data.open_dataset(data.Config(source="digits"))
    for c in classes:
        (folder / str(c)).mkdir(parents=True)
        for n in torch.nonzero(dataset.y_N == c)[:each, 0].tolist():
            x, _ = dataset.read([n])
            Image.fromarray(((x[0, 0] + 1) * 127.5).byte().numpy()).convert("RGB").save(folder / str(c) / f"{n}.png")
    return folder


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_on_own_pictures(tiny, tmp_path, rank, capsys):
    """Five classes, then three others: by frozen parts, by adapters; weights to share are those of the plain model."""
    from test_runs import sample_script, train_script  # the pool's processes have no use for them

    def run(name, classes, **changes):
        source = data.Config(source="folder", path=write_pictures(tmp_path / name, classes), image_size=8, held_out=0.2)
        found = variant(tiny, out=tmp_path / f"run-{name}", steps=2, global_batch=8, data=source, **changes)
        train_script.main(found)
        return found

    first = run("a", range(5))
    tuned = finetune.Config(train=("label.*", "final.*"), lora_rank=rank)
    second = run("b", (6, 8, 9), init_from=first.out / "ema.safetensors", finetune=tuned)
    said = capsys.readouterr().out
    assert "label.w (5 -> 3 classes, null row kept)" in said and "the others are frozen" in said
    before, after = (load_file(found.out / "ema.safetensors") for found in (first, second))
    assert before.keys() == after.keys()
    moved = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    own = {name for name in before if name.startswith(("ema/label", "ema/final"))}
    assert moved == own | {
        n for n in before if rank and n.endswith((".qkv.w", "out.w", "fc1.w", "fc2.w")) and "blocks" in n
    }
    step = second.out / "checkpoints" / "step_00000002"
    pictures = {}
    for source in (step, second.out / "ema.safetensors"):
        args = dict(out=tmp_path / "x.png", tensors=tmp_path / "x.safetensors", num=4, steps=2, seed=1)
        sample_script.main(sample_script.Sample(checkpoint=source, **args))
        pictures[source] = load_file(tmp_path / "x.safetensors")["samples"].clone()
    assert torch.equal(*pictures.values())
    if rank:
        with pytest.raises(CheckpointError, match=r"holds adapters .* give the ema.safetensors of that run"):
            train_script.main(variant(second, out=tmp_path / "c", init_from=step, finetune=finetune.Config()))
    train_script.main(variant(second, resume="latest"))
    assert "nothing to do" in capsys.readouterr().out
