"""Detection and instance segmentation: Mask R-CNN as the authors train it, COCO-format data, and average precision.

Nothing here imports torch, so that `--help` is quick.
"""
