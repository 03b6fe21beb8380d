"""The DiT against diffusers', against a slow one written from the paper, and against what must hold of any DiT."""

import cmath
import collections
import copy
import dataclasses
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from odit import convert, models, nn, ops, param, random, tree
from odit.models import dit
from odit.ops import Ops

F64 = torch.float64
CFG = dit.Config(width=48, depth=2, heads=3, patch=2)
SHAPE = dit.Shape(channels=3, size=8, num_classes=5, outputs=2)
OPTIONS = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "swiglu": {"mlp": "swiglu"},
    "all": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def drawn(cfg, shape, dtype=F64, seed=0):
    """Every leaf random, zero-initialised ones and biases too: a DiT as initialised hides every error."""
    generator = torch.Generator().manual_seed(seed)

    def draw(path, p):
        centre = 1.0 if path.endswith("_norm") else 0.0
        size = 0.1 if len(p.shape) == 1 else 0.6 * math.prod(p.shape[1:]) ** -0.5 if path.endswith("out.w") else 0.05
        return (centre + size * torch.randn(p.shape, generator=generator, dtype=F64)).to(dtype)

    return tree.map_with_path(draw, dit.declare(cfg, shape))


def batch(shape, count=3, dtype=F64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape.sample, generator=generator, dtype=F64).to(dtype)
    t = (torch.rand(count, generator=generator, dtype=F64) * 1000).to(dtype)
    return x, t, torch.randint(shape.num_classes + 1, (count,), generator=generator)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- diffusers ---


class ExactTime(torch.nn.Module):
    """Their features in fp64: diffusers computes them in fp32 whatever the model's dtype."""

    def forward(self, t):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=F64) / 127)
        return torch.cat([angle.cos(), angle.sin()], -1)


def diffusers_twin(params, cfg, shape):
    """A DiTTransformer2DModel of these weights whose two fp32 constants are computed in fp64."""
    state, config = convert.to_diffusers(params, cfg, shape)
    with torch.device("meta"):
        model = DiTTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    copies = {name: tensor.clone() for name, tensor in state.items()}  # else the blocks would share one embedder
    model.load_state_dict(copies, strict=True, assign=True)
    side = shape.size[0] // cfg.patch
    model.pos_embed.pos_embed = nn.sincos_2d(side, side, cfg.width)[None]
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = ExactTime()
    return model.requires_grad_().eval(), config  # eval: no label dropout


@pytest.mark.every(2)
@pytest.mark.parametrize("cfg, shape", [
    (dit.sized("s", 2), dit.Shape(4, 32, 1000, 2)),
    (dit.sized("s", 8), dit.Shape(4, 32, 1000, 2)),
    (dataclasses.replace(CFG, patch=4), dit.Shape(3, 16, 7, 1)),
], ids=["S/2", "S/8", "small"])  # fmt: skip
def test_output_and_every_gradient_are_those_of_diffusers(cfg, shape):
    cfg = dataclasses.replace(cfg, timestep_freqs="diffusers", mlp_eps=1e-5)
    params = drawn(cfg, shape)
    model, config = diffusers_twin(params, cfg, shape)
    x, t, y = batch(shape, 2)

    theirs = model(x, timestep=t, class_labels=y).sample
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    (theirs * weight).sum().backward()
    ours = tree.map(lambda leaf: leaf.requires_grad_(), params)
    out = dit.forward(ours, x, t, y, cfg)
    (out * weight).sum().backward()
    assert relative(out, theirs) < 1e-10

    # The shared embedder's gradient is the sum over their copies.
    found = {name: p.grad for name, p in model.named_parameters()}
    first = "transformer_blocks.0.norm1.emb."
    for name in [name for name in found if name.startswith(first)]:
        names = [name.replace(".0.", f".{i}.", 1) for i in range(cfg.depth)]
        total = sum(found[copied] for copied in names)
        found.update(dict.fromkeys(names, total))
    expected, *_ = convert.from_diffusers(found, config)
    errors = {path: relative(leaf.grad, g) for (path, leaf), g in zip(tree.items(ours), tree.leaves(expected))}
    # A key's bias adds the same to all scores of a query: its gradient is rounding noise, judged by the query's.
    for i, block in enumerate(expected["blocks"]):
        q, k, v = block["qkv"]["b"]
        ours_b = ours["blocks"][i]["qkv"]["b"].grad
        assert k.norm() < 1e-10 * q.norm() and ours_b[1].norm() < 1e-10 * q.norm()
        errors[f"blocks.{i}.qkv.b"] = max(relative(ours_b[0], q), relative(ours_b[2], v))
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])
    print(f"output {relative(out, theirs):.1e}, worst gradient {max(errors.values()):.1e}")


