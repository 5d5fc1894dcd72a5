"""Where the published weight files are, and what is known of each: one row per `arch.tag`.

None of these files has been seen by us. A size or hash that is not known is None. `_fpn` models take the rows of the
models without pyramid: backbone and pyramid are in one file.
"""
from typing import NamedTuple

__all__ = ['SOURCES', 'Source', 'drive_url', 'file_name', 'hash_check', 'plain_name', 'source_of']


class Source(NamedTuple):
    """One published file."""
    contents: str  # what it is
    drive_id: str  # on Google Drive, where the authors publish
    file_name: str = ''  # the authors' name of it, '' if it is not known
    hub_repo: str = ''  # repository of the Hugging Face Hub that has a copy, '' if none is known
    hub_path: str = ''  # the file in that repository
    size: int | None = None  # bytes
    sha256: str | None = None  # hash, in hex
    license: str = 'unknown'  # of the weights, as stated by their authors
    known_from: str = 'published by its authors; not downloaded by us'  # how we know, and what is not sure
    figures: tuple[str, ...] = ()  # what the authors report for it


RELO = (
    'published by its authors, re-hosted by xche32/RELO, a tracker by others that lists it; neither was downloaded by '
    'us')
FAST_ITPN_PRETRAINED = 'Fast-iTPN, pre-trained for 1600 epochs on ImageNet-1K against CLIP: backbone, pyramid, decoder'

SOURCES: dict[str, Source] = {
    'fast_itpn_tiny.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1Ze9RkJggxxi58Dl7sqWrf2TNOSnRK4Wi',
        file_name='fast_itpn_tiny_1600e_1k.pt',
        hub_repo='xche32/RELO',
        hub_path='pretrained/itpn/fast_itpn_tiny_1600e_1k.pt',
        known_from=RELO,
        figures=('ImageNet-1K top-1 after fine-tuning: 85.1 at 224 px, 86.2 at 384 px, 86.5 at 512 px',),
    ),
    'fast_itpn_small.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1Wvk5kQSh8fWQCUwzAp7eaVpmOi3D5_H4',
        file_name='fast_itpn_small_1600e_1k.pt',
        figures=('ImageNet-1K top-1 after fine-tuning: 86.4 at 224 px, 86.95 at 384 px, 87.8 at 512 px',),
    ),
    'fast_itpn_base.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='1ADXPV95XpWb1ROMCih1n3AD52fGdr8C_',
        file_name='fast_itpn_base_clipl_e1600.pt',
        hub_repo='xche32/RELO',
        hub_path='pretrained/itpn/fast_itpn_base_clipl_e1600.pt',
        size=180_830_695,
        sha256='626fd426dd89b2681d8b3942fa00e05fffb467af111c7bbd6a0a4b8bc0afc388',
        known_from=f'{RELO}; the hash was computed by a third party from another copy',
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 87.4 at 224 px, 88.5 at 512 px',
            'COCO box AP with DINO, 1x: 58.4',
            'MaskDINO mIoU: 57.5',
        ),
    ),
    'fast_itpn_base.mim_in1k_ft_in21k': Source(
        contents='Fast-iTPN, pre-trained as mim_in1k, then fine-tuned on ImageNet-21K at 224 px',
        drive_id='1ddGbBm46FiUdNs9HPSepokhuOKhEnBdV',
        known_from='published by its authors; not downloaded by us, the number of classes (21841) is assumed',
        figures=('ImageNet-1K top-1 after fine-tuning once more: 88.75 at 512 px',),
    ),
    'fast_itpn_large.mim_in1k': Source(
        contents=FAST_ITPN_PRETRAINED,
        drive_id='16uybbJ23Fp7lnGNYL5I198glHGhwn_y2',
        file_name='fast_itpn_large_1600e_1k.pt',
        hub_repo='xche32/RELO',
        hub_path='pretrained/itpn/fast_itpn_large_1600e_1k.pt',
        known_from=RELO,
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 89.5 at 640 px',
            'COCO box AP with DINO, 1x: 58.8',
            'MaskDINO mIoU: 58.7',
        ),
    ),
    'itpn_base.pixel_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K to predict pixels: backbone, pyramid, decoder',
        drive_id='1HxW37BOEhIE9UNgHq0zblK0fTy2-IyzM',
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 85.5 (1600 epochs)',
            'COCO box/mask AP with Mask R-CNN, 1x: 53.0/46.5',
            'ADE20K mIoU with UPerNet: 53.5',
        ),
    ),
    'itpn_base.clip_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K against CLIP: backbone, pyramid, decoder',
        drive_id='1H51Zusrvlj8RjcWA7yuUyeqaVhmndSeN',
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 86.2 (CLIP-B, 800 epochs)',
            'COCO box/mask AP with Mask R-CNN, 1x: 53.2/46.6',
            'ADE20K mIoU with UPerNet: 54.7',
        ),
    ),
    'itpn_large.pixel_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K to predict pixels: backbone, pyramid, decoder',
        drive_id='1TYCaepVflm0xMrQefG5Sj4ityXYbJLFt',
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 86.7',
            'COCO box/mask AP with Mask R-CNN, 1x: 55.6/48.6',
            'ADE20K mIoU with UPerNet: 56.1',
        ),
    ),
    'itpn_large.clip_in1k': Source(
        contents='iTPN, pre-trained on ImageNet-1K against CLIP: backbone, pyramid, decoder',
        drive_id='1gyyjcdMvAQsz2xC7ei-rEd7G4po2spy4',
        known_from='published by its authors; not downloaded by us, whether its CLIP was L/14 or L/16 is not known',
        figures=(
            'ImageNet-1K top-1 after fine-tuning: 87.8 (CLIP-L/16), 88.0 (CLIP-L/14)',
            'COCO box/mask AP with Mask R-CNN, 1x: 55.2/48.2',
            'ADE20K mIoU with UPerNet: 57.7',
        ),
    ),
    'hivit_base.mae_in1k_ft_in1k': Source(
        contents='HiViT, pre-trained as mae_in1k, then fine-tuned on ImageNet-1K: a classifier of 1000 classes',
        drive_id='1TVfocCnoJj-SB7to6UQFvrB2205u2Q59',
        file_name='mae_hivit_base_1600ep_ft100ep.pth',
        license='mit',
        figures=('ImageNet-1K top-1: 84.6',),
    ),
    'hivit_base.mae_in1k': Source(
        contents='HiViT, pre-trained for 1600 epochs on ImageNet-1K as a masked autoencoder',
        drive_id='1VZQz4buhlepZ5akTcEvrA3a_nxsQZ8eQ',
        file_name='mae_hivit_base_1600ep.pth',
        license='mit',
        figures=('ImageNet-1K top-1 after fine-tuning: 84.6',),
    ),
    'hivit_small.in1k': Source(
        contents='HiViT, trained on ImageNet-1K: a classifier of 1000 classes',
        drive_id='1bXr6089pbygItoVGBPbLhlRkdXG11NrT',
        license='mit',
        known_from='published by its authors in an issue of their repository; not downloaded by us',
        figures=('ImageNet-1K top-1: 83.5',),
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


def hash_check(sha256: str, name: str | None) -> str:
    """Whether a file is a published one, the one of the model `name` if it is told; the end of a sentence."""
    known_as = [each for each, source in SOURCES.items() if source.sha256 == sha256]
    expected = getattr(source_of(name or ''), 'sha256', None)
    if known_as:
        return f'is the known SHA-256 of {" and ".join(known_as)}'
    if expected:
        return f'is not the known one of {name}, {expected}'
    return 'was not checked: no SHA-256 is known' + (f' of {name}' if name else '')
