"""Small data in COCO's format: scikit-learn's digits drawn onto its photographs."""
import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.mask import encode
from sklearn.datasets import load_digits, load_sample_images

CATEGORIES = [dict(id=3 + 4 * digit, name=str(digit)) for digit in range(10)]  # ids with gaps, as COCO's have


def write_coco(folder, num=2, size=(64, 96), seed=0):
    """Write `num` images of (height, width) with two digits each, and their annotations; gives the JSON file."""
    rng = np.random.default_rng(seed)
    digits, photo = load_digits(), load_sample_images().images[0]
    data = dict(images=[], annotations=[], categories=CATEGORIES)
    height, width = size
    for i in range(1, num + 1):
        top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
        image = photo[top:top + height, left:left + width] // 2
        for half in (0, width // 2):  # one in each
            which, side = rng.integers(1000), int(rng.integers(24, 41))
            ink = F.interpolate(torch.tensor(digits.images[which])[None, None], (side, side), mode='bilinear')[0, 0] > 6
            mask = np.zeros(size, dtype=np.uint8)
            y, x = rng.integers(0, height - side + 1), half + rng.integers(0, width // 2 - side + 1)
            mask[y:y + side, x:x + side] = ink
            image = np.where(mask[..., None], 255, image).astype(np.uint8)
            rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            code = encode(np.asfortranarray(mask))
            data['annotations'].append(dict(
                id=len(data['annotations']) + 1, image_id=i, category_id=CATEGORIES[digits.target[which]]['id'],
                bbox=[float(side) for side in box], segmentation=dict(size=[*size], counts=code['counts'].decode())))
        name = f'{i:04d}.png'
        Image.fromarray(image).save(folder / name)
        data['images'].append(dict(id=i, file_name=name, height=height, width=width))
    path = folder / 'instances.json'
    path.write_text(json.dumps(data))
    return path
