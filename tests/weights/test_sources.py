"""The SHA-256 that files are known by."""
import hashlib
import os
import random

from timm_itpn.weights.sources import sha256_of


def test_sha256_of_a_file_longer_than_a_chunk_and_of_one_that_changes(tmp_path):
    for seed in range(2):
        content = random.Random(seed).randbytes((1 << 20) + 7)
        (tmp_path / 'w').write_bytes(content)
        os.utime(tmp_path / 'w', (0, 0))  # as a copy that keeps the time
        for _ in range(2):
            assert sha256_of(tmp_path / 'w') == hashlib.sha256(content).hexdigest()
