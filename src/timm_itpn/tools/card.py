"""Model card of a converted checkpoint: what it is, where it comes from, and whose figures it has."""
from typing import Any

from ..models._timm import generate_readme
from ..models.itpn import PAPERS
from ..weights.sources import Source, drive_url, hash_check, source_of

__all__ = ['model_card']

CITATION = """@misc{{{family},
  title={{{title}}},
  note={{arXiv:{arxiv}}}
}}"""
USAGE = """```python
import timm  # with timm-itpn installed

model = timm.create_model('hf-hub:OWNER/NAME', pretrained=True{arguments})
# with a feature pyramid, if the weights have one: pyramid=True, features_only=True
```"""


def model_card(report: dict[str, Any], pretraining: bool) -> str:
    """Text of the README of a Hub repository.

    Args:
        report: What was read and written.
        pretraining: True for weights without classifier, as pre-training leaves them.
    """
    name = report['model']
    family = next(family for family in PAPERS if name.startswith(family))
    arxiv, title = PAPERS[family]
    published = source_of(name)
    details: dict[str, Any] = {
        'Model': f'`{name}` of the timm plugin timm-itpn',
        'Parts': [f'{part}: {number:,} values' for part, number in report['parts'].items()],
        'Classes': report['num_classes'] or 'none: norm and classifier start new',
        'Data type': ', '.join(report['dtypes']),
        'Provenance': provenance(report, published),
    }
    if published:
        details['Contents'] = published.contents
        details['License of the weights, as their authors state it'] = published.license
        figures = [f'{what}: {value}' for what, value in published.figures.items()]
        details['Reported by the authors, not measured for this copy'] = figures
    card = dict(
        tags=['timm', family.replace('_', '-')],
        license=published.license if published else 'unknown',
        details=details,
        usage=USAGE.format(arguments=', num_classes=10' if pretraining else ''),
        citation=CITATION.format(family=family, title=title, arxiv=arxiv),
    )
    return generate_readme(card, name, task_name=f'image-{"feature-extraction" if pretraining else "classification"}')


def provenance(report: dict[str, Any], published: Source | None) -> list[str]:
    source, origin = report['source'], report['source']['origin']
    layout = f'{source["layout"]} layout' + (f', under `{source["wrapper"]}`' if source['wrapper'] else '')
    lines = [f'Converted from `{source["file"]}` ({source["bytes"]:,} bytes, {layout}), SHA-256 `{source["sha256"]}`']
    if origin:
        lines.append(f'That file says that it was converted from `{origin["file"]}`, SHA-256 `{origin["sha256"]}`')
    lines.append(f'On {report["date"]}, by {report["tool"]}')
    if published is None:
        return [*lines, 'Not a published file of the authors, as far as was said at the conversion']
    taken = 'Taken by its shapes for' if report['guessed'] else 'Said at the conversion to be'
    return [
        *lines,
        f'{taken} the file that the authors publish at {drive_url(published)}',
        f'Its SHA-256 {hash_check((origin or source)["sha256"], report["model"])}',
    ]
