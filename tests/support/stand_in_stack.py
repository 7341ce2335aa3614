"""A supervised stack of tiny stand-in programs, as a process of its own: `python stand_in_stack.py FOLDER`.

It has the stages of the real stack and logs to its standard output. `worker-1` starts a grandchild that
ignores SIGTERM, as a wedged engine might.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from cli.stack import runner, state
from cli.stack.log import TerminalLog
from cli.stack.policy import RestartPolicy
from cli.stack.process import ProcessSpec
from cli.stack.supervisor import Stage

# os.write, not print: a signal may come while the line before is still being flushed.
SERVE = "import os, signal; os.write(1, b'serving\\n'); signal.pause()"
# Ends by itself on SIGTERM, like a server that shuts down.
POLITE = (
    "import os, signal; signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'bye\\n'), os._exit(0)));"
    + SERVE
)
WITH_GRANDCHILD = (
    "import subprocess, sys; "
    "deaf = 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()';"
    "subprocess.Popen([sys.executable, '-c', deaf]);" + POLITE
)
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVE
BROKEN_MODEL = "import sys; print('model: config.json is missing', file=sys.stderr); sys.exit(3)"


def program(name: str, code: str, *, grace_seconds: float = 5.0, **more: object) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", code),
        environ=os.environ,
        folder=Path.cwd(),
        grace_seconds=grace_seconds,
        **{"policy": RestartPolicy(first_delay_seconds=0.05), **more},  # type: ignore[arg-type]
    )


def stand_ins(worker: str = WITH_GRANDCHILD) -> tuple[Stage, ...]:
    return (
        Stage((program("redis", POLITE),)),
        Stage((program("worker-1", worker, is_vital=False),)),
        Stage((program("api", POLITE),)),
    )


async def _main() -> None:
    log = TerminalLog(("redis", "worker-1", "api"))
    async with runner.supervised(stand_ins(), log) as supervisor:
        await supervisor.wait()
    log.note("stopped")


if __name__ == "__main__":
    with state.hold(Path(sys.argv[1]), url="http://127.0.0.1:1"):
        asyncio.run(_main())
