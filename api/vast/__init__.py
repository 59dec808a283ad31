"""Vast.ai's serverless worker protocol: the only package that knows Vast's words.

It stands in front of the application and beside it, and the application knows nothing of it.
"""
