"""Tokens in, tokens out: scheduling, the paged KV cache, the model, sampling."""
