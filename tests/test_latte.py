"""Models of clips and captions against diffusers' Latte, against slow ones written with loops, and against what must
hold of any of them."""

import collections
import dataclasses
import functools
import math

import pytest
import torch
from conftest import redraw
from diffusers import LatteTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from odit import convert, models, nn, ops, param, random, tree
from odit.data import tokens
from odit.models import config, dit, latte, text
from odit.models.config import Config, Shape
from odit.ops import Ops

F64 = torch.float64
DIT = Config(width=24, depth=2, heads=3, patch=2)
LATTE = dataclasses.replace(DIT, arch="latte", depth=4)
CLIPS = Shape(channels=2, size=(3, 4, 6), num_classes=5, outputs=2)
S, E = 6, 10
CONDITIONS = {  # what a model's condition may be: changes of the config, and of the shape
    "plain": ({}, {"num_classes": 0}),
    "labels": ({}, {}),
    "bytes": ({}, {"num_classes": 0, "text_length": S}),
    "frozen": ({}, {"num_classes": 0, "text_length": S, "text_width": E}),
    "pooled bytes": ({"text": "pooled"}, {"num_classes": 0, "text_length": S}),
    "pooled": ({"text": "pooled"}, {"num_classes": 0, "text_length": S, "text_width": E}),
}
ARCHS = {"dit": DIT, "latte": LATTE}


def made(arch, adaln, condition, size=CLIPS.size, **changes):
    """(cfg, shape) of a row of the tables above."""
    of_cfg, of_shape = CONDITIONS[condition]
    cfg = dataclasses.replace(ARCHS[arch], adaln=adaln, **of_cfg, **changes)
    return cfg, dataclasses.replace(CLIPS, size=size, **of_shape)


def forward(params, x, t, y, cfg, *rest):
    return models.of(cfg).forward(params, x, t, y, cfg, *rest)


def drawn(cfg, shape):
    return tree.map(torch.clone, drawn_once(cfg, shape))


@functools.cache
def drawn_once(cfg, shape):
    return redraw(models.of(cfg).declare(cfg, shape))


def batch(shape, count=3, dtype=F64):
    """Clips, times and conditions, the captions' lengths being 1, S, and between."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape.sample, generator=generator, dtype=F64).to(dtype)
    t = (torch.rand(count, generator=generator, dtype=F64) * 1000).to(dtype)
    if shape.num_classes:
        return x, t, torch.randint(shape.num_classes + 1, (count,), generator=generator)
    if not shape.text_length:
        return x, t, None
    if not shape.text_width:
        return x, t, tokens.Bytes(shape.text_length)(["a 4", "", "moves left", "12"][:count])
    length = torch.tensor([2, shape.text_length, 1, 3])[:count]
    return (
        x,
        t,
        {
            "text": torch.randn(count, shape.text_length, shape.text_width, generator=generator, dtype=F64).to(dtype),
            "mask": torch.arange(shape.text_length) < length[:, None],
            "pooled": torch.randn(count, shape.text_width, generator=generator, dtype=F64).to(dtype),
        },
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def of_sample(y, i):
    """The condition of sample i, or of a range of them."""
    return None if y is None else tree.map(lambda leaf: leaf[i], y)


# --- diffusers ---


def sines(position, width):
    """(len(position), width): sines, then cosines, of positions at width / 2 frequencies."""
    frequency = torch.exp(-math.log(10000) * 2 / width * torch.arange(width // 2, dtype=F64))
    angle = position.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class ExactTime(torch.nn.Module):
    """Their features in fp64: diffusers computes them in fp32 whatever the model's dtype."""

    def forward(self, t):
        return sines(t, 256).roll(128, 1)


