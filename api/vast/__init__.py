"""Vast.ai's serverless worker protocol. Only this package and its settings use Vast's vocabulary.

It wraps the application and runs beside it; the application does not depend on it.
"""
