"""A warm process that trains in forks of itself, so that a test which kills training many times
pays for the imports once.

Reads a JSON object a line: `run`, `resume`, and optionally `environ` and `kill_at`, where the fork
is to kill itself. Answers with the fork's `pid`, and with its `status` once it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.quick import little_asked


def main() -> None:
    import torch

    torch.set_num_threads(1)
    from ftplan.launcher.training import loop

    with little_asked():
        serve(loop)


def serve(loop: Any) -> None:
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            status = 70
            try:
                os.environ.update(asked.get("environ", {}))
                if asked.get("kill_at"):
                    kill_at(asked["kill_at"])
                folder = Path(asked["run"])
                out = os.open(folder / "stderr.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                from ftplan.launcher.run_dir import open_run

                status = loop.train(open_run(folder), resume=asked["resume"])
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        say({"pid": pid})
        _, ended = os.waitpid(pid, 0)
        say({"status": os.waitstatus_to_exitcode(ended)})


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def kill_at(place: str) -> None:
    """SIGKILL to this process at a place in saving, the second time that it comes there."""
    from ftplan.launcher.training import checkpoints

    keeper: Any = checkpoints.CheckpointKeeper
    module: Any = checkpoints

    def dying(real: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        times = [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            times[0] += 1
            if times[0] == 2 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if times[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    if place == "written":
        module.seal = dying(module.seal, after=False)
    elif place == "sealed":
        module.seal = dying(module.seal, after=True)
    elif place == "renamed":
        keeper._rotate = dying(keeper._rotate, after=False)
    elif place == "removing":
        real = module.shutil.rmtree

        def half(path: Any, *args: Any, **kwargs: Any) -> Any:
            if Path(path).name.startswith("removed-") and Path(path).is_dir():
                next(iter(Path(path).iterdir())).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *args, **kwargs)

        module.shutil.rmtree = half
    else:
        raise ValueError(place)


if __name__ == "__main__":
    main()