def diffusers_twin(params, cfg, shape):
    """A LatteTransformer3DModel of these weights whose three fp32 constants are computed in fp64."""
    state, settings = convert.to_diffusers_latte(params, cfg, shape)
    with torch.device("meta"):
        model = LatteTransformer3DModel(**{key: value for key, value in settings.items() if key[0] != "_"})
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True)
    side, half = shape.size[1] // cfg.patch, cfg.width // 2
    place = torch.arange(side * side)
    model.pos_embed.pos_embed = torch.cat([sines(place % side, half), sines(place // side, half)], 1)[None]
    model.temp_pos_embed = sines(torch.arange(shape.size[0]), cfg.width)[None]
    model.adaln_single.emb.time_proj = ExactTime()
    return model.requires_grad_().eval(), settings


LIKE_DIFFUSERS = {
    "odd frames": (DIT, Shape(3, (3, 8, 8), outputs=2, text_length=S, text_width=E)),
    "even frames": (dataclasses.replace(DIT, patch=4, heads=2), Shape(4, (4, 12, 12), text_length=5, text_width=7)),
}


@pytest.mark.parametrize("cfg, shape", LIKE_DIFFUSERS.values(), ids=LIKE_DIFFUSERS)
def test_latte_and_every_gradient_are_those_of_diffusers(cfg, shape):
    cfg = dataclasses.replace(cfg, arch="latte", depth=4, adaln="single")
    params = drawn(cfg, shape)
    model, settings = diffusers_twin(params, cfg, shape)
    x, t, y = batch(shape)
    inputs = {"x": x, "text": y["text"]}
    theirs_in, ours_in = ({name: leaf.clone().requires_grad_() for name, leaf in inputs.items()} for _ in range(2))

    mask = y["mask"].repeat_interleave(shape.size[0], 0)  # their blocks get it as it is
    theirs = model(theirs_in["x"], t, theirs_in["text"], mask).sample
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    (theirs * weight).sum().backward()
    ours = tree.map(lambda leaf: leaf.requires_grad_(), params)
    out = forward(ours, ours_in["x"], t, y | {"text": ours_in["text"]}, cfg)
    (out * weight).sum().backward()
    assert relative(out, theirs) < 1e-12

    expected, *_ = convert.from_diffusers_latte({name: p.grad for name, p in model.named_parameters()}, settings)
    errors = {name: relative(ours_in[name].grad, theirs_in[name].grad) for name in inputs}
    for (path, leaf), g in zip(tree.items(ours), tree.leaves(expected)):
        grad = leaf.grad
        if path.endswith(("qkv.b", "kv.b")):
            # A key's bias adds the same to all scores of a query: its gradient is rounding noise, judged by a value's.
            assert g[-2].norm() < 1e-10 * g[-1].norm() and grad[-2].norm() < 1e-10 * g[-1].norm(), path
            grad, g = (torch.cat([whole[:-2], whole[-1:]]) for whole in (grad, g))
        errors[path] = relative(grad, g)
    print(f"output {relative(out, theirs):.1e}, worst gradient {max(errors.values()):.1e} of {len(errors)}")
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])


def test_fp64_constants_of_the_twin_are_those_of_diffusers_within_fp32_rounding():
    cfg, shape = LIKE_DIFFUSERS["odd frames"]
    cfg = dataclasses.replace(cfg, arch="latte", adaln="single")
    exact, settings = diffusers_twin(drawn(cfg, shape), cfg, shape)
    model = LatteTransformer3DModel(**{key: value for key, value in settings.items() if key[0] != "_"})
    assert (exact.pos_embed.pos_embed - model.pos_embed.pos_embed).abs().max() < 1e-6
    assert (exact.temp_pos_embed - model.temp_pos_embed).abs().max() < 1e-6
    t = torch.arange(1000.0)
    # Their frequencies carry 1e-7 of relative rounding, and angles reach 1000.
    assert (ExactTime()(t) - model.adaln_single.emb.time_proj(t)).abs().max() < 2e-4


# --- slowly ---


def slow_dense(h, p):
    return torch.einsum("...i,oi->...o", h, p["w"]) + p["b"]


def slow_silu(h):
    return h / (1 + torch.exp(-h))


def slow_gelu(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def slow_norm(x, eps=1e-6):
    """A token, or each of several for itself."""
    if x.ndim > 1:
        return torch.stack([slow_norm(token, eps) for token in x])
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + eps)


def slow_sines(position, width):
    """Entry by entry: sines, then cosines."""
    half = width // 2
    angles = [position / 10000 ** (i / half) for i in range(half)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=F64)


def slow_place(row, column, width):
    return torch.cat([slow_sines(column, width // 2), slow_sines(row, width // 2)])


def slow_rotate(x_HK, place):
    """Pairs (i, i + K/2) of each head: first those that turn with the frame, then the row's, then the column's."""
    pairs = x_HK.shape[1] // 2
    in_space = max(1, 3 * pairs // 8)
    counts = (pairs - 2 * in_space, in_space, in_space)
    angles = [position * 100 ** (-j / count) for position, count in zip(place, counts) for j in range(count)]
    out = torch.empty_like(x_HK)
    for i, angle in enumerate(angles):
        a, b = x_HK[:, i], x_HK[:, i + pairs]
        out[:, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, i + pairs] = a * math.sin(angle) + b * math.cos(angle)
    return out


def slow_attend(q, k, v, kept=None):
    """(n, H, K) over the keys (m, H, K) that are kept, query by query."""
    if kept is not None:
        k, v = k[kept], v[kept]
    out = torch.empty_like(q)
    for i, query in enumerate(q):
        weights = torch.exp(torch.einsum("hk,jhk->jh", query, k) / math.sqrt(q.shape[2]))
        out[i] = torch.einsum("jh,jhk->hk", weights / weights.sum(0), v)
    return out


def slow_heads(h, w_HKD, b_HK):
    return torch.einsum("nd,hkd->nhk", h, w_HKD) + b_HK


def slow_block(p, h, modulation, places=None, caption=None):
    """A block over tokens (n, D) which all see each other."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    u = slow_norm(h) * (1 + scale1) + shift1
    q, k, v = (slow_heads(u, p["qkv"]["w"][i], p["qkv"]["b"][i]) for i in range(3))
    if places is not None:
        q, k = (torch.stack([slow_rotate(*pair) for pair in zip(x, places)]) for x in (q, k))
    h = h + gate1 * (torch.einsum("nhk,dhk->nd", slow_attend(q, k, v), p["out"]["w"]) + p["out"]["b"])
    if caption is not None:
        h = h + slow_cross(p["cross"], h, *caption)
    u = slow_norm(h) * (1 + scale2) + shift2
    return h + gate2 * slow_dense(slow_gelu(slow_dense(u, p["mlp"]["fc1"])), p["mlp"]["fc2"])


def slow_cross(p, h, words, mask):
    q = slow_heads(h, p["q"]["w"], p["q"]["b"])
    k, v = (slow_heads(words, p["kv"]["w"][i], p["kv"]["b"][i]) for i in range(2))
    return torch.einsum("nhk,dhk->nd", slow_attend(q, k, v, mask), p["out"]["w"]) + p["out"]["b"]


def slow_encoder(p, ids, mask):
    """The byte encoder on one caption: its features, and the caption's own from what the mask keeps."""
    ids, rows = ids.tolist(), []
    read = [32 if byte == 256 else byte for byte in ids]
    for j, byte in enumerate(ids):
        row, hashed = p["embed"][byte] + 0.02 * slow_sines(j, p["embed"].shape[1]), read[j] + 1
        for n in range(2, 7):  # n-grams that end here, before a caption zeros
            first = j - n + 1
            hashed = (hashed * 1_000_003 + (read[first] + 1 if first >= 0 else 0)) % (2**31 - 1)
            if 32 not in read[max(0, first + 1) : j]:  # a word and the blanks around it
                row = row + p["ngrams"][hashed % 8192]
        rows.append(row)
    h = torch.stack(rows)

    def norm(h, p):
        return slow_norm(h, 1e-5) * p["w"] + p["b"]  # PyTorch's epsilon

    for layer in p["layers"]:
        u = norm(h, layer["norm1"])
        q, k, v = (slow_heads(u, layer["qkv"]["w"][i], layer["qkv"]["b"][i]) for i in range(3))
        o = slow_attend(q, k, v, mask)
        h = h + torch.einsum("nhk,dhk->nd", o, layer["out"]["w"]) + layer["out"]["b"]
        mlp = layer["mlp"]
        h = h + slow_dense(slow_gelu(slow_dense(norm(h, layer["norm2"]), mlp["fc1"])), mlp["fc2"])
    return norm(h, p["norm"]), norm(h[mask].mean(0), p["norm"])


def slow_condition(params, t, y, cfg):
    """(c, caption or None) of one sample."""
    frequency = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    features = [math.cos(float(t) * f) for f in frequency] + [math.sin(float(t) * f) for f in frequency]
    hidden = slow_silu(slow_dense(torch.tensor(features, dtype=F64), params["time"]["fc1"]))
    c = slow_dense(hidden, params["time"]["fc2"])
    if "label" in params:
        return c + params["label"]["w"][int(y)], None
    if "text" not in params:
        return c, None
    p = params["text"]
    if "encoder" in p:
        words, pooled = slow_encoder(p["encoder"], y["tokens"], y["mask"])
    else:
        words, pooled = y["text"], y["pooled"]

    def project(h):
        return slow_dense(slow_gelu(slow_dense(h, p["fc1"])), p["fc2"])

    return (c + project(pooled), None) if cfg.text == "pooled" else (c, (project(words), y["mask"]))


def slow_model(params, x, t, y, cfg):
    """One clip (C, T, H, W) or picture (C, H, W) through a DiT or Latte."""
    D, patch, clip = cfg.width, cfg.patch, x.ndim == 4
    x = x if clip else x[:, None]
    deep = cfg.frame_patch
    T, R, C = x.shape[1] // deep, x.shape[2] // patch, x.shape[3] // patch
    places = [(f, r, c) for f in range(T) for r in range(R) for c in range(C)]

    def piece(x, f, r, c):
        rows, columns = slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch)
        return x[:, f * deep : (f + 1) * deep, rows, columns]

    h = {place: slow_dense(piece(x, *place).flatten(), params["patch"]) for place in places}
    c, caption = slow_condition(params, t, y, cfg)
    if cfg.adaln == "single":
        once = slow_dense(slow_silu(c), params["adaln"]).reshape(6, D)

    def modulation(p):
        return p["table"] + once if cfg.adaln == "single" else slow_dense(slow_silu(c), p["adaln"]).reshape(6, D)

    def run(p, among, **more):
        out = slow_block(p, torch.stack([h[place] for place in among]), modulation(p), **more)
        h.update(zip(among, out))

    if cfg.positions == "sincos":
        for f, row, column in places:
            h[f, row, column] = h[f, row, column] + slow_place(row, column, D)
    if cfg.arch == "latte":
        for i, pair in enumerate(params["blocks"]):
            for f in range(T):
                run(pair["space"], [place for place in places if place[0] == f], caption=caption)
            for place in places if i == 0 else []:
                h[place] = h[place] + slow_sines(place[0], D)
            for r in range(R):
                for column in range(C):
                    run(pair["time"], [place for place in places if place[1:] == (r, column)])
    else:
        if clip and cfg.positions == "sincos":
            for place in places:
                h[place] = h[place] + slow_sines(place[0], D)
        for block in params["blocks"]:
            run(block, places, places=places if cfg.positions == "rotary" else None, caption=caption)

    p = params["final"]
    shift, scale = p["table"] + c if cfg.adaln == "single" else slow_dense(slow_silu(c), p["adaln"]).reshape(2, D)
    num = p["out"]["b"].numel() // (deep * patch**2)
    out = torch.empty(num, *x.shape[1:], dtype=F64)
    for place in places:
        values = slow_dense(slow_norm(h[place]) * (1 + scale) + shift, p["out"])
        piece(out, *place).copy_(values.reshape(deep, patch, patch, num).permute(3, 0, 1, 2))
    return out if clip else out[:, 0]


SLOW = {
    "latte labels": made("latte", "zero", "labels"),
    "latte captions": made("latte", "zero", "bytes"),
    "latte frozen captions": made("latte", "zero", "frozen"),
    "latte single": made("latte", "single", "frozen"),
    "latte single labels": made("latte", "single", "labels"),
    "clip": made("dit", "zero", "labels"),
    "clip rotary": made("dit", "zero", "labels", positions="rotary"),
    "clip rotary wide": made("dit", "zero", "plain", positions="rotary", width=32, heads=2),
    "clip captions": made("dit", "zero", "bytes"),
    "clip frozen captions": made("dit", "zero", "frozen", positions="rotary"),
    "clip pooled": made("dit", "zero", "pooled"),
    "clip pooled bytes": made("dit", "zero", "pooled bytes"),
    "clip single": made("dit", "single", "frozen"),
    "latte, patches of two frames": made("latte", "zero", "labels", (4, 4, 6), frame_patch=2),
    "clip, patches of two frames": made("dit", "zero", "labels", (6, 4, 6), frame_patch=2),
    "clip rotary, patches of two frames": made("dit", "zero", "labels", (6, 4, 6), frame_patch=2, positions="rotary"),
    "picture captions": made("dit", "zero", "frozen", (4, 6)),
}


@pytest.mark.parametrize("cfg, shape", SLOW.values(), ids=SLOW)
def test_forward_is_the_slow_one(cfg, shape):
    config.check(cfg, shape)
    params, (x, t, y) = drawn(cfg, shape), batch(shape, 2)
    with torch.no_grad():
        slow = [slow_model(params, x[i], t[i], of_sample(y, i), cfg) for i in range(2)]
        error = relative(forward(params, x, t, y, cfg), torch.stack(slow))
    print(f"{error:.1e}")
    assert error < 1e-12


# --- attention with a mask ---

MASK = torch.tensor([[True] * 5, [True, False, True, False, False], [False, False, False, False, True]])


def cross_inputs():
    params = redraw(dit.declare_block(DIT, crossed=True))["cross"]
    generator = torch.Generator().manual_seed(3)
    h, words = (torch.randn(3, n, 24, generator=generator, dtype=F64) for n in (7, 5))
    return h.requires_grad_(), tree.map(lambda leaf: leaf.requires_grad_(), params), words.requires_grad_()


def grads(out, *wanted):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    return torch.autograd.grad((out * weight).sum(), wanted)


def test_cross_and_its_gradients_are_those_of_multihead_attention():
    h, p, words = cross_inputs()
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True, dtype=F64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p["q"]["w"].reshape(24, 24), p["kv"]["w"].reshape(48, 24)]))
        theirs.in_proj_bias.copy_(torch.cat([p["q"]["b"].flatten(), p["kv"]["b"].flatten()]))
        theirs.out_proj.weight.copy_(p["out"]["w"].reshape(24, 24))
        theirs.out_proj.bias.copy_(p["out"]["b"])
    expected, _ = theirs(h, words, words, key_padding_mask=~MASK)
    packed, last, *inputs = grads(expected, theirs.in_proj_weight, theirs.out_proj.weight, h, words)
    for cross in (ops.cross, ops.cross_sdpa):
        out = cross(h, p, words, MASK)
        assert relative(out, expected) < 1e-13
        found = grads(out, p["q"]["w"], p["kv"]["w"], p["out"]["w"], h, words)
        for a, b in zip(found, (packed[:24], packed[24:], last, *inputs)):
            assert relative(a.reshape(b.shape), b) < 1e-13


def test_attend_masked_is_attend_over_the_keys_that_are_kept():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(3, n, 2, 8, generator=generator, dtype=F64) for n in (7, 5, 5))
    found = ops.attend_masked(q, k, v, MASK)
    for i in range(3):
        assert relative(found[i], ops.attend(q[i : i + 1], k[i : i + 1, MASK[i]], v[i : i + 1, MASK[i]])[0]) < 1e-14
        assert relative(found[i], slow_attend(q[i], k[i], v[i], MASK[i])) < 1e-14
    assert torch.equal(ops.attend_masked(q, k, v, torch.ones(3, 5, dtype=torch.bool)), ops.attend(q, k, v))
    spoiled = torch.where(MASK[:, :, None, None], k, 1e3), torch.where(MASK[:, :, None, None], v, 1e3)
    assert torch.equal(ops.attend_masked(q, *spoiled, MASK), found)


