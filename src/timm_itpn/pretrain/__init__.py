"""Integral pre-training: backbone and feature pyramid learn together, from masked images.

Paper: https://arxiv.org/abs/2211.12735. Written from the paper and from published facts about the models. Nothing here
imports torch, so that `--help` is quick.
"""
OBJECTIVE_NAMES = ('clip', 'clip-distill', 'pixel', 'mfm')
