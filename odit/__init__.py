"""odit trains and samples Diffusion Transformers; the meaning of a run is (config, seed, data)."""

__version__ = "0.1.0"
