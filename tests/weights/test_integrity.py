"""Whole weight files are told from all else, by their bytes and without unpickling."""
import hashlib
import io
import random
import zipfile

import pytest
import safetensors.torch
import torch
from support.explosive import Explosive

from timm_itpn.weights.integrity import is_weight_start, sha256_of, why_no_weight_file

WEIGHTS = {'a': torch.arange(3000.), 'b': {'c': torch.ones(7, dtype=torch.bfloat16)}}
FLAT = {'a': torch.arange(3000.), 'c': torch.ones(7, dtype=torch.bfloat16)}


def torch_zip(content=WEIGHTS, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def a_zip(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def why(content, tmp_path):
    path = tmp_path / 'w.pt'
    path.write_bytes(content)
    return why_no_weight_file(path)


WHOLE = {
    'zip': torch_zip(),
    'empty zip': torch_zip({}),
    'safetensors': safetensors.torch.save(FLAT, metadata={'format': 'pt'}),
    'empty safetensors': safetensors.torch.save({}),
    'legacy': torch_zip(_use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize('kind', WHOLE)
def test_whole_files_pass(kind, tmp_path):
    assert is_weight_start(WHOLE[kind])
    assert why(WHOLE[kind], tmp_path) == ''


@pytest.mark.parametrize('kind', ['zip', 'safetensors'])
def test_truncated_files_are_refused(kind, tmp_path):
    content = WHOLE[kind]
    for size in [len(content) * tenth // 10 for tenth in range(1, 10)] + [9, 30, len(content) - 1]:
        assert why(content[:size], tmp_path) == 'truncated or damaged'


@pytest.mark.parametrize('kind', ['zip', 'safetensors'])
@pytest.mark.parametrize('tail', [b'\0', b'<html>', b'x' * 30_000])
def test_surplus_bytes_are_refused(kind, tail, tmp_path):
    assert why(WHOLE[kind] + tail, tmp_path).startswith('truncated or damaged')


def test_glued_zips_are_refused(tmp_path):
    content, other = WHOLE['zip'], torch_zip({'a': torch.zeros(3000)})
    assert why(content[:5000] + content, tmp_path).startswith('truncated or damaged')
    assert why(content[:5000] + other[5000:], tmp_path).startswith('truncated or damaged')


def test_zip_with_a_comment_passes(tmp_path):
    path = tmp_path / 'w.pt'
    path.write_bytes(WHOLE['zip'])
    with zipfile.ZipFile(path, 'a') as archive:
        archive.comment = b'seen'
    assert why_no_weight_file(path) == ''


def test_a_wrong_byte_in_a_zip_is_found(tmp_path):
    content = bytearray(WHOLE['zip'])
    content[len(content) // 2] ^= 1
    assert why(content, tmp_path).startswith('truncated or damaged (wrong checksum of ')


@pytest.mark.parametrize('kind', ['zip', 'safetensors'])
def test_damage_of_any_kind_is_an_answer_not_an_exception(kind, tmp_path):
    random_ = random.Random(0)
    for _ in range(400):
        content = bytearray(WHOLE[kind])
        first = random_.choice((0, len(content) - 900))  # headers lie at both ends
        for _ in range(random_.choice((1, 2, 5))):
            content[random_.randrange(first, len(content))] = random_.choice((0, 255, random_.randrange(256)))
        assert isinstance(why(content, tmp_path), str)


@pytest.mark.parametrize('page', [
    b'<!DOCTYPE html><html></html>', b'<html>', b'\n\n  <!doctype HTML>', b'\xef\xbb\xbf<HTML lang="en">',
    b'\xef\xbb\xbf\r\n<!Doctype html>'])
def test_web_pages_are_named(page, tmp_path):
    assert why(page, tmp_path) == 'a web page, not a weight file'


@pytest.mark.parametrize('content', [
    b'h', b'{"error": "quota"}', b'\x80\x04}.', b'\0' * 4096, bytes(random.Random(0).randbytes(4096)), b'<svg/>'])
def test_other_files_are_refused(content, tmp_path):
    assert not is_weight_start(content)
    assert why(content, tmp_path) == 'no weight file'


def test_empty_file_and_foreign_zip_are_named(tmp_path):
    assert why(b'', tmp_path) == 'empty'
    assert why(a_zip(**{'word/document.xml': b'<w/>'}), tmp_path) == 'a zip archive, but none of torch.save'


@pytest.mark.parametrize('zipped', [True, False])
def test_nothing_is_unpickled(zipped, tmp_path):
    mark = tmp_path / 'mark'
    content = torch_zip(Explosive(mark), _use_new_zipfile_serialization=zipped)
    assert why(content, tmp_path) == ''
    assert not mark.exists()


def test_unreadable_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        why_no_weight_file(tmp_path / 'absent.pt')


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path):
    content = random.Random(0).randbytes((1 << 20) + 7)
    (tmp_path / 'w').write_bytes(content)
    assert sha256_of(tmp_path / 'w') == hashlib.sha256(content).hexdigest()