# --- the byte-level encoder ---

CAPTIONS = ["seven, moving left", "a 3", "", "große Ziffer: ½"]


def encoder():
    cfg = dataclasses.replace(DIT, text_depth=2)
    return redraw(text.declare(cfg))


def test_padding_of_a_caption_changes_nothing():
    p = encoder()
    short, long = (tokens.Bytes(length)(CAPTIONS) for length in (20, 32))
    (a, mean_a), (b, mean_b) = (text.encode(p, y["tokens"], y["mask"]) for y in (short, long))
    kept = short["mask"]
    assert relative(b[:, :20][kept], a[kept]) < 1e-13 and relative(mean_b, mean_a) < 1e-13
    lone = tokens.Bytes(1 + len(CAPTIONS[1]))(CAPTIONS[1:2])
    c, mean_c = text.encode(p, **renamed(lone))
    assert lone["mask"].all() and relative(a[1, :4], c[0]) < 1e-13 and relative(mean_a[1], mean_c[0]) < 1e-13


def renamed(y):
    return {"tokens_BS": y["tokens"], "mask_BS": y["mask"]}


def test_a_caption_does_not_depend_on_another_and_depends_on_its_bytes_and_their_order():
    p, make = encoder(), tokens.Bytes(20)
    a, _ = text.encode(p, **renamed(make(CAPTIONS)))
    for i, caption in enumerate(CAPTIONS):
        assert relative(text.encode(p, **renamed(make([caption])))[0][0], a[i]) < 1e-13
    b, _ = text.encode(p, **renamed(make(["evens, moving left", *CAPTIONS[1:]])))
    assert torch.equal(a[1:], b[1:]) and relative(a[0, 0], b[0, 0]) > 1e-4  # the begin token tells anagrams apart


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("condition", ["bytes", "pooled bytes"])
def test_padding_changes_no_output(arch, condition):
    cfg, shape = made(arch, "zero", condition)
    params, (x, t, _) = drawn(cfg, shape), batch(shape, 4)
    out = [forward(params, x, t, tokens.Bytes(length)(CAPTIONS), cfg) for length in (20, 32)]
    assert relative(out[1], out[0]) < 1e-12


