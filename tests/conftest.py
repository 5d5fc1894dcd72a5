"""Shared by all tests. No test reaches the internet: the Hub's address is a server of the tests' own."""
import os
import tempfile

import hub_server
import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers share the cores

# set before anything imports huggingface_hub, which reads them once
_hub = hub_server.Hub()
os.environ['HF_ENDPOINT'] = _hub.endpoint
os.environ['HF_HOME'] = tempfile.mkdtemp(prefix='timm_itpn_hf_')
os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
os.environ['HF_HUB_ETAG_TIMEOUT'] = '5'
os.environ.pop('HF_HUB_OFFLINE', None)


@pytest.fixture
def hub():
    """An empty Hub, for one test."""
    _hub.repos.clear()
    _hub.downloads.clear()
    _hub.truncate = None
    return _hub


@pytest.fixture
def one_thread():
    """For small maps: where the cores are shared, several threads wait for each other up to ten times as long."""
    import torch
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='no CUDA device'))
