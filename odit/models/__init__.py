"""Models: each file has a Config, ``declare(cfg)``, ``forward(params, ..., cfg, ops)`` and ``macs(cfg, ...)``."""
