"""Experiments: what acceleration costs in accuracy, and what pre-training gives; with their rows."""

STUDIES = {  # name -> extras and packages that it needs
    'acceleration': ('demo', 'sklearn'),
    'photographs': ('photographs', 'sklearn', 'elpv_dataset'),
    'pretraining': ('demo', 'sklearn'),
    'detection': ('demo,detection', 'sklearn', 'pycocotools', 'filelock'),
}
