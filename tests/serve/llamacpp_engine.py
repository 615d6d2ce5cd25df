"""Generates greedily with llama.cpp in xllamacpp's environment.

Reads a request with token prompts and prints the result.
"""

import importlib.metadata
import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx = 4 * request["max_length"]
    params.n_parallel = 4
    params.n_batch = params.n_ubatch = request["chunk"]  # longer prompts come in parts
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # which computes in float16
    params.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    server = xllamacpp.Server(params)

    def post(path: str, content: dict[str, Any]) -> Any:
        address = server.listening_address + path
        call = urllib.request.Request(address, json.dumps(content).encode())
        with urllib.request.urlopen(call) as answer:
            return json.load(answer)

    def ask(prompt: list[int], num_tokens: int) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "prompt": prompt,
            "n_predict": num_tokens,
            "n_probs": request["vocabulary"],
        }
        found = post("/completion", settings)
        if "completion_probabilities" not in found:
            raise RuntimeError(json.dumps(found)[:3000])
        return found["completion_probabilities"]

    def logprob(entry: dict[str, Any], token: int) -> float:
        return next(top["logprob"] for top in entry["top_logprobs"] if top["id"] == token)

    results = []
    for prompt in request["prompts"]:
        of_prompt = [  # what the prompt says next after so many tokens
            logprob(ask(prompt[:end], 1)[0], prompt[end])
            for end in request["scored"]
            if end < len(prompt)
        ]
        found = ask(prompt, request["num_new_tokens"])
        new = {"tokens": [entry["id"] for entry in found]}
        new["logprobs"] = [entry["logprob"] for entry in found]
        results.append(new | {"prompt_logprobs": of_prompt})
    tokenized = [
        post("/tokenize", {"content": text})["tokens"] for text in request["texts"]
    ]
    answer = {"results": results, "tokenized": tokenized}
    print(json.dumps({"version": importlib.metadata.version("xllamacpp")} | answer))


if __name__ == "__main__":
    main()
