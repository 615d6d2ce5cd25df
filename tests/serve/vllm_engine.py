"""Generates greedily with vLLM in its own environment.

Reads a request with token prompts and prints the result with log-probabilities.
"""

import json
import sys

import vllm


def main() -> None:
    request = json.load(sys.stdin)
    engine = vllm.LLM(
        request["folder"],
        dtype=request.get("dtype", "float32"),
        enforce_eager=True,
        trust_remote_code=True,
        model_impl=request.get("implementation", "auto"),
        enable_prefix_caching=False,
        max_model_len=request["max_length"],
        max_num_batched_tokens=request["chunk"],  # longer prompts come in parts
        max_num_seqs=4,
    )
    settings = vllm.SamplingParams(
        temperature=0,
        max_tokens=request["num_new_tokens"],
        ignore_eos=True,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
    )
    found = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
        settings,
        use_tqdm=False,
    )
    results = []
    for prompt, output in zip(request["prompts"], found, strict=True):
        new = list(output.outputs[0].token_ids)
        of_new = zip(new, output.outputs[0].logprobs, strict=True)
        of_prompt = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        results.append(
            {
                "tokens": new,
                "logprobs": [entry[token].logprob for token, entry in of_new],
                "prompt_logprobs": [entry[token].logprob for token, entry in of_prompt],
            }
        )
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    said = {"version": vllm.__version__, "class": type(runner.model).__name__}
    print(json.dumps(said | {"results": results}))


if __name__ == "__main__":
    main()
