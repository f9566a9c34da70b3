"""litgpt's fine-tuning on given rows; runs in an environment of its own and prints one JSON line.

python litgpt_train.py MODEL ROWS.jsonl lora|full best STEPS PRECISION
"""

import json
import resource
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import tiles  # noqa: F401
import torch
from lightning.fabric import Fabric
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.prompts import ChatML
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

model_path, rows_path, what, _, steps, precision = *sys.argv[1:5], int(sys.argv[5]), sys.argv[6]
folder = Path(tempfile.mkdtemp())
base = folder / "base"
shutil.copytree(model_path, base)
convert_hf_checkpoint(base, model_name="SmolLM2-135M-Instruct")
with open(rows_path, encoding="utf-8") as file:
    rows = [json.loads(line)["messages"] for line in file]
system = rows[0][0]["content"] if rows[0][0]["role"] == "system" else None
turns = [{"instruction": r[-2]["content"], "input": "", "output": r[-1]["content"]} for r in rows]
(folder / "rows.json").write_text(json.dumps(turns), encoding="utf-8")

ends, tokens = [time.perf_counter()], [0]


def log_dict(self, metrics, step=None) -> None:
    if "iter_time" in metrics and metrics["iter"] % 8 == 0:
        ends.append(time.perf_counter())
        tokens.append(int(metrics["tokens"]))


Fabric.log_dict = log_dict
data = JSON(folder / "rows.json", mask_prompt=True, val_split_fraction=0.02, prompt_style=ChatML(system), num_workers=0)
settings: dict = {
    "checkpoint_dir": base,
    "out_dir": folder / "out",
    "precision": "bf16-true" if precision == "bfloat16" and what == "lora" else "32-true",
    "data": data,
    "train": TrainArgs(
        save_interval=10_000,
        log_interval=1,
        global_batch_size=8,
        micro_batch_size=1,
        lr_warmup_steps=1,
        epochs=100,
        max_steps=steps,
        max_seq_length=1024,
    ),
    "eval": EvalArgs(interval=10_000, max_iters=1, max_new_tokens=1, final_validation=False),
}
if what == "lora":
    from litgpt.finetune.lora import setup

    layers = ("query", "key", "value", "projection", "mlp")
    settings |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0} | {f"lora_{layer}": True for layer in layers}
else:
    from litgpt.finetune.full import setup
sys.argv = sys.argv[:1]  # at its end it writes down the arguments of a command line of its own
import litgpt.finetune.full  # noqa: E402
import litgpt.finetune.lora  # noqa: E402

litgpt.finetune.lora.save_hyperparameters = litgpt.finetune.full.save_hyperparameters = lambda *args: None
litgpt.finetune.lora.merge_lora = lambda **kwargs: None
setup(**settings)
seconds, trained = ends[-1] - ends[1], tokens[-1] - tokens[1]
found = {"tokens": trained, "seconds": seconds, "tokens_per_second": trained / seconds}
found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("\n" + json.dumps(found | {"versions": {"litgpt": version("litgpt"), "torch": torch.__version__}}))
