"""Shared by all tests. No test reaches the internet: the Hub's address is a server of the tests' own."""
import os
import tempfile

import pytest
from support import hub_server

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers share the cores

# set before anything imports huggingface_hub, which reads them once
_hub = hub_server.Hub()
os.environ['HF_ENDPOINT'] = _hub.endpoint
os.environ['HF_HOME'] = tempfile.mkdtemp(prefix='timm_itpn_hf_')
os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
os.environ['HF_HUB_ETAG_TIMEOUT'] = '5'
os.environ['HF_HUB_DISABLE_XET'] = '1'  # else new clients upload to Xet storage whatever the Hub answers
for name in ('HF_HUB_OFFLINE', 'HF_TOKEN', 'HF_TOKEN_PATH', 'HUGGING_FACE_HUB_TOKEN'):
    os.environ.pop(name, None)


@pytest.fixture
def hub():
    """An empty Hub, for one test."""
    _hub.clear()
    return _hub


@pytest.fixture(scope='session', autouse=True)
def no_drive():
    """Google Drive is out of reach, as is everything by https; tests of it start a server of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('NO_PROXY', raising=False)
        patch.delenv('no_proxy', raising=False)
        for name in ('HTTPS_PROXY', 'https_proxy'):
            patch.setenv(name, 'http://127.0.0.1:9')  # the discard port: nothing listens
        yield


@pytest.fixture
def one_thread():
    """For small maps: where the cores are shared, several threads wait for each other up to ten times as long."""
    import torch
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def small_models(monkeypatch):
    """The tiny models are small, whoever creates them in this process."""
    import timm
    from support.small import reduce_models

    from timm_itpn.models import MODULES
    reduce_models(timm.list_models('*_tiny*', module=MODULES), monkeypatch)


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='no CUDA device'))
