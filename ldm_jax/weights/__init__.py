"""Weights of other projects in and out: one table a family of models, one engine that walks it."""
