"""Tasks as data, and how they are run, repeated, cached and compared: `python -m mixadapters.tasks list|run|table`."""

from mixadapters.tasks.registry import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "get_task"]
