"""Starts hatchery-core's gateway and its real worker on the CPU, in one process.

Its own launcher takes the real worker on a GPU only, and listens on every address. This one does
the same on the CPU and on the loopback address, in float32, and keeps checkpoints as files::

    python hatchery_on_cpu.py MODEL PORT KEY CHECKPOINTS

Its default checkpoints are bfloat16, in which no gradient can be read. The way that it offers for
other formats is used to keep float32, and beside it the same adapters in PEFT's format. One folder
is both the worker's own and that of checkpoints, because with two of them a model's later
checkpoints hold what its first one held (``_handle_save_weights`` copies only what is not there).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import uvicorn
from hatchery.core import local_dev
from hatchery.core.backends.object_store.local import LocalObjectStore
from hatchery.core.gateway import create_app, set_config
from hatchery.core.lora_state import SNAPSHOT_FILE, Bf16SnapshotPersister, SaveResult
from hatchery.core.worker import GPUWorker
from safetensors.torch import save as as_safetensors

WORKER = "cpu"


@dataclass
class Float32Persister(Bf16SnapshotPersister):
    """Keeps adapters in float32."""

    async def save(
        self, objects: Any, prefix: str, current_state: dict[str, torch.Tensor], **rest: Any
    ) -> tuple[SaveResult, dict[str, torch.Tensor]]:
        state = {k: v.detach().to(torch.float32).cpu().clone() for k, v in current_state.items()}
        version, content = rest["snapshot_version"] + 1, io.BytesIO()
        torch.save({"version": version, "dtype": "float32", "state": state}, content)
        await objects.put(f"{prefix}/{SNAPSHOT_FILE}", content.getvalue())
        return SaveResult(True, False, version, 0), state

    async def load(self, objects: Any, prefix: str) -> tuple[dict, dict, int, int]:
        content = io.BytesIO(await objects.get(f"{prefix}/{SNAPSHOT_FILE}"))
        kept = torch.load(content, map_location="cpu", weights_only=True)
        state = kept["state"]
        return dict(state), dict(state), int(kept["version"]), 0

    async def materialize(self, objects: Any, src_prefix: str, dst_prefix: str) -> int:
        size = await super().materialize(objects, src_prefix, dst_prefix)
        state, *_ = await self.load(objects, dst_prefix)
        meta = json.loads(await objects.get(f"{src_prefix}/session_meta.json"))
        lora = meta["lora_config"]
        words = {"r": lora["r"], "lora_alpha": lora["lora_alpha"]}
        await objects.put(f"{dst_prefix}/adapter_config.json", json.dumps(words).encode())
        await objects.put(f"{dst_prefix}/adapter_model.safetensors", as_safetensors(state))
        return size


async def main(model: str, port: int, key: str, checkpoints: str) -> None:
    """Serves until the process is ended."""
    os.environ["HATCHERY_WORKER_LOCAL_DIR"] = checkpoints
    config = replace(
        local_dev._build_config(key),
        objects=LocalObjectStore(root=checkpoints),
        lora_state=Float32Persister(),
    )
    set_config(config)
    app = create_app(config=config)
    await config.metadata.initialize()
    await config.queue.initialize()
    worker = GPUWorker(
        worker_id=WORKER,
        base_model_name=model,
        config=config,
        device="cpu",
        dtype=torch.float32,
        max_lora_slots=64,  # a model that it has put aside it does not find again
        attn_implementation="eager",
    )
    await worker.register()

    async def work() -> None:
        while True:
            job = await config.queue.dequeue(
                worker_id=WORKER, model_filter=model, visibility_timeout=300
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
    torch.set_num_threads(1)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