# --- what must hold ---

each_model = pytest.mark.parametrize(
    "cfg, shape",
    [made(arch, adaln, condition) for arch in ARCHS for adaln in ("zero", "single") for condition in CONDITIONS],
    ids=[f"{arch} {adaln} {condition}" for arch in ARCHS for adaln in ("zero", "single") for condition in CONDITIONS],
)


@each_model
def test_modulations_by_one_product_are_those_by_one_a_block(cfg, shape):
    params, given = drawn(cfg, shape), batch(shape)
    found = models.of(cfg).joined(params)
    assert relative(forward(found, *given, cfg), forward(params, *given, cfg)) < 1e-13
    if cfg.adaln == "single":
        assert found is params
        return
    assert found["joined"]["w"].shape == (6 * cfg.width * cfg.depth, cfg.width)
    assert not any("adaln" in path for path, _ in tree.items(found["blocks"]))


@each_model
def test_sums_left_to_the_next_block_change_nothing(cfg, shape):
    """The frames' positions, which enter before the sum instead of after it, aside."""
    params, given, calls = drawn(cfg, shape), batch(shape), collections.Counter()

    def gated(*args):
        calls["gated"] += 1
        return ops.gated(*args)

    def run(record):
        leaves = [p.requires_grad_() for p in tree.leaves(params)]
        out = forward(tree.unflatten(params, leaves), *given, cfg, record)
        return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]

    found, expected = run(Ops(gated=gated)), run(Ops(layers=lambda *args: ops.layers(*args)))
    crossed = cfg.depth if cfg.arch == "dit" else cfg.depth // 2  # their first sum is cross-attention's to read
    assert calls["gated"] == (crossed if dit.crosses(cfg, shape) else 0)
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or (a - b).norm() <= 1e-12 * max(b.norm(), 1e-9 * expected[0].norm())


