"""Work in processes: each has its threads, and results come in order."""
import os

from timm_itpn.bench.processes import in_processes

WHO = "({}, __import__('os').getpid(), __import__('torch').get_num_threads())"  # a test file cannot be imported there


def test_items_are_dealt_to_other_processes():
    results = list(in_processes(eval, [WHO.format(item) for item in (3, 1, 2)], processes=2, threads=1))
    assert [item for item, _, _ in results] == [3, 1, 2]
    assert os.getpid() not in {pid for _, pid, _ in results} and {threads for *_, threads in results} == {1}
