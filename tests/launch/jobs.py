"""Real jobs on a tiny model: what they run on, and how they are started and looked at."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zo_ds.journal.history import read_journal

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
_TEXT = "a an the film plot cast it was terrible great bad good dull bright slow quick text . , is not very"
WORDS = _TEXT.split()


def make_model(folder: Path) -> Path:
    """A tiny Llama with tied embeddings and a word-level tokenizer."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS, "Text", "It"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    """Sentences of two classes, told apart by one word."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 64), ("dev", 12), ("test", 20)):
        rows = []
        for number in range(count):
            label = number % 2
            tail = " ".join(WORDS[(number * 7 + k) % 6] for k in range(number % 5 + 1))
            rows.append({"text": f"the film is {('bad', 'good')[label]} {tail}", "label": label})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def make_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe for the tiny model; `changes` are sections to merge."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(make_model(folder / "model"))},
        "data": {"path": str(make_data(folder / "data"))},
        "task": {"name": "movie-sentiment"},
        "zeroth_order": {"lr": 0.02, "num_directions": 4},
        "training": {"steps": 20, "batch_size": 8, "micro_batch_size": 4, "eval_every": 8},
        "parallel": {"threads": 1, "timeout_s": 120},
        "output": {"tensorboard": False},
    }
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(tree.get(section), dict) else values
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
    return {**clean, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **extra}


def run(command: Sequence[str | Path], cwd: Path, timeout: float = 300, **extra: str) -> Outcome:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def in_process(*arguments: str | Path) -> Outcome:
    """`zo_ds` within this process: a command that starts no ranks takes a second less."""
    from zo_ds.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return Outcome(code, out.getvalue(), err.getvalue())


def zo_ds(cwd: Path, *arguments: str | Path, **extra: str) -> Outcome:
    return run([BIN / "zo_ds", *arguments], cwd, 300, **extra)


def deepspeed(cwd: Path, ranks: int, *arguments: str | Path, port: int | None = None, timeout: float = 300) -> Outcome:
    launcher: list[str | Path] = [
        BIN / "deepspeed",
        "-q",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(port or free_port()),
    ]
    return run([*launcher, ROOT / "launch" / "finetune.py", "--config", *arguments], cwd, timeout)


def torchrun(cwd: Path, ranks: int, *arguments: str | Path) -> Outcome:
    launcher: list[str | Path] = [BIN / "torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return run([*launcher, ROOT / "launch" / "finetune.py", "--config", *arguments], cwd)


def start_rank(cwd: Path, rank: int, ranks: int, port: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """One rank of a job, started by hand as launchers do it."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return subprocess.Popen(
        [str(BIN / "zo_ds"), "train", *map(str, arguments)],
        cwd=cwd,
        env=environment(MASTER_ADDR="127.0.0.1", **{key: str(value) for key, value in numbers.items()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(run_dir: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return tree


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What the journal says of each step, without the header, which holds the run's own id."""
    return [record.to_json() for record in read_journal(run_dir / "journal").records()]


def steps_of(run_dir: Path) -> int:
    """Journalled steps so far."""
    return len(records(run_dir)) if list((run_dir / "journal").glob("*.zoj")) else 0