@each_model
def test_at_initialisation_output_is_zero_and_blocks_are_the_identity(cfg, shape):
    params = param.init(models.of(cfg).declare(cfg, shape), random.key(0))
    x, t, y = batch(shape, dtype=torch.float32)
    assert torch.equal(forward(params, x, t, y, cfg), torch.zeros(3, 4, *shape.size))
    c, caption = dit.condition(params, t, y, cfg)
    _, c = dit.for_blocks(params, c)
    if cfg.arch == "dit":
        h = torch.randn(3, 18, 24)
        for p in params["blocks"]:
            assert torch.equal(dit.make_block(cfg, Ops())(p, h, c, (), *caption), h)
        return
    h, time = torch.randn(3, 3, 6, 24), torch.randn(3, 24)
    for i, p in enumerate(params["blocks"]):  # frames' positions enter in the first pair, and only there
        expected = h + time[:, None] if i == 0 else h
        assert torch.equal(latte.make_pair(cfg, Ops())(p, h, c, (time,), *caption), expected)


@each_model
def test_macs_and_parameters_are_those_counted(cfg, shape):
    params = tree.map(lambda p: torch.empty(p.shape, device="meta"), models.of(cfg).declare(cfg, shape))
    x, t, y = batch(shape, 1, torch.float32)
    x, t, y = (tree.map(lambda leaf: leaf.to("meta") if leaf is not None else None, tensors) for tensors in (x, t, y))
    with FlopCounterMode(display=False) as counter:
        forward(params, x, t, y, cfg)
    assert models.of(cfg).macs(cfg, shape) == counter.get_total_flops() // 2
    total, trained = models.num_params(cfg, shape)
    assert trained == sum(leaf.numel() for leaf in tree.leaves(params))
    assert total - trained == (2 * 3 + 3) * cfg.width  # the tables of places and of frames


