"""Fine-tune by OpenAI's own client: upload, create, follow the events, chat with the result.

    pip install openai 'tunesmith[service]'
    python examples/openai_client.py

It starts a service of its own in a temporary folder, trains the embedded model on a support desk's messages and stops;
a minute and a half on two cores. With OPENAI_BASE_URL and OPENAI_API_KEY set, it uses the service that is there
instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

import tunesmith

ROWS = Path(tunesmith.__file__).parent / "recipes/quickstart/train.jsonl"
SYSTEM = "You triage support messages. Reply with one JSON object: intent, product, refund."
COUNT = int(os.environ.get("EXAMPLE_ROWS", "240"))


@contextlib.contextmanager
def service() -> Iterator[OpenAI]:
    """The service that the environment names, or a new one for as long as it is needed."""
    if os.environ.get("OPENAI_BASE_URL"):
        yield OpenAI()  # the one line to change, if you come from OpenAI
        return
    with tempfile.TemporaryDirectory() as home:
        port = os.environ.get("EXAMPLE_PORT", "8017")
        command = [sys.executable, "-m", "tunesmith", "up", "--home", home, "--port", port, "--json"]
        model = os.environ.get("EXAMPLE_MODEL")
        command += ["--model", f"smollm2-135m-instruct={model}"] if model else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout
            started = json.loads(process.stdout.readline())
            print(f"The service answers at {started['url']}")
            yield OpenAI(base_url=f"{started['url']}/v1", api_key=started["admin_key"], timeout=600)
        finally:
            process.terminate()
            process.wait()


def training_file() -> bytes:
    """Chat rows, as OpenAI wants them."""
    lines = []
    for line in ROWS.read_text(encoding="utf-8").splitlines()[:COUNT]:
        row = json.loads(line)
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines).encode()


def main() -> None:
    began = time.time()
    with service() as client:
        file = client.files.create(file=("triage.jsonl", training_file()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="smollm2-135m-instruct",
            training_file=file.id,
            suffix="triage",
            seed=7,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
            extra_body={"train": {"learning_rate": 1e-3}},  # Tunesmith's own settings go here
        )
        seen: set[str] = set()
        while True:
            for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
                if event.id not in seen:
                    seen.add(event.id)
                    print(f"{time.time() - began:5.0f} s  {event.message}")
            job = client.fine_tuning.jobs.retrieve(job.id)
            if job.status in ("succeeded", "failed", "cancelled"):
                break
            time.sleep(1)
        assert job.status == "succeeded" and job.fine_tuned_model, job.error
        question = "I was charged twice for my Cloud Drive plan, please give me my money back!"
        for model in ("smollm2-135m-instruct", job.fine_tuned_model):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=60, temperature=0)
            print(f"\n{model}:\n{answer.choices[0].message.content}")
    print(f"\nDone in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
