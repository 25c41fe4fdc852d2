"""Run functions at the same time in a random order, which a seed repeats.

One thread runs at a time, until it waits. Then another one goes on that can, or something that was
put off is done. If none can, that is a deadlock, and fails at once.
"""

import random
import threading
from dataclasses import dataclass, field

MOST = 100_000  # turns, after which something goes on without an end


@dataclass
class _Task:
    """A thread, or a function that is called later."""

    ready: object  # a function: whether it can go on
    weight: float  # how often it is picked
    call: object = None  # None if it is a thread
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: bool = False


class Interleaving:
    """Functions that run at the same time."""

    def __init__(self, seed):
        self.seed = seed
        self.error = None
        self._random = random.Random(seed)
        self._local = threading.local()
        self._tasks = []
        self.turns = 0
        self._local.task = self._add(lambda: True)

    def together(self, functions):
        """Return when all functions have returned. Raise the first error of any."""
        tasks = [self._add(lambda: True) for _ in functions]
        threads = [threading.Thread(target=self._run, args=pair) for pair in zip(tasks, functions)]
        for thread in threads:
            thread.start()
        self._pause(lambda: all(task.over for task in tasks))
        for thread in threads:
            thread.join()
        self._check()

    def wait(self, ready=lambda: True):
        """Let others go on, at least until `ready()`."""
        self._pause(lambda: self.error is not None or ready())
        self._check()

    def later(self, call, ready=lambda: True):
        """Call a function at any time from now on, but not before `ready()`. Return its task."""
        return self._add(ready, call)

    def _add(self, ready, call=None):
        weight = 10 ** self._random.uniform(-2, 0)  # some are much slower than others
        self._tasks.append(_Task(ready, weight, call))
        return self._tasks[-1]

    def _check(self):
        if self.error is not None:
            raise AssertionError(f"{self.error!r}, with seed {self.seed}") from self.error

    def _run(self, task, function):
        self._local.task = task
        task.turn.acquire()
        try:
            self._check()
            function()
        except BaseException as error:
            self.error = self.error or error
        self._end(task)
        self._go_on()

    def _pause(self, ready):
        task = self._local.task
        task.ready = ready
        self._go_on()
        task.turn.acquire()

    def _end(self, task):
        task.over = True
        self._tasks.remove(task)

    def _go_on(self):
        """Do what was put off, until a thread's turn comes."""
        while True:
            self.turns += 1
            if self.turns == MOST:
                self.error = AssertionError(f"no end after {MOST} turns")
            ready = [task for task in self._tasks if task.ready()]
            if not ready:
                self.error = AssertionError("deadlock: all threads wait for each other")
                continue
            (task,) = self._random.choices(ready, [task.weight for task in ready])
            if task.call is None:
                task.turn.release()
                return
            try:
                task.call()
            except BaseException as error:
                self.error = self.error or error
            self._end(task)
