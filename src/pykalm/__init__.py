"""Align a causal language model with a knowledge graph (KaLM, arXiv 2412.04948)."""
