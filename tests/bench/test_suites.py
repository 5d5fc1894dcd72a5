"""The suites are usable as they stand."""
import pytest
import timm
import torch

from timm_itpn.bench.cases import PEERS, check
from timm_itpn.bench.suites import SUITES


@pytest.mark.parametrize('name', SUITES)
def test_every_case_can_be_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for case, rivals, rounds in SUITES[name]:
        check(case, rivals, rounds, 'cuda' if name == 'gpu' else 'cpu')
        assert rounds.repeats and rounds.warmup


@pytest.mark.parametrize('name', SUITES)
def test_no_case_stands_twice(name):
    cases = [case for case, _, _ in SUITES[name]]
    assert len(set(cases)) == len(cases)


def test_peers_are_models_of_timm():
    assert all(map(timm.is_model, PEERS))
