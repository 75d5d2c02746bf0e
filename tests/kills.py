"""A script in processes of its own, killed at random moments and started again until it is through."""

import random
import time

from forks import server


def killed_and_resumed(target, arguments_of, folder, count):
    """(folder of a run that was left alone, [folders of runs that were killed on the way], moments of the kills).

    Args:
        target: a function of a test module that runs the script, called with `arguments_of(output folder)`.
        count: kills, over as many runs as it takes; a run that ends before its kill is one more result.
    """

    def start(output):
        process = server().Process(target=target, args=arguments_of(output))
        process.start()
        return process

    start(folder / "warm").join()  # the first one pays for the imports
    began = time.monotonic()
    whole = start(folder / "whole")
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    draw, done, killed = random.Random(), [], []
    while len(killed) < count or not done:
        output = folder / f"run-{len(done)}"
        process = start(output)
        moment = draw.uniform(0, duration) if len(killed) < count else None
        process.join(moment)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed.append(round(moment, 3))
            continue
        assert process.exitcode == 0, killed
        done.append(output)
    return folder / "whole", done, killed
