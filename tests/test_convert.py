"""Foreign weights: every map there and back with the same bits; what a format cannot hold is refused in a sentence."""

import argparse
import dataclasses
import inspect
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel

from odit import convert, models, nn, tree
from odit.models import dit

CFG = dit.Config(width=24, depth=2, heads=3, patch=2)
SHAPE = dit.Shape(channels=3, size=8, num_classes=5, outputs=2)
DIFFUSERS = dataclasses.replace(CFG, timestep_freqs="diffusers", mlp_eps=1e-5)
LATTE = dataclasses.replace(CFG, arch="latte", depth=4, adaln="single")
CLIPS = dit.Shape(channels=3, size=(5, 8, 8), outputs=2, text_length=120, text_width=10)


def drawn(cfg, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator).to(dtype), models.of(cfg).declare(cfg, shape))


def assert_same(a, b):
    assert tree.paths(a) == tree.paths(b)
    for (path, x), y in zip(tree.items(a), tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y), path


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


VARIANTS = [
    (CFG, SHAPE, torch.float32),
    (CFG, SHAPE, torch.bfloat16),
    (CFG, SHAPE, torch.float64),
    (dataclasses.replace(CFG, label_dropout=0.0), SHAPE, torch.float32),
    (dataclasses.replace(CFG, mlp_ratio=2.0, patch=4), dit.Shape(4, 16, 7), torch.float32),
]


