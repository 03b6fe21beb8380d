"""A model that is not odit's own: a transformer over bars of numbers, with four register tokens and learned positions.

It knows nothing of ranks. All that it does for them is to call the sites of ``ops`` where odit's models do.
"""

from dataclasses import dataclass

import torch

from odit import nn, param
from odit.ops import Ops, linear
from odit.param import Param


@dataclass(frozen=True)
class Config:
    length: int = 60
    width: int = 24
    depth: int = 2
    heads: int = 4
    registers: int = 4


def declare(cfg):
    L, D, H, K, F = cfg.length, cfg.width, cfg.heads, cfg.width // cfg.heads, 3 * cfg.width
    w = param.normal(0.1)
    block = {
        "adaln": {"w": Param((6 * D, D), "6D", w), "b": Param((6 * D,), "6", w)},
        "qkv": {"w": Param((3, H, K, D), "3HKD", w), "b": Param((3, H, K), "3HK", w)},
        "out": {"w": Param((D, H, K), "DHK", w), "b": Param((D,), "D", w)},
        "mlp": {
            "fc1": {"w": Param((F, D), "FD", w), "b": Param((F,), "F", w)},
            "fc2": {"w": Param((D, F), "DF", w), "b": Param((D,), "D", w)},
        },
    }
    time = {"w": Param((D, 1), "Dt", w), "b": Param((D,), "D", w)}
    ends = {"embed": Param((L, D), "LD", w), "registers": Param((cfg.registers, D), "RD", w), "time": time}
    return {**ends, "blocks": [block] * cfg.depth, "read": Param((D,), "D", w)}


def forward(params, x_BL, t_B, cfg, ops=Ops()):
    tokens = x_BL[..., None] * params["embed"] + params["embed"].flip(0)
    registers = params["registers"].expand(len(x_BL), -1, -1)
    x, _ = ops.enter(torch.cat([registers, tokens], 1))
    c_BD = linear(t_B[:, None], params["time"])
    x = ops.layers(make_block(ops), params["blocks"], x, c_BD)
    return ops.leave(x * params["read"])[:, cfg.registers :].sum(-1)


def make_block(ops):
    def block(p, x, c_BD):
        shift1, scale1, gate1, shift2, scale2, gate2 = nn.adaln(c_BD, p["adaln"], 6)
        branch = ops.out(ops.attend(*ops.qkv(ops.modulate(x, shift1, scale1), p["qkv"], ())), p["out"])
        x, h = ops.gated_modulate(x, gate1, branch, shift2, scale2)
        return ops.gated(x, gate2, ops.mlp(h, p["mlp"]))

    return block
