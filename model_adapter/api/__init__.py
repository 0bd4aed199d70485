"""Databases with their parts: made for a model and an embedder, opened with those they record.

A file for each call, so that one which needs no model does not wait for torch.
"""
