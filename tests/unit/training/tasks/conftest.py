from task_fixtures import library, simulator, task

__all__ = ["library", "simulator", "task"]
