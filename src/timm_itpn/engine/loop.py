"""The loop of a run: epochs, with checkpoints and a log, and the weights at the end."""
import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device, random_seed, reduce_tensor, update_summary
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from tqdm import tqdm

from ..checks import check_device, require
from ..files import FULL, replaced
from .checkpoints import Checkpoints, load
from .run import WHOLE, Run
from .task import Batch, Task, creating

LINES = 'log.jsonl'
TABLE = 'summary.csv'

Create = Callable[[argparse.Namespace, torch.device], Task]


def train(args: argparse.Namespace, create: Create) -> dict[str, Any]:
    """Start a run, or go on with one.

    Args:
        args: Arguments of the command, see `arguments.add_common_arguments`.
        create: Creates the task on a device; it may complete the arguments.

    Returns:
        What was written, for JSON.

    Raises:
        RuntimeError: The loss is not finite, a package or the device is missing, a checkpoint cannot be read or
            written, or weights cannot be had.
        ValueError: An argument is not usable, or not that of the run that is to be resumed.
    """
    if args.log_tensorboard:
        require('--log-tensorboard', 'tensorboard', 'tensorboard')
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs // 10)
    if args.warmup_epochs >= args.epochs:
        raise ValueError(f'--epochs {args.epochs} end within the warm-up: --warmup-epochs {args.warmup_epochs} must be '
                         'fewer.')
    checkpoints = Checkpoints(args.output, args.checkpoint_hist or 2)
    checkpoints.to_resume(args.resume)
    found = None if args.resume in (None, 'auto') else checkpoints.newest(args.resume)
    with _created(args, create) as task:
        run = Run(args, task)
        random_seed(args.seed, args.rank)
        with checkpoints.locked() if args.rank == 0 else nullcontext():
            if (found := found or checkpoints.newest(args.resume)) is not None:
                run.load_state_dict(found[1], found[0])
            elif args.resume and args.rank == 0:
                print(f'no checkpoint in {args.output}: starting', file=sys.stderr)
            if args.rank == 0:
                if found is not None:
                    checkpoints.set_aside(found[0])
                (args.output / 'args.json').write_text(json.dumps(run.settings, indent=2, default=str) + '\n')
            with closing(Log(run)) as log:
                while run.epoch < args.epochs:
                    last = run_epoch(run, checkpoints, log)
                    if args.figure_interval and run.epoch % args.figure_interval == 0 and args.rank == 0:
                        task.draw(args.output / f'epoch-{run.epoch:04d}.png', last)
                    _save(run, checkpoints)
            result = _export(run)
            if result and args.checkpoint_hist is None:
                checkpoints.prune(1)
            return result


def evaluate(args: argparse.Namespace, create: Create, path: Path) -> Mapping[str, float | None]:
    """Measure a checkpoint, with the settings of its run; see `train`. The metrics are those of the first process."""
    state = load(path, '--evaluate')
    vars(args).update({key: value for key, value in state['settings'].items() if key in args})
    with _created(args, create) as task:
        model = task.model.get_submodule(task.AVERAGED) if state['ema'] else task.model
        with creating(f'The model of {path}'):
            model.load_state_dict(state['ema'] or state[task.KEY])
        return task.evaluate(model, None)