@each_model
def test_a_sample_does_not_depend_on_another_and_frames_see_each_other(cfg, shape):
    params, (x, t, y) = drawn(cfg, shape), batch(shape)
    x = x.requires_grad_()
    out = forward(params, x, t, y, cfg)
    (g,) = torch.autograd.grad(out[1, :, 0].sum(), x)
    assert not g[[0, 2]].any() and g[1].flatten(2).abs().amax((0, 2)).min() > 0
    with torch.no_grad():
        alone = forward(params, x[1:2], t[1:2], of_sample(y, slice(1, 2)), cfg)
        assert relative(alone[0], out[1]) < 1e-13
        if y is not None:
            other = forward(params, x, t, tree.map(lambda leaf: leaf.roll(1, 0), y), cfg)
            assert (other - out).flatten(1).norm(dim=1).min() > 1e-4


def test_blocks_over_space_keep_frames_apart_and_blocks_over_time_keep_places_apart():
    cfg, shape = made("latte", "zero", "labels")
    pair = drawn(cfg, shape)["blocks"][1]
    still = {name: tree.map(torch.zeros_like, block) for name, block in pair.items()}  # zero weights: the identity
    h, c = torch.randn(1, 3, 6, 24, dtype=F64, requires_grad=True), torch.randn(1, 24, dtype=F64)
    run = latte.make_pair(cfg, Ops())
    for p, seen in (
        ({"space": pair["space"], "time": still["time"]}, torch.tensor([[f == 1] * 6 for f in range(3)])),
        ({"space": still["space"], "time": pair["time"]}, torch.tensor([[s == 2 for s in range(6)]] * 3)),
    ):
        (g,) = torch.autograd.grad(run(p, h, c, ())[0, 1, 2].square().sum(), h)
        assert torch.equal(g[0].abs().amax(-1) > 0, seen)


