"""Models that others have trained, measured as runs are: transformers' decoders, and a gallery.

>>> from qkjax.observatory.measure import measure_model
>>> found = measure_model(model, batches)  # a decoder of transformers, and ids [B, T + 1]
>>> found.metrics["pr/key/pre_rope/centred"]
"""
