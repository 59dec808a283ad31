"""The HTTP server: the wire contract of Text Generation Inference on top of the engine.

It imports neither torch nor transformers. `python -m api --help` lists every setting.
"""