def test_constants_are_those_of_diffusers_within_fp32_rounding():
    t = torch.arange(1000.0)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    # Their frequencies carry 1e-7 of relative rounding, and angles reach 1000.
    assert (nn.timestep_features(t, 256, "diffusers") - theirs).abs().max() < 2e-4
    model = DiTTransformer2DModel(2, 24, num_layers=1, sample_size=12, patch_size=2, num_embeds_ada_norm=1)
    assert (nn.sincos_2d(6, 6, 48) - model.pos_embed.pos_embed).abs().max() < 1e-6


# --- the paper, slowly ---


def slow_positions(side, width):
    """Entry by entry: the first half of a token's row codes its column, the second its row; sines before cosines."""
    table = torch.empty(side * side, width, dtype=F64)
    quarter = width // 4
    for token in range(side * side):
        row, column = divmod(token, side)
        for i in range(width):
            position = column if i < 2 * quarter else row
            angle = position / 10000 ** ((i % quarter) / quarter)
            table[token, i] = math.sin(angle) if (i // quarter) % 2 == 0 else math.cos(angle)
    return table


def slow_features(t, half=128, last=None):
    frequency = [math.exp(-math.log(10000) * i / (last or half)) for i in range(half)]
    return torch.tensor([math.cos(t * f) for f in frequency] + [math.sin(t * f) for f in frequency], dtype=F64)


def slow_norm(x):
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def slow_rotate(x, token, side):
    """Pairs (i, i + K/2) as complex numbers: the first half of them turns with the row, the second with the column."""
    row, column = divmod(token, side)
    K = len(x)
    out = torch.empty_like(x)
    for i in range(K // 2):
        position, j = (row, i) if i < K // 4 else (column, i - K // 4)
        turned = torch.complex(x[i], x[i + K // 2]) * cmath.exp(1j * position * 100 ** (-j / (K // 4)))
        out[i], out[i + K // 2] = turned.real, turned.imag
    return out


def slow_dit(state, extra, x, t, y, heads, patch, rotary=False, last=None):
    """DiT of one picture from facebookresearch/DiT's weights; ``extra`` has what that code lacks, by block."""

    def dense(name, h):
        return torch.einsum("...i,oi->...o", h, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def silu(h):
        return h / (1 + torch.exp(-h))

    def modulate(h, shift, scale):
        return torch.stack([slow_norm(token) for token in h]) * (1 + scale) + shift

    size = x.shape[-1]
    side = size // patch
    kernel = state["x_embedder.proj.weight"]
    tokens = []
    for row in range(side):
        for column in range(side):
            piece = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(torch.einsum("cij,dcij->d", piece, kernel) + state["x_embedder.proj.bias"])
    h = torch.stack(tokens)
    L, D = h.shape
    K = D // heads
    if not rotary:
        h = h + slow_positions(side, D)
    c = dense("t_embedder.mlp.2", silu(dense("t_embedder.mlp.0", slow_features(float(t), last=last))))
    c = c + state["y_embedder.embedding_table.weight"][int(y)]

    for i, more in enumerate(extra):
        name = f"blocks.{i}"
        m = dense(f"{name}.adaLN_modulation.1", silu(c)).reshape(6, D)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = m
        q, k, v = (
            dense(f"{name}.attn.qkv", modulate(h, shift_attention, scale_attention)).reshape(L, 3, heads, K).unbind(1)
        )
        joined = torch.empty(L, heads, K, dtype=F64)
        for head in range(heads):
            qs, ks = q[:, head], k[:, head]
            if "q_norm" in more:
                qs = torch.stack([u / ((u**2).mean() + 1e-6).sqrt() * more["q_norm"] for u in qs])
                ks = torch.stack([u / ((u**2).mean() + 1e-6).sqrt() * more["k_norm"] for u in ks])
            if rotary:
                qs = torch.stack([slow_rotate(u, token, side) for token, u in enumerate(qs)])
                ks = torch.stack([slow_rotate(u, token, side) for token, u in enumerate(ks)])
            weights = torch.exp(torch.einsum("ik,jk->ij", qs, ks) / math.sqrt(K))
            joined[:, head] = torch.einsum("ij,jk->ik", weights / weights.sum(1, keepdim=True), v[:, head])
        h = h + gate_attention * dense(f"{name}.attn.proj", joined.reshape(L, D))
        u = modulate(h, shift_mlp, scale_mlp)
        hidden = dense(f"{name}.mlp.fc1", u)
        if "gate" in more:
            hidden = silu(torch.einsum("li,oi->lo", u, more["gate"]["w"]) + more["gate"]["b"]) * hidden
        else:
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        h = h + gate_mlp * dense(f"{name}.mlp.fc2", hidden)

    shift, scale = dense("final_layer.adaLN_modulation.1", silu(c)).reshape(2, D)
    values = dense("final_layer.linear", modulate(h, shift, scale))
    out = torch.empty(values.shape[1] // patch**2, size, size, dtype=F64)
    for token, value in enumerate(values):
        row, column = divmod(token, side)
        for i in range(patch):
            for j in range(patch):
                out[:, row * patch + i, column * patch + j] = value.reshape(patch, patch, -1)[i, j]
    return out


def as_paper(params, cfg):
    """(state dict of facebookresearch/DiT, what each block has besides) of a model with any option."""
    plain = copy.deepcopy(params)
    extra = [
        {name: block["qkv"].pop(name) for name in ("q_norm", "k_norm") if name in block["qkv"]}
        | {name: block["mlp"].pop(name) for name in ("gate",) if name in block["mlp"]}
        for block in plain["blocks"]
    ]
    like = dataclasses.replace(
        cfg, qk_norm=False, positions="sincos", mlp="gelu", mlp_ratio=cfg.ffn / cfg.width, timestep_freqs="dit"
    )
    assert like.ffn == cfg.ffn
    return convert.to_dit(plain, like, SHAPE), extra


@pytest.mark.parametrize("freqs", ["dit", "diffusers"])
@each_option
def test_forward_is_the_papers(options, freqs):
    cfg = dataclasses.replace(CFG, timestep_freqs=freqs, **options)
    params = drawn(cfg, SHAPE)
    state, extra = as_paper(params, cfg)
    assert len(extra[0]) == 2 * cfg.qk_norm + (cfg.mlp == "swiglu")
    x, t, y = batch(SHAPE)
    last = 127 if freqs == "diffusers" else 128
    slow = [slow_dit(state, extra, *one, cfg.heads, cfg.patch, cfg.positions == "rotary", last) for one in zip(x, t, y)]
    error = relative(dit.forward(params, x, t, y, cfg), torch.stack(slow))
    print(f"{error:.1e}")
    assert error < 1e-12


def test_position_table_is_the_direct_formula():
    assert (nn.sincos_2d(6, 6, 24) - slow_positions(6, 24)).abs().max() < 1e-14
    # Not square: rows and columns keep their parts.
    table = nn.sincos_2d(2, 3, 8).reshape(2, 3, 8)
    assert torch.equal(table[:, :1, :4].expand(2, 3, 4)[:, 0], table[:, 0, :4]) and torch.equal(
        table[0, :, :4], table[1, :, :4]
    )
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:]) and not torch.equal(table[0, 0, 4:], table[1, 0, 4:])


@pytest.mark.parametrize("freqs, last", [("dit", 128), ("diffusers", 127)])
def test_timestep_features_are_the_direct_formula(freqs, last):
    times = [0.0, 0.37, 1.0, 250.5, 999.0]
    slow = torch.stack([slow_features(t, last=last) for t in times])
    features = nn.timestep_features(torch.tensor(times, dtype=F64), 256, freqs)
    assert (features - slow).abs().max() < 1e-12  # angles up to 1000 carry 1e-13 of rounding
    assert (nn.timestep_features(torch.tensor(times), 256, freqs) - slow).abs().max() < 2e-4
    assert nn.timestep_features(torch.tensor(times, dtype=torch.bfloat16), 256).dtype == torch.float32


def test_whole_timesteps_are_embedded_as_numbers():
    whole = torch.tensor([0, 3, 999])
    assert torch.equal(nn.timestep_features(whole, 256), nn.timestep_features(whole.float(), 256))


# --- options, one by one ---


def test_options_are_off_by_default():
    cfg = dit.Config()
    assert (cfg.qk_norm, cfg.positions, cfg.mlp, cfg.timestep_freqs, cfg.mlp_eps) == (
        False,
        "sincos",
        "gelu",
        "dit",
        1e-6,
    )
    names = {path.split(".", 2)[2] for path in tree.paths(dit.declare(cfg, SHAPE)) if path.startswith("blocks.")}
    dense = ("adaln", "qkv", "out", "mlp.fc1", "mlp.fc2")
    assert names == {f"{name}.{leaf}" for name in dense for leaf in "wb"}


def test_rotary_scores_depend_on_relative_positions_alone():
    rows, columns, K = 3, 5, 16
    q, k = torch.randn(2, K, generator=torch.Generator().manual_seed(0), dtype=F64)
    tables = nn.rotary_2d(rows, columns, K)
    turned_q, turned_k = (ops.rotate(u.expand(1, rows * columns, 1, K), *tables)[0, :, 0] for u in (q, k))
    scores = turned_q @ turned_k.T
    by_offset = {}
    for i in range(rows * columns):
        for j in range(rows * columns):
            offset = (i // columns - j // columns, i % columns - j % columns)
            by_offset.setdefault(offset, []).append(scores[i, j].item())
    assert max(max(s) - min(s) for s in by_offset.values()) < 1e-13
    assert len({round(s[0], 6) for s in by_offset.values()}) == (2 * rows - 1) * (2 * columns - 1)  # and on all of them
    assert abs(by_offset[0, 0][0] - (q @ k).item()) < 1e-13
    assert relative(turned_q.norm(dim=-1), q.norm().expand(rows * columns)) < 1e-15


def test_qk_norm_makes_scores_blind_to_the_size_of_queries():
    cfg = dataclasses.replace(CFG, qk_norm=True)
    p, h = drawn(cfg, SHAPE)["blocks"][0]["qkv"], torch.randn(2, 16, 48, dtype=F64)
    big = p | {"w": p["w"] * torch.tensor([100.0, 10.0, 1.0], dtype=F64)[:, None, None, None], "b": p["b"] * 0}
    small = p | {"b": p["b"] * 0}
    for a, b, heads in zip(ops.qkv(h, big, ()), ops.qkv(h, small, ()), ("q", "k", "v")):
        assert relative(a, b) < 1e-3, heads  # eps is not scaled along
    q, _, _ = ops.qkv(h, small, ())
    assert ((q / p["q_norm"]).square().mean(-1) - 1).abs().max() < 1e-3


def test_swiglu_keeps_the_count_of_parameters():
    cfg = dit.sized("b", 2)
    plain, swiglu = (models.num_params(dataclasses.replace(cfg, mlp=mlp), SHAPE)[1] for mlp in ("gelu", "swiglu"))
    assert abs(swiglu / plain - 1) < 1e-3
    assert dataclasses.replace(cfg, mlp="swiglu").ffn == 2048


# --- sizes ---

IMAGENET = dit.Shape(channels=4, size=32, num_classes=1000, outputs=2)
TABLE = {"s": (32.96, 32.87, 6.06), "b": (130.5, 130.3, 23.0), "l": (458.1, 457.8, 80.7), "xl": (675.1, 674.8, 118.6)}


def digits(number, like):
    return round(number, len(str(like).split(".")[1]))


def meta(cfg, shape):
    return tree.map(lambda p: torch.empty(p.shape, device="meta"), dit.declare(cfg, shape))


def counted_macs(cfg, shape):
    x, t = torch.empty(1, *shape.sample, device="meta"), torch.empty(1, device="meta")
    y = torch.empty(1, dtype=torch.int64, device="meta") if shape.num_classes else None
    with FlopCounterMode(display=False) as counter:
        dit.forward(meta(cfg, shape), x, t, y, cfg)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("size", TABLE)
def test_published_sizes(size):
    cfg = dit.sized(size, 2)
    everything, trainable, gmacs = TABLE[size]
    total, trained = models.num_params(cfg, IMAGENET)
    assert digits(total / 1e6, everything) == everything and digits(trained / 1e6, trainable) == trainable
    assert digits(dit.macs(cfg, IMAGENET) / 1e9, gmacs) == gmacs
    assert dit.macs(cfg, IMAGENET) == counted_macs(cfg, IMAGENET)


@pytest.mark.parametrize("shape", [SHAPE, dit.Shape(1, 8), dit.Shape(3, 12, 5)], ids=["labels", "plain", "side 12"])
@each_option
def test_macs_and_parameters_are_those_counted(options, shape):
    cfg = dataclasses.replace(CFG, **options)
    assert dit.macs(cfg, shape) == counted_macs(cfg, shape)
    assert models.num_params(cfg, shape)[1] == sum(leaf.numel() for leaf in tree.leaves(drawn(cfg, shape)))


# --- what must hold ---


@each_option
def test_at_initialisation_output_is_zero_and_blocks_are_the_identity(options):
    cfg = dataclasses.replace(CFG, **options)
    params = param.init(dit.declare(cfg, SHAPE), random.key(0))
    x, t, y = batch(SHAPE, dtype=torch.float32)
    assert torch.equal(dit.forward(params, x, t, y, cfg), torch.zeros(3, 6, 8, 8))
    tokens, c = torch.randn(3, 16, 48), torch.randn(3, 48)
    rotary = tuple(table.float() for table in nn.rotary_2d(4, 4, 16)) if cfg.positions == "rotary" else ()
    for p in params["blocks"]:
        assert torch.equal(dit.make_block(cfg, Ops())(p, tokens, c, rotary), tokens)


def test_initialisation_is_that_of_the_official_code():
    params = param.init(dit.declare(dit.sized("s", 2), IMAGENET), random.key(0))
    for path, leaf in tree.items(params):
        if path.endswith(".b") or "adaln" in path or path.startswith("final"):
            assert not leaf.any(), path
        elif path.startswith(("time", "label")):
            assert abs(leaf.std() / 0.02 - 1) < 0.02, path
        else:
            D = 384
            fan_in, fan_out = {
                "patch": (16, D),
                "qkv": (D, 3 * D),
                "out": (D, D),
                "fc1": (D, 4 * D),
                "fc2": (4 * D, D),
            }[path.split(".")[-2]]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert leaf.abs().max() <= bound and abs(leaf.std() / (bound / math.sqrt(3)) - 1) < 0.02, path


@each_option
def test_a_sample_does_not_depend_on_another(options):
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y) = drawn(cfg, SHAPE), batch(SHAPE)
    x, t = x.requires_grad_(), t.requires_grad_()
    out = dit.forward(params, x, t, y, cfg)
    for i in range(len(x)):
        for g in torch.autograd.grad(out[i].sum(), (x, t), retain_graph=True):
            assert [bool(g[j].any()) for j in range(len(x))] == [i == j for j in range(len(x))]
    other = torch.where(torch.arange(3) == 1, (y + 1) % 6, y)
    changed = (dit.forward(params, x, t, other, cfg) - out).flatten(1).abs().amax(1)
    assert changed[1] > 1e-3 and changed[[0, 2]].max() == 0


def test_null_label_is_the_row_after_the_classes():
    params, (x, t, _) = drawn(CFG, SHAPE), batch(SHAPE)
    params["label"]["w"][:5] = float("nan")
    assert dit.forward(params, x, t, torch.full((3,), SHAPE.num_classes), CFG).isfinite().all()
    assert dit.num_labels(dataclasses.replace(CFG, label_dropout=0.0), SHAPE) == 5


def test_unconditional_needs_no_label():
    shape = dit.Shape(3, 8)
    params, (x, t, _) = drawn(CFG, shape), batch(shape)
    assert dit.forward(params, x, t, None, CFG).shape == (3, 3, 8, 8)


def test_pictures_need_not_be_square():
    """A transposed picture gives the transposed output once what turns with rows and with columns is exchanged."""
    cfg = dataclasses.replace(CFG, patch=1, positions="rotary")
    params = drawn(cfg, SHAPE)
    rows, columns = torch.arange(cfg.head_size).reshape(2, 2, -1).unbind(1)  # of a head: what turns with which
    order = torch.stack([columns, rows], 1).flatten()
    swapped = copy.deepcopy(params)
    for block in swapped["blocks"]:
        for leaf in block["qkv"].values():
            leaf[:2] = leaf[:2, :, order]
    x = torch.randn(2, 3, 4, 6, dtype=F64)
    t, y = torch.tensor([3.0, 500.0], dtype=F64), torch.tensor([0, 5])
    a = dit.forward(params, x, t, y, cfg)
    b = dit.forward(swapped, x.transpose(2, 3).contiguous(), t, y, cfg)
    assert relative(b.transpose(2, 3), a) < 1e-12


@each_option
def test_bf16_is_close_to_fp32(options):
    """bf16 keeps 8 bits: 0.4 % a rounding, of which some twenty follow one another in two blocks."""
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y) = drawn(cfg, SHAPE, torch.float32), batch(SHAPE, dtype=torch.float32)
    expected = dit.forward(params, x, t, y, cfg)
    half = dit.forward(tree.map(lambda leaf: leaf.bfloat16(), params), x, t, y, cfg)
    assert half.dtype == torch.bfloat16
    print(f"{relative(half.float(), expected):.1e}")
    assert relative(half.float(), expected) < 2e-2


# --- transforms ---


def directional(fn, arguments, tangents, step):
    """Central difference of fourth order."""

    def at(s):
        return fn(*(tree.map(lambda a, d: a + s * step * d, a, d) for a, d in zip(arguments, tangents)))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@each_option
def test_jvp_is_the_finite_difference(options):
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y) = drawn(cfg, SHAPE), batch(SHAPE)
    generator = torch.Generator().manual_seed(3)

    def direction(leaf):
        return torch.randn(leaf.shape, generator=generator, dtype=F64)

    zero = tree.map(torch.zeros_like, params)
    towards = {
        "params": (tree.map(lambda leaf: 0.1 * direction(leaf), params), 0 * x, 0 * t),
        "x": (zero, direction(x), 0 * t),
        "t": (zero, 0 * x, direction(t)),
    }
    towards["all"] = tuple(tree.map(lambda *d: sum(d), *ds) for ds in zip(*towards.values()))

    def fn(params, x, t):
        return dit.forward(params, x, t, y, cfg)

    for name, tangents in towards.items():
        out, tangent = torch.func.jvp(fn, (params, x, t), tangents)
        assert torch.equal(out, fn(params, x, t))
        # Truncation 1e-12, rounding 1e-16 / step.
        assert relative(tangent, directional(fn, (params, x, t), tangents, 1e-3)) < 1e-8, name


@each_option
def test_vmap_is_the_loop(options):
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y) = drawn(cfg, SHAPE), batch(SHAPE)
    several = tree.map(lambda *leaves: torch.stack(leaves), *(drawn(cfg, SHAPE, seed=seed) for seed in range(3)))

    def one(params, x, t, y):
        return dit.forward(params, x[None], t[None], y[None], cfg)[0]

    mapped = torch.func.vmap(one, (None, 0, 0, 0))(params, x, t, y)
    assert relative(mapped, dit.forward(params, x, t, y, cfg)) < 1e-13
    ensemble = torch.func.vmap(one)(several, x, t, y)
    for i in range(3):
        assert relative(ensemble[i], one(tree.map(lambda leaf, i=i: leaf[i], several), x[i], t[i], y[i])) < 1e-13


@each_option
def test_vmap_of_grad_is_the_loop_of_grads(options):
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y) = drawn(cfg, SHAPE), batch(SHAPE)

    def loss(params, x, t, y):
        return dit.forward(params, x[None], t[None], y[None], cfg).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(params, x, t, y)
    leaves = tree.map(lambda leaf: leaf.requires_grad_(), params)
    for i in range(3):
        expected = torch.autograd.grad(loss(leaves, x[i], t[i], y[i]), tree.leaves(leaves))
        for (path, g), e in zip(tree.items(mapped), expected):
            if path.endswith("qkv.b") and not cfg.qk_norm:
                # The true gradient of a key's bias is 0 without rotation and QK-norm, what comes out is rounding.
                assert (g[i] - e).norm() < 1e-12 * e.norm() + 1e-15, path
            else:
                assert (g[i] - e).norm() <= 1e-12 * e.norm(), path


def under_jvp(fn, x):
    torch.func.jvp(fn, (x,), (x,))


def under_vmap_of_grad(fn, x):
    torch.func.vmap(torch.func.grad(lambda one: fn(one[None].expand(3, -1, -1, -1)).sum()))(x)


def under_inference_mode(fn, x):
    with torch.inference_mode():
        fn(x)


def under_fake_tensors(fn, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        fn(x)


def under_meta_default(fn, x):
    with torch.device("meta"):
        fn(x)


FIRST = [under_jvp, under_vmap_of_grad, under_inference_mode, under_fake_tensors, under_meta_default]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_the_first_call_does_not_spoil_the_cached_tables(positions, first):
    """A tensor made under a transform or a mode bears its mark; the tables outlive both."""
    cfg = dataclasses.replace(CFG, positions=positions)
    params, (x, t, y) = drawn(cfg, SHAPE), batch(SHAPE)
    expected = dit.forward(params, x, t, y, cfg)
    dit._tables.once.cache_clear()
    first(lambda x: dit.forward(params, x, t, y, cfg), x)
    assert dit._tables.once.cache_info().currsize == 1
    table, rotary = dit._tables(cfg, (8, 8), x.device, x.dtype)
    assert dit._tables.once.cache_info().hits == 1
    for made in (*rotary, *([] if table is None else [table])):
        assert type(made) is torch.Tensor and made.device == x.device and not made.is_inference()
        assert made.data_ptr()  # raises for a wrapped tensor
    leaves = tree.map(lambda leaf: leaf.requires_grad_(), params)
    out = dit.forward(leaves, x, t, y, cfg)
    out.sum().backward()
    assert torch.equal(out, expected)


# --- refusals ---

REFUSED = [
    ({"width": 0}, {}, "model.width is 0: use 1"),
    ({"depth": 0}, {}, "model.depth is 0"),
    ({"heads": -1}, {}, "model.heads is -1"),
    ({"patch": 0}, {}, "model.patch is 0"),
    ({"heads": 5}, {}, r"heads 5 does not divide model.width 48: use one of \[1, 2, 3, 4, 6"),
    ({"width": 50, "heads": 5}, {}, "width 50 is no multiple of 4.*use 52"),
    ({"positions": "rotary", "heads": 8}, {}, "width 48 over 8 heads is 6"),
    ({"patch": 3}, {}, r"patch 3 does not divide the picture size 8: use one of \[1, 2, 4, 8\]"),
    ({"label_dropout": 1.0}, {}, "label_dropout is 1.0"),
    ({"label_dropout": -0.1}, {}, "label_dropout is -0.1"),
    ({"mlp_ratio": 0.0}, {}, "mlp_ratio is 0.0"),
    ({"mlp_ratio": 0.01}, {}, "mlp_ratio is 0.01"),
    ({"mlp_ratio": float("nan")}, {}, "mlp_ratio is nan"),
    ({"mlp_eps": 0.0}, {}, "mlp_eps is 0.0"),
]


@pytest.mark.parametrize("changes, shape, match", REFUSED)
def test_check_refuses(changes, shape, match):
    dit.check(CFG, SHAPE)
    with pytest.raises(ValueError, match=match) as caught:
        dit.check(dataclasses.replace(CFG, **changes), dataclasses.replace(SHAPE, **shape))
    assert "\n" not in str(caught.value)


@each_option
def test_check_passes_what_can_be_built(options):
    dit.check(dataclasses.replace(CFG, **options), SHAPE)
    for size in dit.SIZES:
        for patch in (2, 4, 8):
            dit.check(dit.sized(size, patch, **options), IMAGENET)


# --- sums left to the next modulation ---


@each_option
def test_sums_left_to_the_next_modulation_change_nothing(options):
    """Whatever is not the plain ``layers`` gets blocks that sum themselves, and the same bits."""
    cfg = dataclasses.replace(CFG, **options)
    params, (x, t, y), calls = drawn(cfg, SHAPE), batch(SHAPE), collections.Counter()

    def watched(name):
        def site(*args):
            calls[name] += 1
            return getattr(ops, name)(*args)

        return site

    def run(**sites):
        leaves = [p.detach().requires_grad_() for p in tree.leaves(params)]
        out = dit.forward(tree.unflatten(params, leaves), x, t, y, cfg, Ops(**sites))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    found = run(**{name: watched(name) for name in ("gated", "modulate", "gated_modulate")})
    assert calls == {"modulate": 1, "gated_modulate": 2 * cfg.depth}
    assert all(map(torch.equal, found, run(layers=lambda *args: ops.layers(*args))))