@contextmanager
def _created(args: argparse.Namespace, create: Create) -> Iterator[Task]:
    """Create the task, tell of a full disk, and end what was changed in the process.

    `args` gets the device, rank and number of processes.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        device = init_distributed_device(args)
        check_device(args.device)
        random_seed(args.seed, 0)  # the same weights in all processes
        if args.deterministic:
            torch.use_deterministic_algorithms(True)
        yield create(args, device)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RuntimeError(f'{error.filename or args.output}: {error.strerror}. Free space there, then go on with '
                           '--resume auto.') from error
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


class Log:
    """What a run tells of itself; only its first process does.

    Lines after the updates that are done, of a run that was interrupted, are removed.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = run.args.output
        self.writes = run.args.rank == 0
        self.writer: Any | None = None
        self.progress = tqdm(
            total=run.total_updates - run.ahead, initial=run.num_updates, unit='update', mininterval=1, file=sys.stderr,
            disable=not self.writes)
        if not self.writes:
            return
        _trim(self.folder / LINES, lambda line: json.loads(line)['num_updates'] <= run.num_updates)
        _trim(self.folder / TABLE, lambda row: run.epoch > 0 and (row[0] == 'e' or int(row.split(',')[0]) < run.epoch))
        if run.args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=run.num_updates + 1)

    def update(self, losses: dict[str, float], images_per_s: float, waited_s: float) -> None:
        """Progress after an update, and a line of the log where one is due; every process has to call it."""
        run = self.run
        self.progress.update()
        self.progress.set_postfix(
            images_per_s=f'{images_per_s:.1f}', epoch=run.epoch, loss=f'{losses["loss"]:.4f}', refresh=False)
        if run.num_updates % run.args.log_interval and not run.ends_epoch:
            return
        skipped = run.skipped * run.args.world_size  # whose mean is the sum of all processes
        means = _mean_of_processes({**losses, 'skipped': skipped}, run.args)
        values = {'epoch': run.epoch, 'lr': run.lr, **means, 'images_per_s': images_per_s, 'waited_s': waited_s}
        if self.writes:
            with (self.folder / LINES).open('a', encoding='utf-8') as file:
                file.write(json.dumps({'num_updates': run.num_updates, **values}) + '\n')
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, run.num_updates)

    def epoch(self, values: dict[str, float], metrics: Mapping[str, float | None]) -> None:
        """A row of the table, at the end of an epoch."""
        if self.run.unreadable:
            tqdm.write(f'epoch {self.run.epoch}: {len(self.run.unreadable)} images were skipped because they cannot be '
                       f'read, {self.run.first_unreadable()}', file=sys.stderr)
        if self.writes:
            update_summary(self.run.epoch, values, metrics, str(self.folder / TABLE), lr=self.run.lr)

    def close(self) -> None:
        self.progress.close()
        if self.writer is not None:
            self.writer.close()


def _trim(path: Path, keep: Callable[[str], bool]) -> None:
    """Remove the lines that are not to be kept, and those that were cut off."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        try:
            if text.endswith('\n') and keep(text):
                kept.append(text)
        except (LookupError, TypeError, ValueError):  # a machine that stopped leaves anything at the end of a file
            pass
    with replaced(path) as part:
        part.write_text(''.join(kept), encoding='utf-8')


def run_epoch(run: Run, checkpoints: Checkpoints, log: Log) -> Batch:
    """The rest of an epoch, with checkpoints and log; gives its last batch."""
    start = asked = time.perf_counter()
    waited = 0.
    task = run.task.train()
    for batch in run.rest_of_epoch():
        waited += time.perf_counter() - asked
        losses = run.step(batch)
        if losses is not None:
            rate = run.images_per_update / (time.perf_counter() - start)
            start = time.perf_counter()
            log.update(losses, rate, waited)
            if run.is_recovery_point():
                _save(run, checkpoints)
        asked = time.perf_counter()
    means = _mean_of_processes({name: value / run.updates_per_epoch for name, value in run.sums.items()}, run.args)
    run.metrics = task.evaluate(task.model if run.ema is None else run.ema.module, run.epoch)
    log.epoch(means, run.metrics)
    run.start_epoch(run.epoch + 1)
    return batch


def _mean_of_processes(values: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    if not args.distributed:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=args.device)
    return dict(zip(values, reduce_tensor(tensor, args.world_size).tolist()))


def _save(run: Run, checkpoints: Checkpoints) -> None:
    state = run.state_dict()
    if run.args.rank == 0:
        checkpoints.save(state, run.num_updates)
    if run.args.distributed:
        dist.barrier()


def _export(run: Run) -> dict[str, Any]:
    """Write the weights, which the last checkpoint has found finite; every process has to call it.

    The first process writes, and gives what to tell, for JSON.
    """
    if run.ema is not None:
        run.averaged.load_state_dict(run.ema.module.state_dict())
    state: dict[str, Any] = get_model_state_dict(run.task.model, options=WHOLE)
    if run.args.rank > 0:
        return {}
    files = run.task.export(run.args.output, {key: value.detach().cpu().contiguous() for key, value in state.items()})
    return {'num_updates': run.num_updates, 'skipped': run.skipped, **run.metrics,
            **{key: str(path) for key, path in files.items()}}
