"""Runs in xllamacpp's environment: reads a request, generates greedily from token prompts in
llama.cpp, prints what came.
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
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], num_tokens: int) -> list[dict[str, Any]]:
        settings = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
        }
        settings |= {"n_probs": request["vocabulary"]}
        call = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(settings).encode()
        )
        with urllib.request.urlopen(call) as answer:
            found = json.load(answer)
            if "completion_probabilities" not in found:
                raise RuntimeError(json.dumps(found)[:3000])
            return found["completion_probabilities"]

    def tokens_of(text: str) -> list[int]:
        call = urllib.request.Request(
            server.listening_address + "/tokenize", json.dumps({"content": text}).encode()
        )
        with urllib.request.urlopen(call) as answer:
            return json.load(answer)["tokens"]

    def logprob(entry: dict[str, Any], token: int) -> float:
        return next(top["logprob"] for top in entry["top_logprobs"] if top["id"] == token)

    results = []
    for prompt in request["prompts"]:
        of_prompt = []
        for end in request["scored"]:  # what the prompt says next after so many tokens
            if end < len(prompt):
                of_prompt.append(logprob(ask(prompt[:end], 1)[0], prompt[end]))
        found = ask(prompt, request["num_new_tokens"])
        tokens = [entry["id"] for entry in found]
        results.append(
            {
                "tokens": tokens,
                "prompt_logprobs": of_prompt,
                "logprobs": [entry["logprob"] for entry in found],
            }
        )
    answer = {"results": results, "tokenized": [tokens_of(text) for text in request["texts"]]}
    print(json.dumps({"version": importlib.metadata.version("xllamacpp")} | answer))


if __name__ == "__main__":
    main()
