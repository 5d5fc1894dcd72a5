"""Weight files around any pickle, in both formats of torch.save."""
import pickle
import zipfile

import pytest
import torch

LEGACY_START = [0x1950a86a20f9469cfc6c, 1001]  # magic number and protocol of torch.save
FORMATS = {'zip pickle': True, 'legacy pickle': False}
both_formats = pytest.mark.parametrize('file_format', list(FORMATS))


def save(content, path, file_format='zip pickle'):
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[file_format])
    return path


def write_pickle(pickled, path, file_format='zip pickle', name='archive/data.pkl', **kwargs):
    """A file of torch.save's, but with this pickle in it."""
    if file_format == 'legacy pickle':
        parts = [pickle.dumps(part, protocol=2) for part in (*LEGACY_START, {'little_endian': True})]
        path.write_bytes(b''.join(parts) + pickled + pickle.dumps([], protocol=2))
    else:
        with zipfile.ZipFile(path, 'w', **kwargs) as archive:
            archive.writestr(name, pickled)
    return path
