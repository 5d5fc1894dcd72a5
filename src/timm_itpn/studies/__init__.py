"""Experiments on digits: what acceleration costs in accuracy, and what pre-training gives; with their rows."""

NAMES = ('acceleration', 'pretraining', 'detection')
