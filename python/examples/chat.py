"""Talks with a model: its answer as it comes, then three questions at once.

python chat.py                              # the bundled model, which is far too small to know anything
python chat.py Qwen/Qwen3-4B --format fp4   # any other; it is fetched and quantised once
"""

import argparse

from metal_marlin.inference.pipeline import MarlinPipeline, Message


def main() -> None:
    parser = argparse.ArgumentParser(description="Talks with a model.")
    parser.add_argument("model", nargs="?", help="a folder, a GGUF file or an id on the Hub; the bundled model if left out")
    parser.add_argument("--format", help="quantise it first: fp4, int4, …")
    arguments = parser.parse_args()

    with MarlinPipeline.from_pretrained(arguments.model, format=arguments.format) as pipe:
        print(pipe)
        chat: list[Message] = [{"role": "user", "content": "Tell me a story about a dog."}]
        with pipe.stream(chat, max_tokens=60, seed=1) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        answer = stream.completion
        print(f"\n[{len(answer.tokens)} tokens, ended by {answer.finish_reason}]")

        # What was said before is in the cache: only what is new is computed.
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Continue this story."}]
        answer = pipe(chat, max_tokens=40, seed=2)
        print(f"{answer}\n[{answer.cached_tokens} of {answer.prompt_tokens} tokens of the prompt were cached]")

        beginnings = ["Once upon a time", "The old house", "In the morning"]
        for beginning, text in zip(beginnings, pipe(beginnings, max_tokens=12, temperature=0), strict=True):
            print(f"{beginning}{text}")


if __name__ == "__main__":
    main()
