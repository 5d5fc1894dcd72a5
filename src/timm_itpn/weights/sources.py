"""Where the published weight files are, what is known of each, and whether a file is one of them.

None of these files has been seen by us: we know of them from their authors. `_fpn` models take the rows of the models
without pyramid: backbone and pyramid are in one file.
"""
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

from ..checks import check_regular_file
from .read import UnreadableError


class Source(NamedTuple):
    """One published file."""
    contents: str  # what it is
    drive_id: str  # on Google Drive, where the authors publish
    file_name: str = ''  # the authors' name of it, '' if it is not known
    hub_repo: str = ''  # repository of the Hugging Face Hub that has a copy, '' if none is known
    hub_path: str = ''  # the file in that repository
    bytes: int | None = None  # None if it is not known
    sha256: str | None = None  # in hex, likewise
    license: str = 'unknown'  # of the weights, as stated by their authors
    notes: str = ''  # where it is from if not from the authors' page, and what is not sure
    figures: dict[str, str] = {}  # what the authors report for it


RELO = 'xche32/RELO'  # a tracker by others that re-hosts files
TOP1_TUNED = 'ImageNet-1K top-1 after fine-tuning'
DINO = 'COCO box AP with DINO, 1x'
MASK_DINO = 'MaskDINO mIoU'
MASK_RCNN = 'COCO box/mask AP with Mask R-CNN, 1x'
UPERNET = 'ADE20K mIoU with UPerNet'
FAST_ITPN_PRETRAINED = 'Fast-iTPN, pre-trained for 1600 epochs on ImageNet-1K against CLIP: backbone, pyramid, decoder'

SOURCES: dict[str, Source] = {
    'fast_itpn_tiny.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1Ze9RkJggxxi58Dl7sqWrf2TNOSnRK4Wi',
        file_name='fast_itpn_tiny_1600e_1k.pt',
        hub_repo=RELO,
        hub_path='pretrained/itpn/fast_itpn_tiny_1600e_1k.pt',
        figures={TOP1_TUNED: '85.1 at 224 px, 86.2 at 384 px, 86.5 at 512 px'},
    ),
    'fast_itpn_small.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1Wvk5kQSh8fWQCUwzAp7eaVpmOi3D5_H4',
        file_name='fast_itpn_small_1600e_1k.pt',
        figures={TOP1_TUNED: '86.4 at 224 px, 86.95 at 384 px, 87.8 at 512 px'},
    ),
    'fast_itpn_base.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1ADXPV95XpWb1ROMCih1n3AD52fGdr8C_',
        file_name='fast_itpn_base_clipl_e1600.pt',
        hub_repo=RELO,
        hub_path='pretrained/itpn/fast_itpn_base_clipl_e1600.pt',
        bytes=180_830_695,
        sha256='626fd426dd89b2681d8b3942fa00e05fffb467af111c7bbd6a0a4b8bc0afc388',
        notes='the hash was computed by a third party from another copy',
        figures={TOP1_TUNED: '87.4 at 224 px, 88.5 at 512 px', DINO: '58.4', MASK_DINO: '57.5'},
    ),
    'fast_itpn_base.mim_in1k_ft_in21k': Source(
        contents='Fast-iTPN, pre-trained as mim_in1k, then fine-tuned on ImageNet-21K at 224 px',
        drive_id='1ddGbBm46FiUdNs9HPSepokhuOKhEnBdV',
        notes='the number of classes (21841) is assumed',
        figures={'ImageNet-1K top-1 after fine-tuning once more': '88.75 at 512 px'},
    ),
    'fast_itpn_large.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='16uybbJ23Fp7lnGNYL5I198glHGhwn_y2',
        file_name='fast_itpn_large_1600e_1k.pt',
        hub_repo=RELO,
        hub_path='pretrained/itpn/fast_itpn_large_1600e_1k.pt',
        figures={TOP1_TUNED: '89.5 at 640 px', DINO: '58.8', MASK_DINO: '58.7'},
    ),
    'itpn_base.pixel_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K to predict pixels: backbone, pyramid, decoder',
        drive_id='1HxW37BOEhIE9UNgHq0zblK0fTy2-IyzM',
        figures={TOP1_TUNED: '85.5 (1600 epochs)', MASK_RCNN: '53.0/46.5', UPERNET: '53.5'},
    ),
    'itpn_base.clip_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K against CLIP: backbone, pyramid, decoder',
        drive_id='1H51Zusrvlj8RjcWA7yuUyeqaVhmndSeN',
        figures={TOP1_TUNED: '86.2 (CLIP-B, 800 epochs)', MASK_RCNN: '53.2/46.6', UPERNET: '54.7'},
    ),
    'itpn_large.pixel_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K to predict pixels: backbone, pyramid, decoder',
        drive_id='1TYCaepVflm0xMrQefG5Sj4ityXYbJLFt',
        figures={TOP1_TUNED: '86.7', MASK_RCNN: '55.6/48.6', UPERNET: '56.1'},
    ),
    'itpn_large.clip_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K against CLIP: backbone, pyramid, decoder',
        drive_id='1gyyjcdMvAQsz2xC7ei-rEd7G4po2spy4',
        notes='whether its CLIP was L/14 or L/16 is not known',
        figures={TOP1_TUNED: '87.8 (CLIP-L/16), 88.0 (CLIP-L/14)', MASK_RCNN: '55.2/48.2', UPERNET: '57.7'},
    ),
    'hivit_base.mae_in1k_ft_in1k': Source(
        contents='HiViT, pre-trained as mae_in1k, then fine-tuned on ImageNet-1K: a classifier of 1000 classes',
        drive_id='1TVfocCnoJj-SB7to6UQFvrB2205u2Q59',
        file_name='mae_hivit_base_1600ep_ft100ep.pth',
        license='mit',
        figures={'ImageNet-1K top-1': '84.6'},
    ),
    'hivit_base.mae_in1k': Source(
        contents='HiViT, pre-trained for 1600 epochs on ImageNet-1K as a masked autoencoder',
        drive_id='1VZQz4buhlepZ5akTcEvrA3a_nxsQZ8eQ',
        file_name='mae_hivit_base_1600ep.pth',
        license='mit',
        figures={TOP1_TUNED: '84.6'},
    ),
    'hivit_small.in1k': Source(
        contents='HiViT, trained on ImageNet-1K: a classifier of 1000 classes',
        drive_id='1bXr6089pbygItoVGBPbLhlRkdXG11NrT',
        license='mit',
        notes='published in an issue of their repository',
        figures={'ImageNet-1K top-1': '83.5'},
    ),
}


