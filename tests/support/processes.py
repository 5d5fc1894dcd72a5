"""Processes that start in a fraction of a second: forks of one that has imported torch and the package."""
import multiprocessing

CONTEXT = multiprocessing.get_context('forkserver')
# installed modules, as Python 3.11 does not tell the server where those of the tests are
CONTEXT.set_forkserver_preload(['timm_itpn.pretrain.task', 'timm_itpn.detection.task'])
