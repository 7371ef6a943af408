"""Serves a model and asks it by OpenAI's own client.

python serve_openai.py                  # the bundled model
python serve_openai.py path/to/model
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """A server of its own process, on a port that is free. Gives its address."""
    command = [sys.executable, "-m", "metal_marlin", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            for line in process.stderr or ():
                said += line
                if found := re.search(r"http://[0-9.:]+", line):
                    yield found[0]
                    return
            raise SystemExit(f"the server did not start:\n{said}")
        finally:
            process.terminate()


def main() -> None:
    with server(*sys.argv[1:]) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        print(f"{model} at {url}")

        question = {"role": "user", "content": "Tell me a story about a cat."}
        answer = client.chat.completions.create(model=model, messages=[question], max_tokens=30, seed=1)
        print(answer.choices[0].message.content)

        for chunk in client.chat.completions.create(model=model, messages=[question], max_tokens=30, seed=2, stream=True):
            print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
