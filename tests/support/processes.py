"""Processes of their own for tests."""
import multiprocessing

# Forks of a process that has imported torch and the package start in a fraction of a second.
FORKS = multiprocessing.get_context('forkserver')
# installed modules, as Python 3.11 does not tell the server where those of the tests are
FORKS.set_forkserver_preload(['timm_itpn.pretrain.task', 'timm_itpn.detection.task'])

# New interpreters, for those that talk to each other: one of gloo's threads crashed once in a fork.
INTERPRETERS = multiprocessing.get_context('spawn')
