"""Tensors in, tensors out: the operations that decide the speed of a step."""
