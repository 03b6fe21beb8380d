"""odit trains and samples Diffusion Transformers; the meaning of a run is (config, seed, data)."""

import os

# OpenMP threads that spin for each other while another process wants their core slow a step down up to tenfold: on two
# cores 0.23 s alone either way, beside one busy process 0.6 to 2.8 s spinning and 0.40 s waiting. Has no effect once
# torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