def plain_name(name: str) -> str:
    """Model `arch.tag` without `_fpn`: that has the same file."""
    arch, dot, tag = name.partition('.')
    return arch.removesuffix('_fpn') + dot + tag


def source_of(name: str) -> Source | None:
    """Row of a model `arch.tag`, with or without `_fpn`; None for one without published weights."""
    return SOURCES.get(plain_name(name))


def file_name(name: str) -> str:
    """What the published file of a model is called here: the authors' name, `arch.tag.pt` where that is not known."""
    return SOURCES[plain_name(name)].file_name or f'{plain_name(name)}.pt'


def drive_url(source: Source) -> str:
    """Page of the file, for people."""
    return f'https://drive.google.com/file/d/{source.drive_id}'


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex; a process computes it once, and again if the file has changed.

    Raises:
        OSError: It cannot be read.
        ValueError: It is a folder, a pipe or a device.
    """
    check_regular_file(path)
    found = path.stat()
    return _sha256(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def why_not_expected(path: Path, name: str = '') -> str:
    """Why a file is not the published one of its name, or of `name`, as a phrase that ends 'the file is ...'.

    '' if it is, or if there is none of this name with a known SHA-256.
    """
    published = (source for key, source in SOURCES.items() if file_name(key) == (name or path.name))
    known = next((source.sha256 for source in published if source.sha256), None)
    found = sha256_of(path) if known else None
    return '' if found == known else f'not the published file of this name (its SHA-256 is {found}, not {known})'


def check_published(path: Path) -> None:
    """Raise ValueError if a file has the name of a published one, but not its SHA-256, where that is known."""
    if why := why_not_expected(path):
        raise UnreadableError(path, why, ': get it again, or give it another name if it is your own')


def hash_check(sha256: str, name: str | None) -> str:
    """Whether a file is a published one, the one of the model `name` if it is told; the end of a sentence."""
    known_as = [each for each, source in SOURCES.items() if source.sha256 == sha256]
    expected = getattr(source_of(name or ''), 'sha256', None)
    if known_as:
        return f'is the known SHA-256 of {" and ".join(known_as)}'
    if expected:
        return f'is not the known one of {name}, {expected}'
    return 'was not checked: no SHA-256 is known' + (f' of {name}' if name else '')
