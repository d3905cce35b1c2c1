"""vLLM's offline engine on a CPU, adapters by its own LoRA; one engine after another in this process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

from PIL import Image


def asked(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    words: dict[str, Any] = {"dtype": job["dtype"], "max_num_seqs": 8, "seed": 0}
    words |= {"enforce_eager": True, "distributed_executor_backend": "uni", "mm_processor_cache_gb": 0}
    adapter = {"enable_lora": True, "max_lora_rank": 8} if job["adapter"] else {}
    try:
        llm = LLM(model=job["directory"], **words, **adapter)
        chats = []
        for row in job["questions"]:
            image = {"type": "image_pil", "image_pil": Image.open(row["image"]).convert("RGB")}
            chats.append([{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}])
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"])
        request = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
        found = llm.chat(chats, sampling, lora_request=request, use_tqdm=False)
        del llm
        return {"engine": [each.outputs[0].text for each in found]}
    finally:
        cleanup_dist_env_and_memory()


def main(jobs: str, out: str) -> None:
    found = dict[str, Any]()
    for job in json.loads(Path(jobs).read_text()):
        try:
            found[job["name"]] = asked(job)
        except Exception as error:  # vLLM's own: what it says goes into the table
            found[job["name"]] = f"{type(error).__name__}: {error}"
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