def test_a_clip_of_one_frame_is_a_picture_up_to_its_frames_position():
    """The tokens are the same. Frame 0 adds sincos_1d(0), zeros and ones, not nothing; the bias of the patches makes up
    for it. Rotary positions share a head's pairs out otherwise (3/8, 3/8, 1/4 of them instead of halves)."""
    picture, clip = (dataclasses.replace(CLIPS, size=size) for size in ((4, 6), (1, 4, 6)))
    params, (x, t, y) = drawn(DIT, clip), batch(clip)
    assert torch.equal(nn.patchify(x, 2), nn.patchify(x[:, :, 0], 2))
    h = torch.randn(2, 6, 16, dtype=F64)
    assert torch.equal(nn.unpatchify(h, (1, 4, 6), 2)[:, :, 0], nn.unpatchify(h, (4, 6), 2))
    assert tree.map(lambda p: p.shape, dit.declare(DIT, picture)) == tree.map(lambda leaf: leaf.shape, params)
    frame = torch.cat([torch.zeros(12), torch.ones(12)]).double()
    shifted = params | {"patch": {"w": params["patch"]["w"], "b": params["patch"]["b"] + frame}}
    out = forward(params, x, t, y, DIT)[:, :, 0]
    assert relative(forward(shifted, x[:, :, 0], t, y, DIT), out) < 1e-13
    assert relative(forward(params, x[:, :, 0], t, y, DIT), out) > 1e-3


def test_unpatchify_undoes_patchify_up_to_the_order_within_a_token():
    x = torch.arange(2 * 3 * 4 * 4 * 6.0).reshape(2, 3, 4, 4, 6)
    cut = nn.patchify(x, 2, 2)
    assert cut.shape == (2, 12, 24)
    last = cut.unflatten(-1, (3, 8)).transpose(-1, -2).flatten(-2)  # channels fastest, as outputs are
    assert torch.equal(nn.unpatchify(last, (4, 4, 6), 2, 2), x)