@pytest.mark.parametrize("cfg, shape, dtype", VARIANTS)
def test_dit_there_and_back(cfg, shape, dtype, tmp_path):
    params = drawn(cfg, shape, dtype)
    state = convert.to_dit(params, cfg, shape)
    back, cfg2, shape2 = convert.from_dit(state, heads=cfg.heads, label_dropout=cfg.label_dropout)
    assert (cfg2, shape2) == (cfg, shape)
    assert_same(back, params)

    convert.write_pt(tmp_path / "a.pt", state)
    read = convert.read_pt(tmp_path / "a.pt")
    assert_same_state(read, state)
    back, cfg2, shape2 = convert.from_dit(read, cfg.heads, cfg.label_dropout)
    assert (cfg2, shape2) == (cfg, shape)
    assert_same(back, params)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_dit_names_and_shapes():
    D, V = 24, 5
    block = {
        "attn.qkv": (3 * D, D),
        "attn.proj": (D, D),
        "mlp.fc1": (4 * D, D),
        "mlp.fc2": (D, 4 * D),
        "adaLN_modulation.1": (6 * D, D),
    }
    dense = {
        "x_embedder.proj": (D, 3, 2, 2),
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "final_layer.linear": (24, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    expected = {"pos_embed": (1, 16, D), "y_embedder.embedding_table.weight": (V + 1, D)}
    for name, shape in dense.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = convert.to_dit(drawn(CFG, SHAPE), CFG, SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_position_table_has_the_bits_of_the_numpy_formula():
    """facebookresearch/DiT computes the table with numpy in fp64 and rounds it once to fp32."""
    cfg, shape = dit.sized("s", 2), dit.Shape(4, 32, 10)
    meta = tree.map(lambda p: torch.empty(p.shape), dit.declare(dataclasses.replace(cfg, depth=1), shape))
    table = convert.to_dit(meta, dataclasses.replace(cfg, depth=1), shape)["pos_embed"][0].numpy()

    def one(position, dim):
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        angle = np.outer(position, omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    across, down = np.meshgrid(np.arange(16, dtype=np.float32), np.arange(16, dtype=np.float32))  # width first
    expected = np.concatenate([one(across.reshape(-1), 192), one(down.reshape(-1), 192)], axis=1).astype(np.float32)
    assert np.array_equal(table, expected)


@pytest.mark.parametrize("size", dit.SIZES)
def test_published_widths_tell_the_heads(size):
    cfg, shape = dataclasses.replace(dit.sized(size, 8), depth=1), dit.Shape(4, 16, 3, 2)
    params = tree.map(lambda p: torch.zeros(p.shape), dit.declare(cfg, shape))
    _, cfg2, shape2 = convert.from_dit(convert.to_dit(params, cfg, shape))
    assert (cfg2, shape2) == (cfg, shape)


def test_mlp_ratio_survives_rounding():
    for width in range(4, 400, 4):
        for hidden in range(1, 5 * width, 7):
            assert int(width * convert.parts.ratio(width, hidden)) == hidden


def test_training_checkpoint_chooses_ema_or_model(tmp_path):
    ema, model = drawn(CFG, SHAPE), tree.map(lambda x: x + 1, drawn(CFG, SHAPE))
    states = {"model": convert.to_dit(model, CFG, SHAPE), "ema": convert.to_dit(ema, CFG, SHAPE)}
    torch.save(states | {"opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pt")
    for which in ("ema", "model"):
        assert_same_state(convert.read_pt(tmp_path / "a.pt", which), states[which])
    assert_same_state(convert.read_pt(tmp_path / "a.pt"), states["ema"])


def test_written_file_holds_no_more_than_its_tensors(tmp_path):
    convert.write_pt(tmp_path / "a.pt", {"a": torch.zeros(1 << 20)[:4]})
    assert os.path.getsize(tmp_path / "a.pt") < 10_000


def test_write_failing_half_way_leaves_the_old_file(tmp_path):
    convert.write_pt(tmp_path / "a.pt", {"a": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        torch_save, torch.save = torch.save, lambda state, to: torch_save({"a": lambda: 0}, to)
        try:
            convert.write_pt(tmp_path / "a.pt", {"a": torch.zeros(3)})
        finally:
            torch.save = torch_save
    assert os.listdir(tmp_path) == ["a.pt"] and convert.read_pt(tmp_path / "a.pt")["a"].sum() == 3


# --- diffusers ---


def diffusers_model(**changes):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    }
    model = DiTTransformer2DModel(**settings | changes).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 2])
def test_diffusers_there_and_back(outputs, dtype, tmp_path):
    shape = dataclasses.replace(SHAPE, outputs=outputs)
    params = drawn(DIFFUSERS, shape, dtype)
    state, config = convert.to_diffusers(params, DIFFUSERS, shape)
    back, cfg, shape2 = convert.from_diffusers(state, config)
    assert (cfg, shape2) == (DIFFUSERS, shape)
    assert_same(back, params)

    convert.save_diffusers(tmp_path / "m", params, DIFFUSERS, shape)
    back, cfg, shape2 = convert.load_diffusers(tmp_path / "m")
    assert (cfg, shape2) == (DIFFUSERS, shape)
    assert_same(back, params)
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_diffusers_names_and_bits_are_those_of_the_class():
    model = diffusers_model()
    state = model.state_dict()
    params, cfg, shape = convert.from_diffusers(state, dict(model.config))
    assert (cfg, shape) == (DIFFUSERS, SHAPE)
    back, config = convert.to_diffusers(params, cfg, shape)
    assert_same_state(back, state)
    assert {key: model.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }


def outputs_agree(model, params, cfg, shape):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    with torch.no_grad():
        theirs, ours = model(x, timestep=t, class_labels=y).sample, dit.forward(params, x, t, y, cfg)
    # fp32 rounding of an angle of up to 1000 is 3e-5, the rest 1e-6.
    assert ((theirs - ours).norm() / theirs.norm()) < 1e-4


def test_from_pretrained_opens_what_we_save_and_we_open_what_it_saves(tmp_path):
    params = tree.map(lambda x: 0.2 * x, drawn(DIFFUSERS, SHAPE))
    convert.save_diffusers(tmp_path / "ours", params, DIFFUSERS, SHAPE)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    outputs_agree(model, params, DIFFUSERS, SHAPE)

    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    back, cfg, shape = convert.load_diffusers(tmp_path / "pipeline")
    assert (cfg, shape) == (DIFFUSERS, SHAPE)
    assert_same(back, params)

    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert_same(convert.load_diffusers(tmp_path / "pickled")[0], params)


def test_tensors_of_many_names_are_read(tmp_path):
    cfg, shape = dataclasses.replace(DIFFUSERS, depth=8, width=12), dataclasses.replace(SHAPE, num_classes=1000)
    params = drawn(cfg, shape)
    state, config = convert.to_diffusers(params, cfg, shape)
    convert.write_pt(tmp_path / "a.pt", state)
    assert os.path.getsize(tmp_path / "a.pt") < sum(tensor.nbytes for tensor in state.values())
    assert_same(convert.from_diffusers(convert.read_pt(tmp_path / "a.pt"), config)[0], params)


def test_published_config_of_the_older_class_is_read():
    """The keys of facebook/DiT-XL-2-256's config.json, which names Transformer2DModel."""
    model = diffusers_model()
    config = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 8,
        "cross_attention_dim": None,
        "dropout": 0.0,
        "in_channels": 3,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 3,
        "num_embeds_ada_norm": 5,
        "num_layers": 2,
        "out_channels": 6,
        "patch_size": 2,
        "sample_size": 8,
    }
    params, cfg, shape = convert.from_diffusers(model.state_dict(), config)
    outputs_agree(model, params, cfg, shape)
    del config["activation_fn"]
    with pytest.raises(ValueError, match="no activation_fn"):
        convert.from_diffusers(model.state_dict(), config)


def test_other_timesteps_are_allowed_when_asked_for():
    params = drawn(CFG, SHAPE)
    state, config = convert.to_diffusers(params, CFG, SHAPE, allow_other_timesteps=True)
    back, cfg, _ = convert.from_diffusers(state, config)
    assert cfg.timestep_freqs == "diffusers"
    assert_same(back, params)
    other = dataclasses.replace(CFG, timestep_freqs="diffusers")
    assert_same_state(convert.to_dit(params, other, SHAPE, True), convert.to_dit(params, CFG, SHAPE))


# --- diffusers' Latte ---


def latte_model(**changes):
    """Of published settings where widths play no part (Latte-1's config.json)."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 10,
        "video_length": 5,
    }
    return LatteTransformer3DModel(**settings | changes).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 2])
def test_latte_there_and_back(outputs, dtype, tmp_path):
    shape = dataclasses.replace(CLIPS, outputs=outputs, text_length=7)
    params = drawn(LATTE, shape, dtype)
    state, config = convert.to_diffusers_latte(params, LATTE, shape)
    back, cfg, shape2 = convert.from_diffusers_latte(state, config, text_length=7)
    assert (cfg, shape2) == (LATTE, shape)
    assert_same(back, params)

    convert.save_diffusers(tmp_path / "m", params, LATTE, shape)
    back, cfg, shape2 = convert.load_diffusers(tmp_path / "m", text_length=7)
    assert (cfg, shape2) == (LATTE, shape)
    assert_same(back, params)
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_latte_names_and_bits_are_those_of_the_class():
    model = latte_model(num_embeds_ada_norm=None)
    state = model.state_dict()
    params, cfg, shape = convert.from_diffusers_latte(state, dict(model.config))
    assert (cfg, shape) == (LATTE, CLIPS)
    back, config = convert.to_diffusers_latte(params, cfg, shape)
    assert_same_state(back, state)
    assert {key: model.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }


def test_latte_reads_the_tables_of_files_that_have_them():
    model = latte_model()
    tables = {"pos_embed.pos_embed": model.pos_embed.pos_embed, "temp_pos_embed": model.temp_pos_embed}
    state = model.state_dict() | tables
    params, _, _ = convert.from_diffusers_latte(state, dict(model.config))
    assert_same(params, convert.from_diffusers_latte(model.state_dict(), dict(model.config))[0])
    for name in tables:
        with pytest.raises(ValueError, match=f"{name} differs by"):
            convert.from_diffusers_latte(state | {name: state[name].flip(1)}, dict(model.config))


def latte_outputs_agree(model, params, cfg, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *shape.sample, generator=generator)
    text = torch.randn(2, 6, 10, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        theirs = model(x, t, text, mask.repeat_interleave(shape.size[0], 0)).sample
        ours = models.of(cfg).forward(params, x, t, {"text": text, "mask": mask}, cfg)
    # fp32 rounding of an angle of up to 1000 is 3e-5, the rest 1e-6.
    assert ((theirs - ours).norm() / theirs.norm()) < 1e-4


def test_latte_as_diffusers_initialises_it_computes_the_same():
    model = latte_model()
    latte_outputs_agree(model, *convert.from_diffusers_latte(model.state_dict(), dict(model.config)))


def test_from_pretrained_opens_our_latte_and_we_open_its(tmp_path):
    params = tree.map(lambda x: 0.2 * x, drawn(LATTE, CLIPS))
    convert.save_diffusers(tmp_path / "ours", params, LATTE, CLIPS)
    model = LatteTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    latte_outputs_agree(model, params, LATTE, CLIPS)

    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    back, cfg, shape = convert.load_diffusers(tmp_path / "pipeline")
    assert (cfg, shape) == (LATTE, CLIPS)
    assert_same(back, params)


# --- refusals ---

TO_EITHER = [
    ({"qk_norm": True}, {}, "model.qk_norm is True"),
    ({"positions": "rotary", "heads": 6}, {}, "model.positions is rotary"),
    ({"mlp": "swiglu"}, {}, "model.mlp is swiglu"),
    ({"arch": "latte", "depth": 4}, {"size": (4, 8, 8)}, "samples are 4x8x8 .* square pictures"),
    ({"adaln": "single"}, {}, "model.adaln is single .* only zero"),
    ({}, {"num_classes": 0}, "unconditional"),
    ({}, {"num_classes": 0, "text_length": 7}, "captions of 7 tokens .* only labels"),
]
TO_LATTE = [
    ({"arch": "dit"}, {}, "model.arch is dit .* only latte"),
    ({"adaln": "zero"}, {}, "model.adaln is zero .* only single"),
    ({"text": "pooled"}, {}, "model.text is pooled .* only cross"),
    ({"qk_norm": True}, {}, "model.qk_norm is True .* only False"),
    ({"mlp": "swiglu"}, {}, "model.mlp is swiglu .* only gelu"),
    ({"frame_patch": 5}, {}, "model.frame_patch is 5 .* only 1"),
    ({"mlp_eps": 1e-5}, {}, "model.mlp_eps is 1e-05 .* only 1e-06"),
    ({"mlp_ratio": 2.0}, {}, "ffn of 4 x width and model.mlp_ratio is 2.0"),
    ({"timestep_freqs": "diffusers"}, {}, "model.timestep_freqs is diffusers .* those of dit"),
    ({}, {"size": (5, 8, 6)}, "clips are 5x8x6 and .* square frames"),
    ({}, {"size": (5, 128, 128)}, "a side of 128, where .* divides positions by 2"),
    ({}, {"text_width": 0}, "no captions of a frozen encoder"),
    ({}, {"text_length": 0, "text_width": 0}, "no captions of a frozen encoder"),
    ({}, {"num_classes": 3}, "has 3 classes"),
]
TO_DIT = [
    ({"timestep_freqs": "diffusers"}, {}, "model.timestep_freqs is diffusers .* allow_other_timesteps=True"),
    ({"mlp_eps": 1e-5}, {}, "epsilon 1e-06 .* 1e-05"),
]
TO_DIFFUSERS = [
    ({"timestep_freqs": "dit"}, {}, "model.timestep_freqs is dit .* allow_other_timesteps=True"),
    ({"label_dropout": 0.0}, {}, "no null label|label_dropout 0"),
    ({"mlp_ratio": 2.0}, {}, "mlp_ratio is 2.0"),
]


@pytest.mark.parametrize("base, export, changes, shape, match", [
    *((CFG, convert.to_dit, *row) for row in TO_EITHER + TO_DIT),
    *((DIFFUSERS, convert.to_diffusers, *row) for row in TO_EITHER + TO_DIFFUSERS),
    *((LATTE, convert.to_diffusers_latte, *row) for row in TO_LATTE),
])  # fmt: skip
def test_export_refuses(base, export, changes, shape, match):
    cfg = dataclasses.replace(base, **changes)
    shape = dataclasses.replace(CLIPS if base is LATTE else SHAPE, **shape)
    with pytest.raises(ValueError, match=match) as caught:
        export(drawn(cfg, shape), cfg, shape)
    assert "\n" not in str(caught.value)


def without(name):
    return lambda state: state.pop(name)


def replaced(name, fn):
    return lambda state: state.update({name: fn(state[name])})


def trained(table):
    table = table.clone()
    table[0, 3, 5] += 1e-5
    return table


FROM_DIT = [
    (without("x_embedder.proj.weight"), {}, "x_embedder.proj.weight is missing"),
    (without("y_embedder.embedding_table.weight"), {}, "y_embedder.embedding_table.weight is missing"),
    (without("blocks.1.attn.proj.bias"), {}, "blocks.1.attn.proj.bias is missing"),
    (without("pos_embed"), {}, "pos_embed is missing"),
    (replaced("blocks.1.attn.qkv.weight", lambda w: w[:-1]), {}, r"\(71, 24\) and should have \(72, 24\)"),
    (replaced("blocks.0.mlp.fc1.bias", lambda b: b.long()), {}, "int64 of shape .* floating-point"),
    (replaced("pos_embed", trained), {}, "differs by 1e-05"),
    (replaced("pos_embed", torch.zeros_like), {}, "differs by 1 "),
    (replaced("pos_embed", lambda x: x * float("nan")), {}, "differs by nan"),
    (replaced("pos_embed", lambda x: x[:, :15]), {}, "15 tokens"),
    (replaced("final_layer.linear.weight", lambda w: w[:-1]), {}, "23 values where a DiT has 12, or 24"),
    (replaced("y_embedder.embedding_table.weight", lambda w: w[:1]), {}, "no classes"),
    (
        lambda state: state.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}),
        {},
        "q_norm.weight .one of 1 such. is no tensor of a DiT",
    ),
    (lambda state: state.update({"blocks.900000000.x": torch.ones(8)}), {}, "blocks.2.attn.qkv.weight is missing"),
    (lambda state: None, {"heads": None}, "width 24 is none of the published .* pass heads="),
    (lambda state: None, {"heads": 5}, "heads 5 does not divide model.width 24"),
]


@pytest.mark.parametrize("spoil, arguments, match", FROM_DIT)
def test_from_dit_refuses(spoil, arguments, match):
    state = convert.to_dit(drawn(CFG, SHAPE), CFG, SHAPE)
    convert.from_dit(state, heads=3)
    spoil(state)
    with pytest.raises(ValueError, match=match) as caught:
        convert.from_dit(state, **{"heads": 3} | arguments)
    assert "\n" not in str(caught.value)


EMBEDDER = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
FROM_DIFFUSERS = [
    (without("proj_out_2.bias"), {}, "proj_out_2.bias is missing"),
    (replaced(EMBEDDER, lambda b: b + 1e-6), {}, "blocks.1.norm1.*linear_2.bias differs from .*blocks.0"),
    (replaced(EMBEDDER, lambda b: b.double()), {}, "linear_2.bias differs from"),
    (lambda state: state.update({"pos_embed.pos_embed": torch.zeros(1, 16, 24)}), {}, "differs by 1 "),
    (lambda state: state.update({"caption.weight": torch.zeros(1)}), {}, "caption.weight"),
    (lambda state: None, {"_class_name": "PixArtTransformer2DModel"}, "of a PixArtTransformer2DModel"),
    (lambda state: None, {"activation_fn": "geglu"}, "activation_fn 'geglu' .* 'gelu-approximate'"),
    (lambda state: None, {"attention_bias": False}, "attention_bias False"),
    (lambda state: None, {"norm_elementwise_affine": True}, "norm_elementwise_affine True"),
    (lambda state: None, {"norm_type": "ada_norm"}, "norm_type 'ada_norm'"),
    (lambda state: None, {"dropout": 0.1}, "dropout 0.1"),
    (lambda state: None, {"num_layers": 3}, "num_layers 3 and the weights have 2"),
    (lambda state: None, {"num_attention_heads": 0}, "num_attention_heads 0"),
    (lambda state: None, {"sample_size": "8"}, "sample_size '8'"),
    (lambda state: None, {"sample_size": 9}, "does not divide the picture size 9"),
    (lambda state: None, {"norm_eps": "1e-5"}, "norm_eps '1e-5'"),
    (lambda state: None, {"out_channels": 5}, "5 values where a DiT has 3, or 6"),
    (lambda state: None, {"num_embeds_ada_norm": 6}, r"\(6, 24\) and should have \(7, 24\)"),
]


@pytest.mark.parametrize("spoil, changes, match", FROM_DIFFUSERS)
def test_from_diffusers_refuses(spoil, changes, match):
    state, config = convert.to_diffusers(drawn(DIFFUSERS, SHAPE), DIFFUSERS, SHAPE)
    convert.from_diffusers(state, config)
    spoil(state)
    with pytest.raises(ValueError, match=match) as caught:
        convert.from_diffusers(state, config | changes)
    assert "\n" not in str(caught.value)


FROM_LATTE = [
    (without("proj_out.bias"), {}, "proj_out.bias is missing"),
    (without("transformer_blocks.1.attn2.to_k.bias"), {}, "1.attn2.to_k.bias is missing"),
    (without("temporal_transformer_blocks.0.scale_shift_table"), {}, "temporal.*0.scale_shift_table is missing"),
    (
        lambda s: s.update({"temporal_transformer_blocks.0.attn2.x": torch.ones(1)}),
        {},
        "attn2.x .* no tensor of a Latte",
    ),
    (lambda s: s.update({"temporal_transformer_blocks.2.x": torch.ones(1)}), {}, "num_layers 2 and the weights have 3"),
    (lambda s: None, {"_class_name": "LatteT2V"}, "of a LatteT2V .* of a LatteTransformer3DModel"),
    (lambda s: None, {"num_layers": 3}, "num_layers 3 and the weights have 2"),
    (lambda s: None, {"norm_type": "ada_norm_zero"}, "norm_type 'ada_norm_zero' .* 'ada_norm_single'"),
    (lambda s: None, {"activation_fn": "geglu"}, "activation_fn 'geglu' .* 'gelu-approximate'"),
    (lambda s: None, {"attention_bias": False}, "attention_bias False and a Latte has True"),
    (lambda s: None, {"norm_eps": 1e-5}, "norm_eps 1e-05 .* 1e-06"),
    (lambda s: None, {"cross_attention_dim": 10}, "cross_attention_dim 10 .* 24"),
    (lambda s: None, {"cross_attention_dim": None}, "cross_attention_dim None: it must be"),
    (lambda s: None, {"sample_size": 128}, "sample_size 128, where diffusers divides positions by 2"),
    (lambda s: None, {"video_length": 1}, "1 frames in patches of 1 leave one"),
    (lambda s: None, {"caption_channels": 11}, r"\(24, 10\) and should have \(24, 11\)"),
    (lambda s: None, {"out_channels": 5}, "5 values"),
]


@pytest.mark.parametrize("spoil, changes, match", FROM_LATTE)
def test_from_diffusers_latte_refuses(spoil, changes, match):
    state, config = convert.to_diffusers_latte(drawn(LATTE, CLIPS), LATTE, CLIPS)
    convert.from_diffusers_latte(state, config)
    with pytest.raises(ValueError, match="text_length is 0"):
        convert.from_diffusers_latte(state, config, text_length=0)
    spoil(state)
    with pytest.raises(ValueError, match=match) as caught:
        convert.from_diffusers_latte(state, config | changes)
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_the_classes():
    for module, model in ((convert.diffusers, DiTTransformer2DModel), (convert.latte, LatteTransformer3DModel)):
        settings = inspect.signature(model.__init__).parameters
        for key, value in module.DEFAULTS.items():
            assert settings[key].default == value, (model.__name__, key)


class Hostile:
    """Unpickled by a careless reader, makes a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def edit(path, entry, change, compression=zipfile.ZIP_STORED):
    """Writes the zip file again with one entry changed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(data) if name.endswith(entry) else data)


def claim(path, count):
    """A file whose pickle says that its four floats are ``count``."""
    torch.save({"a": torch.zeros(4)}, path)
    edit(path, "data.pkl", lambda data: data.replace(b"K\x04", b"J" + count.to_bytes(4, "little")))


def test_the_edits_of_these_tests_are_not_what_is_refused(tmp_path):
    claim(tmp_path / "a.pt", 4)
    assert torch.equal(convert.read_pt(tmp_path / "a.pt")["a"], torch.zeros(4))


PICKLES = [
    (lambda p: torch.save({"a": Hostile(p.parent / "owned")}, p), "asks for (_io|io|builtins).open"),
    (lambda p: torch.save({"model": {}, "args": Hostile(p.parent / "owned")}, p), "asks for (_io|io|builtins).open"),
    (lambda p: torch.save({"a": torch.zeros(1).expand(100_000)}, p), "claims 400000 bytes"),
    (lambda p: claim(p, 2_000_000_000), "is broken"),
    (lambda p: claim(p, 5000), "is broken"),
    (
        lambda p: (torch.save({"a": torch.zeros(100_000)}, p), edit(p, "", lambda d: d, zipfile.ZIP_DEFLATED)),
        "claims 4.* bytes of tensors and has",
    ),
    (lambda p: torch.save({"a": torch.zeros(4)}, p, _use_new_zipfile_serialization=False), "no .pt file of torch 1.6"),
    (lambda p: p.write_bytes(b""), "no .pt file of torch 1.6"),
    (lambda p: (torch.save({"a": torch.zeros(100)}, p), p.write_bytes(p.read_bytes()[:-200])), "cut short"),
    (lambda p: (torch.save({"a": torch.zeros(4)}, p), edit(p, "data.pkl", lambda d: d[:-20])), "is broken"),
    (lambda p: torch.save(torch.zeros(4), p), "holds a Tensor and no state dict"),
    (lambda p: torch.save({}, p), "no state dict"),
    (lambda p: torch.save({"a": torch.zeros(4), "step": 3}, p), "'step' is a int"),
    (lambda p: torch.save({"model": {"a": torch.zeros(4)}}, p), "has no 'ema'"),
    (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "no plain tensor"),
]


def test_read_pt_refuses_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match="is no file"):
            convert.read_pt(path)


@pytest.mark.parametrize("write, match", PICKLES)
def test_read_pt_refuses_and_runs_nothing(write, match, tmp_path):
    path = tmp_path / "a.pt"
    write(path)
    with pytest.raises(ValueError, match=match) as caught:
        convert.read_pt(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_hostile_pickle_does_act_on_a_careless_reader(tmp_path):
    torch.save({"a": Hostile(tmp_path / "owned")}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)["a"].close()
    assert (tmp_path / "owned").exists()


def test_position_tables_are_made_where_a_file_has_them(monkeypatch):
    """A size that only config.json tells may be any: no table of it is made."""
    state, found = convert.to_diffusers(drawn(DIFFUSERS, SHAPE), DIFFUSERS, SHAPE)
    monkeypatch.setattr(nn, "sincos_2d", None)
    _, _, shape = convert.from_diffusers(state, found | {"sample_size": 1 << 16})
    assert shape.size == (1 << 16, 1 << 16)
    with pytest.raises(ValueError, match=r"pos_embed.pos_embed has shape \(1, 16, 24\) and should have \(1, 107"):
        convert.from_diffusers(
            state | {"pos_embed.pos_embed": torch.zeros(1, 16, 24)}, found | {"sample_size": 1 << 16}
        )
    for number in (0, -1, 1.0, True, (1 << 16) + 1):
        with pytest.raises(ValueError, match=r"sample_size .* a positive integer up to 65536"):
            convert.from_diffusers(state, found | {"sample_size": number})


FOLDERS = [
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "no JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "neither .*safetensors nor .*bin"),
    (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100), "no safetensors file"),
    (lambda f: os.truncate(f / "diffusion_pytorch_model.safetensors", 9000), "no safetensors file"),
]


@pytest.mark.parametrize("spoil, match", FOLDERS)
def test_load_diffusers_refuses(spoil, match, tmp_path):
    convert.save_diffusers(tmp_path, drawn(DIFFUSERS, SHAPE), DIFFUSERS, SHAPE)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    spoil(tmp_path)
    with pytest.raises(ValueError, match=match) as caught:
        convert.load_diffusers(tmp_path)
    assert "\n" not in str(caught.value)
