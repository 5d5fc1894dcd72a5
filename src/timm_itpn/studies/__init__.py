"""Experiments: what acceleration costs in accuracy, and what pre-training gives; with their rows."""

NAMES = ('acceleration', 'photographs', 'pretraining', 'detection')
