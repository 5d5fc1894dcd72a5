"""Whole weight files are told from all else, by their bytes and without running what is pickled in them."""
import hashlib
import io
import os
import random

import pytest
import safetensors.torch
import torch

from timm_itpn.weights.integrity import sha256_of, why_no_weight_file

WEIGHTS = {'a': torch.arange(3000.), 'c': torch.ones(7, dtype=torch.bfloat16)}
DAMAGED = 'truncated, damaged or not a weight file'


def torch_file(content=WEIGHTS, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def why(content, tmp_path):
    path = tmp_path / 'w.pt'
    path.write_bytes(content)
    return why_no_weight_file(path)


WHOLE = {
    'zip': torch_file(),
    'empty zip': torch_file({}),
    'safetensors': safetensors.torch.save(WEIGHTS, metadata={'format': 'pt'}),
    'empty safetensors': safetensors.torch.save({}),
    'legacy': torch_file(_use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize('kind', WHOLE)
def test_whole_files_pass(kind, tmp_path):
    assert why(WHOLE[kind], tmp_path) == ''


@pytest.mark.parametrize('kind', ['zip', 'safetensors', 'legacy'])
def test_truncated_files_are_refused(kind, tmp_path):
    content = WHOLE[kind]
    for size in [len(content) * tenth // 10 for tenth in range(1, 10)] + [9, 30, len(content) - 1]:
        assert why(content[:size], tmp_path) == DAMAGED


def test_a_wrong_byte_in_a_zip_is_found(tmp_path):
    content = bytearray(WHOLE['zip'])
    content[len(content) // 2] ^= 1
    assert why(content, tmp_path).startswith(f'{DAMAGED} (wrong checksum of ')


@pytest.mark.parametrize('kind', ['zip', 'safetensors', 'legacy'])
def test_damage_of_any_kind_is_an_answer_not_an_exception(kind, tmp_path):
    random_ = random.Random(0)
    for _ in range(200):
        content = bytearray(WHOLE[kind])
        first = random_.choice((0, len(content) - 900))  # headers are at both ends
        for _ in range(random_.choice((1, 2, 5))):
            content[random_.randrange(first, len(content))] = random_.choice((0, 255, random_.randrange(256)))
        assert isinstance(why(content, tmp_path), str)


@pytest.mark.parametrize('content', [b'h', b'{"error": "quota"}', b'\x80\x04}.', b'\0' * 4096, b'<svg/>'])
def test_other_files_are_refused(content, tmp_path):
    assert why(content, tmp_path) == DAMAGED


def test_missing_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        why_no_weight_file(tmp_path / 'absent.pt')


def test_sha256_of_a_file_longer_than_a_chunk_and_of_one_that_changes(tmp_path):
    for seed in range(2):
        content = random.Random(seed).randbytes((1 << 20) + 7)
        (tmp_path / 'w').write_bytes(content)
        os.utime(tmp_path / 'w', (0, 0))  # as a copy that keeps the time
        for _ in range(2):
            assert sha256_of(tmp_path / 'w') == hashlib.sha256(content).hexdigest()
