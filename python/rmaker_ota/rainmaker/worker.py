"""A thread that runs other people's functions, one after the other.

What they raise is logged with its traceback and ends nothing, `SystemExit` included: one thread serves all of them. It
is started with the first task, and sleeps while there is none.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

CAPACITY = 8  # entries of the RainMaker work queue


class Worker:
    """Runs tasks in the order they came.

    Args:
        name: of the thread.
        capacity: tasks that may wait, the running one not counted; None: any number.
        begin, end: called around each task's stay here, from the moment it is taken to its end.
    """

    def __init__(
        self,
        name: str,
        *,
        capacity: int | None = CAPACITY,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._capacity = capacity
        self._begin = begin
        self._end = end
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, task: Callable[[], object], *, always: bool = False) -> bool:
        """Takes a task, without waiting.

        Args:
            always: also when the queue is full.

        Returns:
            False: the queue is full, or the worker has been stopped.
        """
        with self._changed:
            if self._stopping:
                return False
            if self._capacity is not None and len(self._tasks) >= self._capacity and not always:
                return False
            self._begin()
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
            return True

    def is_current(self) -> bool:
        """Whether the caller is this worker."""
        return threading.current_thread() is self._thread

    def stop(self, timeout_s: float = 2.0) -> bool:
        """Ends the worker after the task it is at; the others are dropped.

        Returns:
            False: that task is not over after the time given. Its thread ends with it, or with the process.
        """
        with self._changed:
            self._stopping = True
            for _ in self._tasks:
                self._end()
            self._tasks.clear()
            self._changed.notify()
        if self._thread is None or self.is_current():
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                task = self._tasks.popleft()
            try:
                task()
            except BaseException:
                log.exception("%s: a callback raised", self._name)
            finally:
                del task
                self._end()
