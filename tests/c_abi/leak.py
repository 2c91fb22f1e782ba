"""Runs many jobs through C callbacks and says what is left of each: ``python -m tests.c_abi.leak JOBS``.

One JSON object: memory taken from malloc() (bytes), blocks of Python's allocator, resident memory (bytes), before and
after, with as many jobs before the first look. A job is a callback that reports, lets the built-in handler run (the
image is refused), and hears every event; in memory, without any network.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from ctypes import byref
from pathlib import Path
from typing import Any

from tests.c_abi.library import Config, DiagCallback, JobCallback, handling, load
from tests.sim.node_world import World, good


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


def look() -> dict[str, int]:
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "malloc": info.uordblks + info.hblkhd,
        "blocks": sys.getallocatedblocks(),
        "rss": pages * resource.getpagesize(),
    }


def main(jobs: int) -> None:
    lib = load()
    world = World()
    returned: list[int] = []

    def job(handle: int, data: Any) -> int:
        lib.esp_rmaker_ota_report_status(handle, 1, b"checking battery")
        returned.append(lib.esp_rmaker_ota_default_cb(handle, data))
        return 0

    config = Config(JobCallback(job), DiagCallback(), b"PEM " * 500, 1)
    node = world.power_on()
    assert lib.esp_rmaker_ota_enable(byref(config), 2) == 0
    node.start()
    world.connect()
    heard: list[int] = []

    def run(count: int) -> None:
        for number in range(count):
            world.scripts.append(good(project="other"))
            world.deliver_job(f"J{number % 7}", metadata={"text": "x" * 5000}, file_md5="0" * 32)
        assert returned == [-1] * count
        assert len(heard) > 4 * count
        for kept in (returned, heard, world.events, world.transport.sent, world.installations):
            kept.clear()

    with handling(lambda base, event_id, data: heard.append(event_id)):
        run(jobs)
        before = look()
        run(jobs)
        after = look()
    world.stop()
    print(json.dumps({"jobs": jobs, "before": before, "after": after}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
