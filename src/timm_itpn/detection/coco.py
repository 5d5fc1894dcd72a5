"""Annotation files in COCO's format, read and checked once, before anything is trained or measured with them."""
import json
import logging
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from ..checks import are_numbers, read_text, require

__all__ = ['read_coco']

_logger = logging.getLogger(__name__)

Row = dict[str, Any]

TABLES: dict[str, dict[str, type]] = {  # what is needed of each entry
    'images': dict(id=int, file_name=str, height=int, width=int),
    'categories': dict(id=int, name=str),
    'annotations': dict(id=int, image_id=int, category_id=int, bbox=list),
}


def read_coco(path: Path) -> Any:
    """Read an annotation file.

    Annotations that cannot be used, such as boxes without area, are left out, and the log says how many and why.
    `area` and `iscrowd`, which pycocotools needs, are filled in where they are missing.

    Returns:
        pycocotools' `COCO`.

    Raises:
        RuntimeError: pycocotools is not installed.
        ValueError: It is not a file in COCO's format, or names images or categories that it does not have.
    """
    require('COCO data', 'detection', 'pycocotools')
    from pycocotools.coco import COCO
    from pycocotools.mask import area

    try:
        data = json.loads(read_text(path))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as JSON: {error}.') from error
    by_id = {table: _by_id(data, table, path) for table in TABLES}
    kept, left = [], Counter[str]()
    for number, row in by_id['annotations'].items():
        for key, table in (('image_id', 'images'), ('category_id', 'categories')):
            if row[key] not in by_id[table]:
                raise ValueError(f'{path}: annotation {number} has the {key} {row[key]}, which is not in {table!r}.')
        problem = _problem(row, by_id['images'][row['image_id']])
        if problem:
            left[problem] += 1
        else:
            kept.append({**row, 'iscrowd': int(bool(row.get('iscrowd')))})
    if left:
        _logger.warning(
            f'Left out {left.total()} of {len(by_id["annotations"])} annotations of {path}: '
            f'{", ".join(f"{count} with {problem}" for problem, count in left.items())}.')
    coco = COCO()
    coco.dataset = {**data, 'annotations': kept}
    with redirect_stdout(StringIO()):  # it prints
        coco.createIndex()
    for row in kept:
        if not isinstance(row.get('area'), (int, float)):
            row['area'] = float(area(coco.annToRLE(row)))
    return coco


def _by_id(data: Any, table: str, path: Path) -> dict[int, Row]:
    """The entries of a table by their ids."""
    rows = data.get(table) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'{path} is not in COCO format: it has no list {table!r}.')
    if not rows and table != 'annotations':
        raise ValueError(f'{path} has no {table}: its list {table!r} is empty.')
    by_id: dict[int, Row] = {}
    for i, row in enumerate(rows):
        wanted = TABLES[table].items()
        wrong = [key for key, kind in wanted if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if wrong:
            raise ValueError(f'{path}: {wrong[0]!r} of entry {i} of {table!r} is missing or of a wrong type.')
        if row['id'] in by_id:
            raise ValueError(f'{path}: two entries of {table!r} have the id {row["id"]}.')
        by_id[row['id']] = row
    return by_id


def _problem(row: Row, image: Row) -> str:
    """Why an annotation cannot be used, '' if it can."""
    if len(row['bbox']) != 4 or not are_numbers(row['bbox']):
        return 'a box that is not four numbers'
    left, top, width, height = row['bbox']
    right, bottom = min(left + width, image['width']), min(top + height, image['height'])
    if width <= 0 or height <= 0:
        return 'a box of no area'
    if right <= max(left, 0) or bottom <= max(top, 0):
        return 'a box outside of the image'
    return '' if _is_segmentation(row.get('segmentation'), image) else 'no usable segmentation'


def _is_segmentation(value: Any, image: Row) -> bool:
    """Whether a value is polygons of at least three points, or a run-length code of the image's size."""
    from pycocotools.mask import area

    if isinstance(value, list):
        return bool(value) and all(
            isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 and are_numbers(each) for each in value)
    if not isinstance(value, dict) or value.get('size') != [image['height'], image['width']]:
        return False
    counts = value.get('counts')
    if isinstance(counts, list):
        return are_numbers(counts) and sum(counts) == image['height'] * image['width']
    return isinstance(counts, str) and 0 < area(value) <= image['height'] * image['width']
