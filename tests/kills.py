"""A script in processes of its own, killed at random moments and started again until it is through."""

import random
import time

from forks import server


class Kills:
    """Runs of a script in processes that start fast.

    Args:
        target: a function of a test module that runs the script, called with `arguments_of(output folder)`.
    """

    def __init__(self, target, arguments_of, folder):
        self.target, self.arguments_of, self.folder = target, arguments_of, folder
        self.killed = []

    def start(self, output):
        process = server().Process(target=self.target, args=self.arguments_of(output))
        process.start()
        return process

    def uninterrupted(self, ready):
        """(folder of a run that was left alone, its seconds from `ready` on)."""
        self.start(self.folder / "warm").join()  # the first one pays for the imports
        output = self.folder / "whole"
        process = self.start(output)
        wait_until(lambda: ready(output), process)
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0
        return output, time.monotonic() - began

    def kill_and_resume(self, count, duration, ready):
        """Folders of runs that were killed within `duration` seconds after they were `ready`: `count` kills, over as
        many runs as it takes; a run that ends before its kill is one more result."""
        draw, done, killed = random.Random(), [], 0
        while killed < count or not done:
            output = self.folder / f"run-{len(self.killed)}-{len(done)}"
            while True:
                process = self.start(output)
                wait_until(lambda output=output: ready(output), process)
                moment = draw.uniform(0, duration) if killed < count else None
                process.join(moment)
                if process.exitcode is not None:
                    break
                process.kill()
                process.join()
                killed += 1
                self.killed.append(round(moment, 3))
            assert process.exitcode == 0, self.killed
            done.append(output)
        return done


def wait_until(condition, process):
    """Until the condition holds or the process has ended."""
    while process.exitcode is None and not condition():
        process.join(0.005)


def killed_and_resumed(target, arguments_of, folder, count, ready=lambda output: True):
    """(folder of a run that was left alone, [folders of runs that were killed on the way], moments of the kills).

    Args:
        count: kills.
        ready: tells of a run's output folder whether it may be killed from now on.
    """
    kills = Kills(target, arguments_of, folder)
    whole, duration = kills.uninterrupted(ready)
    return whole, kills.kill_and_resume(count, duration, ready), kills.killed