@pytest.mark.parametrize("K", [6, 8, 16, 72])
def test_3d_rotary_scores_depend_on_relative_positions_alone(K):
    size = (3, 2, 4)
    places = [(f, r, c) for f in range(size[0]) for r in range(size[1]) for c in range(size[2])]
    q, k = torch.randn(2, K, generator=torch.Generator().manual_seed(0), dtype=F64)
    tables = nn.rotary_3d(*size, K)
    assert tables[0].shape == tables[1].shape == (24, K // 2)
    turned_q, turned_k = (ops.rotate(u.expand(1, 24, 1, K), *tables)[0, :, 0] for u in (q, k))
    scores = turned_q @ turned_k.T
    by_offset = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            by_offset.setdefault(tuple(m - n for m, n in zip(a, b)), []).append(scores[i, j].item())
    assert max(max(s) - min(s) for s in by_offset.values()) < 1e-13 * K
    assert len({round(s[0], 6) for s in by_offset.values()}) == len(by_offset) == 5 * 3 * 7  # and on all of them
    assert abs(by_offset[0, 0, 0][0] - (q @ k).item()) < 1e-13 * K


# --- sizes ---

LATENTS = Shape(channels=4, size=(16, 32, 32), num_classes=101, outputs=2)


def xl_by_hand(D=1152, depth=28):
    """Trainable parameters of XL/2 on 4 latent channels with learned variance and 101 classes."""
    block = (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 5 * D) + (6 * D * D + 6 * D)
    around = (16 * D + D) + (256 * D + D + D * D + D) + 102 * D
    return depth * block + around + (2 * D * D + 2 * D) + (32 * D + 32)


def test_sizes_of_models_of_clips():
    for size in config.SIZES:
        row = []
        for arch in ("dit", "latte"):
            cfg = config.sized(size, 2, arch=arch)
            config.check(cfg, LATENTS)
            total, trained = models.num_params(cfg, LATENTS)
            assert trained == param.count(models.of(cfg).declare(cfg, LATENTS))
            assert total - trained == (16 * 16 + 16) * cfg.width
            row.append(f"{arch} {trained / 1e6:7.2f} M {models.of(cfg).macs(cfg, LATENTS) / 1e9:8.1f} GMACs")
            if size == "xl":  # latte's blocks are the same, arranged otherwise
                assert trained == xl_by_hand() == 673_799_072
        print(f"{size:>2}/2  " + "   ".join(row))
    cfg = config.sized("xl", 2, arch="latte", adaln="single")
    shape = dataclasses.replace(LATENTS, num_classes=0, text_length=120, text_width=4096)
    with torch.device("meta"):
        settings = convert.to_diffusers_latte(param_shapes(cfg, shape), cfg, shape)[1]
        theirs = LatteTransformer3DModel(**{key: value for key, value in settings.items() if key[0] != "_"})
    assert models.num_params(cfg, shape)[1] == sum(p.numel() for p in theirs.parameters())


def param_shapes(cfg, shape):
    return tree.map(lambda p: torch.empty(p.shape, device="meta"), models.of(cfg).declare(cfg, shape))


# --- transforms ---


def directional(fn, arguments, tangents, step):
    """Central difference of fourth order."""

    def at(s):
        return fn(*(tree.map(lambda a, d: a + s * step * d, a, d) for a, d in zip(arguments, tangents)))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


TRANSFORMED = pytest.mark.parametrize(
    "cfg, shape", [made("latte", "single", "frozen"), made("dit", "zero", "bytes", positions="rotary")]
)


@TRANSFORMED
def test_jvp_is_the_finite_difference(cfg, shape):
    params, (x, t, y) = drawn(cfg, shape), batch(shape)
    generator = torch.Generator().manual_seed(3)
    arguments = (params, x, t)
    tangents = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=F64), list(arguments))
    tangents[0] = tree.map(lambda d: 0.1 * d, tangents[0])

    def fn(params, x, t):
        return forward(params, x, t, y, cfg)

    out, tangent = torch.func.jvp(fn, arguments, tuple(tangents))
    assert torch.equal(out, fn(*arguments))
    # Truncation goes with step^4 (2e-8 at 1e-3, whose sixteenth is left), rounding with 1e-16 / step.
    assert relative(tangent, directional(fn, arguments, tangents, 5e-4)) < 1e-8


@TRANSFORMED
def test_vmap_and_vmap_of_grad_are_the_loop(cfg, shape):
    params, (x, t, y) = drawn(cfg, shape), batch(shape)

    def one(params, x, t, y):
        return forward(params, x[None], t[None], tree.map(lambda leaf: leaf[None], y), cfg)[0]

    def loss(params, x, t, y):
        return one(params, x, t, y).square().sum()

    mapped = torch.func.vmap(one, (None, 0, 0, 0))(params, x, t, y)
    assert relative(mapped, forward(params, x, t, y, cfg)) < 1e-13
    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(params, x, t, y)
    leaves = tree.map(lambda leaf: leaf.requires_grad_(), params)
    for i in range(3):
        expected = torch.autograd.grad(loss(leaves, x[i], t[i], of_sample(y, i)), tree.leaves(leaves))
        for (path, g), e in zip(tree.items(mapped), expected):
            # The true gradient of a key's bias is 0 without rotation, what comes out is rounding.
            # With one key kept, those of queries are 0, too.
            assert (g[i] - e).norm() <= 1e-12 * e.norm() + (1e-13 if path.endswith("kv.b") else 0), path
