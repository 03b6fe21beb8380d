"""Frozen encoders of captions, pictures and clips, as pure functions of their weights.

``text`` and ``vae`` load other libraries' models from a folder or a hub name; ``frozen`` takes the weights out of a
module and says where they live between calls. Nothing here knows of ranks: whoever splits weights over several hands in
a gather.

    encoder = text.load("t5", "google/flan-t5-base", 128, torch.bfloat16)
    stored = frozen.store(encoder.frozen.take(), "host", device)
    encoded = encoder.encode(stored.weights(), encoder.tokenize(["a red square"]))
"""
