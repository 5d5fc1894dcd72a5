"""Registration with timm without an import, and above all: torch and timm always import.

Most tests run against stand-ins for torch and timm in a folder of their own, which import in no time; torch's stand-in
calls entry points as torch does. The last ones use the real packages.
"""
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import timm_itpn

PACKAGE = Path(timm_itpn.__file__).parent
PROJECT = Path(__file__).parents[1]
TORCH = """
    import os
    if os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') == '1':
        from importlib.metadata import entry_points
        for backend in entry_points(group='torch.backends'):
            try:
                backend.load()()
            except Exception as error:
                raise RuntimeError('Failed to load the backend extension') from error
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
    """A site-packages folder with stand-ins for torch and timm, and with this package, its models a stand-in too."""
    write(tmp_path, 'torch/__init__.py', TORCH)
    write(tmp_path, 'timm/__init__.py', 'from . import layers\nfrom . import models')
    write(tmp_path, 'timm/layers.py', 'import torch')
    write(tmp_path, 'timm/version.py', "__version__ = '1.0.31'")
    write(tmp_path, 'timm/models/__init__.py', TIMM_MODELS)
    section = re.search(r"'torch.backends'\]\n(.*?)\n\n", (PROJECT / 'pyproject.toml').read_text(), re.S).group(1)
    write(tmp_path, 'timm_itpn-0.dist-info/entry_points.txt', '[torch.backends]\n' + section.replace("'", ''))
    write(tmp_path, 'timm_itpn-0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: timm-itpn\nVersion: 0')
    shutil.copy(PACKAGE.parent / 'timm_itpn_autoload.py', tmp_path)
    write(tmp_path, 'timm_itpn/__init__.py', (PACKAGE / '__init__.py').read_text())
    write(tmp_path, 'timm_itpn/models.py', OUR_MODELS)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def python(folder, code, *flags, **env):
    """Run code with the stand-ins on the path; return the finished process, which must have succeeded."""
    code = f'import sys; sys.path.insert(0, {str(folder)!r})\n' + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, '-S', *flags, '-c', code],
        env={'PATH': os.environ['PATH'], **env}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def outputs(folder, codes, *flags, **env):
    """What each code prints, to either stream, in a process of its own: forks of one, which are quick."""
    marked = [f'print("begin", flush=True)\n{textwrap.dedent(code)}\nsys.stdout.flush()' for code in codes]
    done = python(folder, f"""
        import os, traceback
        sys.stderr = sys.stdout
        for code in {marked!r}:
            if os.fork() == 0:
                try:
                    exec(code, {{'__name__': '__main__'}} | {{'sys': sys}})
                except Exception:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(0)
            os.wait()
    """, *flags, **env)
    assert done.stderr == ''
    found = done.stdout.split('begin\n')[1:]
    assert len(found) == len(codes)
    return found


SHOW = '\nimport timm.models\nprint(timm.models.registered)'
REGISTERED, NONE = "['fast_itpn_tiny']\n", '[]\n'
ORDERS = [order for count in (1, 2, 3) for order in itertools.permutations(('torch', 'timm', 'timm_itpn'), count)]
ORDERS += [('timm.models',), ('timm_itpn.models',), ('timm', 'timm_itpn.models'), ('timm_itpn', 'timm.models', 'torch')]
CODES = [f'import {", ".join(order)}{SHOW}' for order in ORDERS]


@pytest.mark.parametrize('flags', [(), ('-I', '-W', 'error'), ('-OO',)], ids=' '.join)
def test_models_are_there_whatever_is_imported_first(stage, flags):
    assert dict(zip(ORDERS, outputs(stage, CODES, *flags))) == dict.fromkeys(ORDERS, REGISTERED)


def test_import_timm_itpn_registers_when_torch_does_not_call(stage):
    found = dict(zip(ORDERS, outputs(stage, CODES, TORCH_DEVICE_BACKEND_AUTOLOAD='0')))
    assert found == {order: REGISTERED if 'timm_itpn' in ' '.join(order) else NONE for order in ORDERS}


def test_own_switch_leaves_registration_to_an_explicit_import(stage):
    found = dict(zip(ORDERS, outputs(stage, CODES, TIMM_ITPN_AUTOLOAD='0')))
    assert found == {order: REGISTERED if 'timm_itpn.models' in order else NONE for order in ORDERS}


def test_timm_in_a_zip_file_is_found(stage):
    shutil.make_archive(stage / 'packages', 'zip', stage, 'timm')
    shutil.rmtree(stage / 'timm')
    done = python(stage, f'sys.path.append({str(stage / "packages.zip")!r}); import torch, timm' + SHOW)
    assert done.stdout == REGISTERED and done.stderr == ''


FINDERS = {
    'finds it itself': """
        class Finder:
            def find_spec(self, name, path, target=None):
                return PathFinder.find_spec(name, path, target) if name.startswith('timm.') else None
    """,
    'asks all others': """
        class Finder:
            def find_spec(self, name, path, target=None):
                for finder in sys.meta_path:
                    spec = finder.find_spec(name, path, target) if finder is not self else None
                    if spec is not None:
                        return spec
    """,
    'has a loader of the old kind': """
        class Finder:
            def find_spec(self, name, path, target=None):
                if name == 'timm.models':
                    spec = PathFinder.find_spec(name, path, target)
                    spec.loader = Loader(spec.loader)
                    return spec
        class Loader:
            def __init__(self, loader):
                self.load_module = loader.load_module
    """,
    'finds nothing': """
        class Finder:
            def find_spec(self, name, path, target=None):
                return None
    """,
    'is of the old kind': """
        class Finder:
            def find_module(self, name, path=None):
                return None
    """,
}


@pytest.mark.parametrize('finder', FINDERS)
def test_foreign_finder_breaks_nothing_and_import_timm_itpn_helps(stage, finder):
    code = f'from importlib.machinery import PathFinder\n{textwrap.dedent(FINDERS[finder])}'
    adds = [f'sys.meta_path.insert({position}, Finder())' for position in ('0', '1', 'len(sys.meta_path)')]
    orders = [order for add in adds for order in itertools.permutations([add, 'import torch', 'import timm'])]
    codes = ['\n'.join([code, *order, 'import timm_itpn', SHOW]) for order in orders]
    found = outputs(stage, codes, '-W', 'ignore::ImportWarning', '-W', 'ignore::DeprecationWarning')
    assert dict(zip(orders, found)) == dict.fromkeys(orders, REGISTERED)


def test_models_can_be_imported_when_a_foreign_finder_hid_timm_from_an_earlier_import(stage):
    done = python(stage, '\n'.join([
        'from importlib.machinery import PathFinder', textwrap.dedent(FINDERS['finds it itself']),
        'import timm_itpn', 'sys.meta_path.insert(0, Finder())', 'import timm, timm_itpn.models', SHOW]))
    assert done.stdout == REGISTERED and done.stderr == ''


def test_torch_alone_imports_neither_timm_nor_this_package(stage):
    done = python(stage, """
        import torch
        print([name for name in sys.modules if name.startswith('timm')])
    """)
    assert done.stdout == "['timm_itpn_autoload']\n"


def test_finder_leaves_no_trace(stage):
    done = python(stage, """
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
        import importlib, torch, timm_itpn
        importlib.reload(timm_itpn)
        importlib.reload(torch)
        import timm
        for module in (timm_itpn, timm, torch):
            importlib.reload(module)
        timm_itpn.autoload()
        print(timm.models.registered)
    """)
    assert done.stdout == REGISTERED and done.stderr == ''


def test_threads_may_import_at_once(stage):
    """Not a package and its own submodule (timm and timm.models): that fails in Python itself, with or without us."""
    code = """
        import threading
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
        import timm.models
        print(timm.models.registered)
    """
    assert outputs(stage, 10 * [code]) == 10 * [REGISTERED]


def test_models_that_another_thread_is_importing_are_left_to_it(stage):
    """Python refuses to wait for a thread that waits for this one, with an error of its own."""
    write(stage, 'timm_itpn/models.py', "raise type('_DeadlockError', (RuntimeError,), {})('by _ModuleLock')")
    assert python(stage, IMPORT_ALL).stderr == ''


# failures: one warning, and everything else as if the package were not there

def assert_one_warning(done, text):
    assert done.stderr.count('timm-itpn: its models are not registered with timm') == 1, done.stderr
    assert text in done.stderr


IMPORT_ALL = 'import torch, timm, timm.models, timm_itpn; timm_itpn.autoload(); print(timm.models.registered)'


@pytest.mark.parametrize('flags', [(), ('-W', 'error')], ids=['plain', 'errors'])
@pytest.mark.parametrize('broken, text, message', [
    ('models.py', 'raise KeyError("broken")', "KeyError: 'broken'"),
    ('models.py', 'def', 'SyntaxError'),
    ('models.py', None, 'its files are gone'),
    ('__init__.py', 'raise OSError("broken")', 'OSError: broken'),
    ('__init__.py', 'def', 'SyntaxError'),
    ('', None, 'its files are gone'),
])
def test_broken_package_breaks_neither_torch_nor_timm(stage, broken, text, message, flags):
    path = stage / 'timm_itpn' / broken
    if text is not None:
        path.write_text(text)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    done = python(stage, """
        import torch, timm, timm.models
        import timm_itpn_autoload
        timm_itpn_autoload.autoload()
        try:
            import timm_itpn
        except Exception:
            pass
        print(timm.models.registered)
    """, *flags)
    assert done.stdout == '[]\n'
    assert_one_warning(done, message)


def test_torch_and_timm_import_without_a_word_to_stderr_when_it_is_closed(stage):
    shutil.rmtree(stage / 'timm_itpn')
    python(stage, 'sys.stderr.close(); import torch, timm', '-W', 'error')


def test_installed_module_is_found_when_the_clone_of_an_editable_install_is_gone(stage, tmp_path_factory, monkeypatch):
    """What pip installs for `pip install -e`: the module that torch calls is a copy."""
    backend = pytest.importorskip('hatchling.build', reason='needs hatchling')
    clone = tmp_path_factory.mktemp('clone')
    for name in ('src/timm_itpn', 'src/timm_itpn_autoload.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        (clone / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, clone / name)
    for path in [stage / 'timm_itpn', stage / 'timm_itpn-0.dist-info']:
        shutil.rmtree(path)
    (stage / 'timm_itpn_autoload.py').unlink()
    monkeypatch.chdir(clone)
    wheel = zipfile.ZipFile(stage / backend.build_editable(str(stage)))
    assert 'timm_itpn_autoload.py' in wheel.read(f'timm_itpn-{timm_itpn.__version__}.dist-info/RECORD').decode()
    wheel.extractall(stage)
    write(clone, 'src/timm_itpn/models/__init__.py', OUR_MODELS)
    follow_pth = f'import site; site.addsitedir({str(stage)!r})'
    done = python(stage, f'{follow_pth}; import torch, timm' + SHOW)
    assert done.stdout == REGISTERED and done.stderr == ''
    shutil.rmtree(clone / 'src')
    done = python(stage, f'{follow_pth}; import torch, timm' + SHOW)
    assert done.stdout == '[]\n'
    assert_one_warning(done, 'its files are gone')


@pytest.mark.parametrize('version', ['1.0.9', '0.9.16', '1.0.30.dev0'])
def test_old_timm_gets_one_clear_warning(stage, version):
    write(stage, 'timm/version.py', f"__version__ = '{version}'")
    done = python(stage, IMPORT_ALL)
    assert done.stdout == '[]\n'
    assert_one_warning(done, f'needs timm >= 1.0.31, but {version} is in use; run: pip install --upgrade timm')


def test_newer_timm_is_welcome(stage):
    write(stage, 'timm/version.py', "__version__ = '1.1.0'")
    assert python(stage, 'import timm' + SHOW).stdout == REGISTERED


def test_torch_imports_where_timm_is_missing(stage):
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

ROOMS = ['ops', 'ops.attention', 'layers', 'layers.stages', 'weights', 'models', 'cli']


def test_torch_calls_the_entry_point_and_any_room_may_be_imported_first():
    """Importing a room imports timm, which lets our models load, which need this very room.

    DataLoader workers, forked and spawned, can build a model and unpickle one. One process has imported torch, and its
    forks do the rest.
    """
    code = f"""
        import os, sys, torch
        assert 'timm_itpn_autoload' in sys.modules and 'timm' not in sys.modules
        import torchvision, warnings  # the dearest imports of timm, once
        from torch.utils.data import DataLoader
        warnings.simplefilter('error', RuntimeWarning)

        for room in {ROOMS}:
            if os.fork() == 0:
                __import__('timm_itpn.' + room)
                import timm
                print(room, timm.is_model('fast_itpn_base') and timm.is_model('itpn_base'), flush=True)
                os._exit(0)
            os.wait()

        import timm
        model = timm.create_model('fast_itpn_tiny', img_size=32, depths=(1, 1, 1), num_classes=3)
        for method in ('fork', 'spawn'):
            # a method of the model as collate function: the model travels to the worker
            loader = DataLoader([0, 1], num_workers=1, multiprocessing_context=method, collate_fn=model.group_matcher)
            print(method, len(list(loader)))
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ''.join(f'{room} True\n' for room in ROOMS) + 'fork 2\nspawn 2\n'
