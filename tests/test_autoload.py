"""Registration with timm without an import, and above all: torch and timm always import.

Most tests run against stand-ins for torch and timm in a folder of their own, which import in no time; torch's stand-in
calls the entry point as torch does. The last ones use the real packages.
"""
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import timm_itpn

PACKAGE = Path(timm_itpn.__file__).parent
TORCH = """
    import os
    if os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') == '1':
        import timm_itpn
        timm_itpn.autoload()
    imported = True
"""
TIMM_MODELS = """
    registered = []
    import timm.layers
"""
OUR_MODELS = """
    import torch
    from timm.models import registered
    assert torch.imported and registered == []
    registered.append('fast_itpn_tiny')
"""


@pytest.fixture
def stage(tmp_path):
    """A folder with stand-ins for torch and timm, and with this package, its models being a stand-in too."""
    write(tmp_path, 'torch/__init__.py', TORCH)
    write(tmp_path, 'timm/__init__.py', 'from . import layers\nfrom . import models')
    write(tmp_path, 'timm/layers.py', 'import torch')
    write(tmp_path, 'timm/version.py', "__version__ = '1.0.31'")
    write(tmp_path, 'timm/models/__init__.py', TIMM_MODELS)
    for name in ('__init__.py', '_autoload.py'):
        write(tmp_path, f'timm_itpn/{name}', (PACKAGE / name).read_text())
    write(tmp_path, 'timm_itpn/models.py', OUR_MODELS)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def python(folder, code, *flags, **env):
    """Run code with the stand-ins on the path; return the finished process, which must have succeeded."""
    done = subprocess.run(
        [sys.executable, '-S', *flags, '-c', textwrap.dedent(code)],
        env={'PYTHONPATH': str(folder), 'PATH': os.environ['PATH'], **env}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


SHOW = '\nimport timm.models\nprint(timm.models.registered)'


@pytest.mark.parametrize('first', [
    'import timm',
    'import timm.models',
    'import torch; import timm',
    'import timm_itpn; import timm',
    'import timm; import timm_itpn',
    'import timm_itpn; import torch; import timm',
    'import timm_itpn.models',
    'from timm.models import registered',
])
def test_models_are_there_whatever_is_imported_first(stage, first):
    done = python(stage, first + SHOW)
    assert done.stdout == "['fast_itpn_tiny']\n" and done.stderr == ''


def test_import_timm_itpn_registers_when_torch_does_not_call(stage):
    assert python(stage, 'import timm' + SHOW, TORCH_DEVICE_BACKEND_AUTOLOAD='0').stdout == '[]\n'
    for code in ('import timm; import timm_itpn', 'import timm_itpn; import timm'):
        assert python(stage, code + SHOW, TORCH_DEVICE_BACKEND_AUTOLOAD='0').stdout == "['fast_itpn_tiny']\n"


def test_own_switch_leaves_registration_to_an_explicit_import(stage):
    assert python(stage, 'import timm, timm_itpn' + SHOW, TIMM_ITPN_AUTOLOAD='0').stdout == '[]\n'
    done = python(stage, 'import timm, timm_itpn.models' + SHOW, TIMM_ITPN_AUTOLOAD='0')
    assert done.stdout == "['fast_itpn_tiny']\n"


def test_torch_alone_imports_no_timm(stage):
    done = python(stage, """
        import sys, torch
        print([name for name in sys.modules if name.startswith('timm') and not name.startswith('timm_itpn')])
    """)
    assert done.stdout == '[]\n'


def test_finder_leaves_no_trace(stage):
    done = python(stage, """
        import sys
        before = list(sys.meta_path)
        import torch
        assert len(sys.meta_path) == len(before) + 1
        import importlib.util
        assert 'registered' in importlib.util.find_spec('timm.models').loader.get_source('timm.models')
        import timm.models
        assert sys.meta_path == before
        assert type(timm.models.__loader__) is type(timm.models.__spec__.loader) is type(timm.__loader__)
    """)
    assert done.stderr == ''


def test_reloading_is_harmless(stage):
    done = python(stage, """
        import importlib, torch, timm, timm_itpn
        importlib.reload(timm_itpn)
        importlib.reload(timm)
        timm_itpn.autoload()
        print(timm.models.registered)
    """)
    assert done.stdout == "['fast_itpn_tiny']\n" and done.stderr == ''


@pytest.mark.parametrize('_', range(10))
def test_threads_may_import_at_once(stage, _):
    """Not a package and its own submodule (timm and timm.models): that fails in Python itself, with or without us."""
    done = python(stage, """
        import sys, threading
        import torch
        sys.setswitchinterval(1e-5)
        barrier = threading.Barrier(4)
        def work(name):
            barrier.wait()
            __import__(name)
        names = ('timm', 'timm', 'timm_itpn', 'timm')
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """ + SHOW.replace('\n', '\n        '))
    assert done.stdout == "['fast_itpn_tiny']\n" and done.stderr == ''


def test_models_that_another_thread_is_importing_are_left_to_it(stage):
    """Python refuses to wait for a thread that waits for this one, with an error of its own."""
    write(stage, 'timm_itpn/models.py', "raise type('_DeadlockError', (RuntimeError,), {})('by _ModuleLock')")
    assert python(stage, IMPORT_ALL).stderr == ''


# failures: one warning, and everything else as if the package were not there

def assert_one_warning(done, text):
    assert done.stderr.count('timm-itpn: its models are not registered with timm') == 1, done.stderr
    assert text in done.stderr


IMPORT_ALL = 'import torch, timm, timm.models, timm_itpn; timm_itpn.autoload(); print(timm.models.registered)'


@pytest.mark.parametrize('flags', [(), ('-W', 'error'), ('-W', 'always')], ids=['plain', 'errors', 'always'])
@pytest.mark.parametrize('broken, text, message', [
    ('models.py', 'raise KeyError("broken")', "KeyError: 'broken'"),
    ('models.py', 'def', 'SyntaxError'),
    ('models.py', None, 'ModuleNotFoundError'),
    ('_autoload.py', 'raise OSError("broken")', 'OSError: broken'),
    ('_autoload.py', 'def', 'SyntaxError'),
    ('_autoload.py', None, 'ImportError'),
])
def test_broken_package_breaks_neither_torch_nor_timm(stage, broken, text, message, flags):
    path = stage / 'timm_itpn' / broken
    path.unlink() if text is None else path.write_text(text)
    done = python(stage, IMPORT_ALL, *flags)
    assert done.stdout == '[]\n'
    assert_one_warning(done, message)


@pytest.mark.parametrize('version', ['1.0.30', '1.0.9', '0.9.16', '1.0.29.dev0'])
def test_old_timm_gets_one_clear_warning(stage, version):
    write(stage, 'timm/version.py', f"__version__ = '{version}'")
    done = python(stage, IMPORT_ALL)
    assert done.stdout == '[]\n'
    assert_one_warning(done, f'it needs timm >= 1.0.31, but {version} is in use; run: pip install --upgrade timm')


def test_newer_timm_is_welcome(stage):
    write(stage, 'timm/version.py', "__version__ = '1.1.0'")
    assert python(stage, 'import timm' + SHOW).stdout == "['fast_itpn_tiny']\n"


def test_missing_timm_is_no_matter_for_torch(stage):
    shutil.rmtree(stage / 'timm')
    assert python(stage, 'import torch, timm_itpn; print(torch.imported)').stdout == 'True\n'


def test_broken_timm_fails_with_its_own_error(stage):
    write(stage, 'timm/models/__init__.py', 'raise ValueError("of timm")')
    done = python(stage, """
        import torch
        for _ in range(2):
            try:
                import timm
            except ValueError as error:
                print(error)
    """)
    assert done.stdout == 'of timm\nof timm\n' and done.stderr == ''


# with the real packages

def real(code, **env):
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_calls_the_entry_point():
    assert real("""
        import sys, torch
        assert 'timm_itpn' in sys.modules and 'timm' not in sys.modules
        import timm
        print(timm.is_model('fast_itpn_base'))
    """) == 'True\n'


@pytest.mark.parametrize('room', ['ops', 'ops.attention', 'layers', 'layers.stages', 'weights', 'models', 'cli'])
def test_any_part_of_the_package_may_be_imported_first(room):
    """Its import of timm lets our models load, which need this very part."""
    assert real(f"""
        import warnings
        warnings.simplefilter('error', RuntimeWarning)
        import timm_itpn.{room}
        import timm
        print(timm.is_model('fast_itpn_base'), timm.is_model('itpn_base'))
    """) == 'True True\n'


def test_workers_know_the_models():
    """DataLoader workers, forked and spawned, can build a model and unpickle one."""
    assert real("""
        import timm
        from torch.utils.data import DataLoader

        model = timm.create_model('fast_itpn_tiny', img_size=32, depths=(1, 1, 1), num_classes=3)
        for method in ('fork', 'spawn'):
            # a method of the model as collate function: the model travels to the worker
            loader = DataLoader([0, 1], num_workers=1, multiprocessing_context=method, collate_fn=model.group_matcher)
            assert len(list(loader)) == 2
        print('done')
    """) == 'done\n'
