"""`genrobust` in processes of their own that start at once: on Linux they are forked from one that
has imported all they need."""

import os
import signal
import socket
import sys
from multiprocessing import get_context

import torch

from genrobust import cli, study

CONTEXT = get_context('forkserver' if sys.platform == 'linux' else 'spawn')  # no fork of a Mac's
CONTEXT.set_forkserver_preload(['genrobust.cli', 'matplotlib.pyplot', 'pandas', 'torch._dynamo'])


def _main(args, splits, environment, *pipes):
    "The command, on one thread, as it is started from a shell"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    torch.set_num_threads(1)
    for name, pipe in zip(('stdout', 'stderr'), pipes):
        descriptor = getattr(sys, f'__{name}__').fileno()
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
        setattr(sys, name, open(descriptor, 'w', encoding='utf-8', closefd=False))
    os.environ.update(environment)
    if splits:
        cli.load = lambda name, root: splits
        study.load_or_synthetic = lambda root, say: ('fashion_mnist', splits)
    sys.argv = ['genrobust', *args]
    sys.exit(cli.main())


class Command(CONTEXT.Process):
    "`genrobust ARGS`, running; with `splits` these are what it gets for any data set"

    def __init__(self, *args, splits=None, **environment):
        ours, its = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)))
        given = [str(arg) for arg in args], splits, environment, *its
        super().__init__(target=_main, args=given)
        self.start()
        for pipe in its:
            pipe.close()
        self.stdout, self.stderr = (open(os.dup(pipe.fileno()), encoding='utf-8') for pipe in ours)

    def communicate(self):
        "All that it still writes, when it has ended"
        with self.stdout, self.stderr:
            said = self.stdout.read(), self.stderr.read()
        self.join()
        return said


def two_commands(*args, splits=None):
    "Two that share the work, in the environment that `torchrun` gives its processes"
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    place = dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), TORCHELASTIC_RUN_ID='test')
    place |= dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [Command(*args, splits=splits, **place, **rank) for rank in ranks]
