"""Starts hatchery-core's gateway and its real worker on the CPU, in one process.

Its own launcher takes the real worker on a GPU only. This one does the same on the CPU::

    python hatchery.py MODEL PORT KEY CHECKPOINTS
"""

from __future__ import annotations

import asyncio
import sys

import uvicorn
from hatchery.core import local_dev
from hatchery.core.gateway import create_app, set_config
from hatchery.core.worker import GPUWorker


async def main(model: str, port: int, key: str) -> None:
    """Serves until the process is ended."""
    config = local_dev._build_config(key)
    set_config(config)
    app = create_app(config=config)
    await config.metadata.initialize()
    await config.queue.initialize()
    worker = GPUWorker(worker_id="cpu", base_model_name=model, config=config, device="cpu")
    await worker.register()

    async def work() -> None:
        while True:
            job = await config.queue.dequeue(
                worker_id="cpu", model_filter=model, visibility_timeout=300
            )
            if job is None:
                await asyncio.sleep(0.02)
                continue
            await worker._process_one(job)

    task = asyncio.create_task(work())
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="info", lifespan="off")
    )
    print("the worker is ready", flush=True)
    await server.serve()
    task.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
