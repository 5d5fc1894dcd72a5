"""Experiments that decided how acceleration works and that tell what pre-training is worth, with their rows."""
