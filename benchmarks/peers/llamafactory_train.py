"""LLaMA-Factory's training on given rows; runs in an environment of its own and prints one JSON line.

python llamafactory_train.py MODEL ROWS.jsonl lora|full best STEPS PRECISION
"""

import importlib.machinery
import json
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import torch

# Text only: its audio package wants CUDA's libraries and is asked for at import (torchvision is not even there).
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from measured import Clock, count_tokens, tell  # noqa: E402

model_path, rows_path, what, _, steps, precision = *sys.argv[1:5], int(sys.argv[5]), sys.argv[6]
folder = Path(tempfile.mkdtemp())
with open(rows_path, encoding="utf-8") as file:
    rows = [{"messages": json.loads(line)["messages"]} for line in file]
(folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
tags = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
# It computes in what the model's files say they are in, bfloat16, and no setting says otherwise.
model = folder / "model"
model.mkdir()
for part in Path(model_path).iterdir():
    (model / part.name).symlink_to(part)
told = json.loads((model / "config.json").read_text())
(model / "config.json").unlink()
(model / "config.json").write_text(json.dumps(told | {"dtype": precision, "torch_dtype": precision}))
info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}}
(folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

from llamafactory.train.tuner import run_exp  # noqa: E402

seen, clock = count_tokens(), Clock()
settings = {
    "model_name_or_path": str(model),
    "stage": "sft",
    "do_train": True,
    "finetuning_type": what,
    "template": "chatml",
    "dataset": "rows",
    "dataset_dir": str(folder),
    "output_dir": str(folder / "out"),
    "cutoff_len": 1024,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_steps": steps,
    "learning_rate": 1e-4,
    "disable_gradient_checkpointing": True,
    "bf16": what == "lora" and precision == "bfloat16",  # its pure_bf16 refuses a CPU
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": not torch.cuda.is_available(),
    "preprocessing_num_workers": 1,
    "overwrite_cache": True,
}
if what == "lora":
    settings |= {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all"}
run_exp(args=settings, callbacks=[clock])
tell(seen, clock.ends, {"llamafactory": version("llamafactory"), "torch": torch.__version__})
