"""What the processes of test_processes.py do: they import it by its name."""

import os


def prepare(value: str) -> None:
    os.environ["PREPARED"] = value


def doubled(number: int) -> tuple[int, str]:
    if number < 0:
        os._exit(9)
    return 2 * number, os.environ["PREPARED"]
