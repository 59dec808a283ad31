"""HTTP in, bytes out: the wire contract of Text Generation Inference over the engine.

Knows no torch and no transformers. `python -m api --help` lists every setting.
"""
