"""The `zo_ds` command. Commands parse and print; the work is done in `zo_ds.trainer`, imported when it is needed."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from zo_ds.errors import ZODSError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Forward-only fine-tuning on DeepSpeed.",
)


class Form(str, Enum):
    """What `zo_ds export` writes."""

    JOURNAL = "journal"


class Dtype(str, Enum):
    """What `zo_ds import` rounds weights to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. training.steps=100")]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the deepspeed launcher.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Overrides = None,
    local_rank: LocalRank = 0,
) -> None:
    """Run a recipe. The last line printed is the run directory."""
    _prepare_process()
    from zo_ds.config.load import load_config
    from zo_ds.trainer.train import train as run

    recipe = load_config(config, overrides or [])
    path = run(recipe, config.read_text(encoding="utf-8"), list(overrides or []))
    if path is not None:
        print(path)


@app.command()
def prepare(config: Annotated[Path, typer.Argument(help="Recipe (YAML).")], overrides: Overrides = None) -> None:
    """Fetch and convert the model and data of a recipe into the cache, so that training needs no network."""
    _prepare_process()
    from zo_ds.config.load import load_config
    from zo_ds.data.read import data_place
    from zo_ds.models.load import model_source

    recipe = load_config(config, overrides or [])
    print(f"model: {model_source(recipe.model.path)}")
    print(f"data:  {data_place(recipe.data.path) or recipe.data.path}")


data_app = typer.Typer(no_args_is_help=True, help="Look at data before a run.")
app.add_typer(data_app, name="data")


@data_app.command()
def preview(
    config: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=1, help="How many.")] = 2,
) -> None:
    """Show examples of a recipe's data as the model gets them, and what the loss sees. Nothing is trained."""
    _prepare_process()
    from zo_ds.config.load import load_config
    from zo_ds.trainer.preview import preview as show

    print(show(load_config(config, overrides or []), examples))


@app.command()
def seeds(
    config: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=2, help="How many seeds, from 0.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs; default runs/NAME-seeds.")] = None,
    launcher: Annotated[str, typer.Option(help='e.g. "deepspeed --num_gpus 2"; default: one process.')] = "",
) -> None:
    """Run a recipe with several seeds (of data and noise), one after the other; prints mean and spread as JSON."""
    from zo_ds.config.load import load_config
    from zo_ds.trainer.seeds import run_seeds

    recipe = load_config(config, overrides or [])
    folder = out or Path("runs") / f"{recipe.name}-seeds"
    _print_json(run_seeds(config, list(overrides or []), count, folder, launcher))


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    lm_eval: Annotated[str, typer.Option(help="Tasks of the lm-eval harness to score too, with commas between.")] = "",
    limit: Annotated[int | None, typer.Option(help="lm-eval: examples of each task.")] = None,
    include: Annotated[str | None, typer.Option(help="lm-eval: folder with task files of your own.")] = None,
) -> None:
    """Score the model that a run kept on its test set; prints JSON."""
    _prepare_process()
    from zo_ds.trainer.report import start_logging
    from zo_ds.trainer.revisit import Harness, evaluate_run

    start_logging(0, stream=sys.stderr)
    tasks = tuple(task.strip() for task in lm_eval.split(",") if task.strip())
    _print_json(evaluate_run(run, Harness(tasks, limit, include) if tasks else None))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    steps: Annotated[int | None, typer.Option(help="How many steps; default: those of the kept model.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the model to this folder.")] = None,
) -> None:
    """Rebuild a run's weights from its base model and journal, bit for bit; prints JSON."""
    _prepare_process()
    from zo_ds.trainer.report import start_logging
    from zo_ds.trainer.revisit import replay_run

    start_logging(0, stream=sys.stderr)
    _print_json(replay_run(run, steps, save))


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Replay a run and compare it with every hash taken of its live weights; exit code 6 if something differs."""
    _prepare_process()
    from zo_ds.trainer.report import start_logging
    from zo_ds.trainer.revisit import audit_run

    start_logging(0, stream=sys.stderr)
    found = audit_run(run)
    _print_json(found)
    if found["problems"]:
        raise typer.Exit(6)


@app.command()
def journal(source: Annotated[Path, typer.Argument(help="Run directory or journal file.")]) -> None:
    """Print a journal as JSON lines."""
    from zo_ds.trainer.sharing import journal_lines

    for line in journal_lines(source):
        print(json.dumps(line))


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="Run directory or journal file.")],
    other: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """Say where two runs part; exit code 1 if they differ; prints JSON."""
    from zo_ds.trainer.sharing import diff_runs

    found = diff_runs(one, other)
    _print_json(found)
    if not found["equal"]:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    file: Annotated[Path, typer.Argument(help="File to write.")],
    form: Annotated[Form, typer.Option("--as", help="What to write.")] = Form.JOURNAL,
) -> None:
    """Write the fine-tune of a run as one small file: the base model's identity and the scalars; prints JSON."""
    from zo_ds.trainer.sharing import export_journal

    _print_json(export_journal(run, file))


@app.command(name="apply")
def apply_(
    file: Annotated[Path, typer.Argument(help="Journal file, as exported.")],
    model: Annotated[str | None, typer.Option(help="Base model; default: the one that the file names.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the model to this folder.")] = None,
) -> None:
    """Put a shared fine-tune on its base model, bit for bit; prints JSON."""
    _prepare_process()
    from zo_ds.trainer.report import start_logging
    from zo_ds.trainer.sharing import apply_journal

    start_logging(0, stream=sys.stderr)
    _print_json(apply_journal(file, model, save))


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder with pytorch_model.bin, or shards of it, and config.json.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Round the weights to this; default: as they are.")] = None,
) -> None:
    """Rewrite a PyTorch .bin checkpoint (a pickle, read without running it) as safetensors; prints JSON."""
    _prepare_process()
    from zo_ds.trainer.importing import import_model

    _print_json(import_model(source, target, None if dtype is None else dtype.value))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has, and which compiled ops are active and why."""
    _prepare_process()
    from zo_ds.trainer.doctor import as_text, examine

    tree = examine()
    if as_json:
        _print_json(tree)
    else:
        print(as_text(tree))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import zo_ds

        print(zo_ds.__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a zo_ds error ends the process with its own exit code and its message on stderr."""
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        app(args=arguments)
    except ZODSError as error:
        print(f"zo_ds{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        if ranks != "1":
            # The others wait for this rank to be gone; tearing down what talks to dead peers takes a second, or hangs.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)


def finetune() -> None:
    """Entry of launch/finetune.py: `--config RECIPE key=value ...`, as launcher scripts are used to."""
    arguments = [item for item in sys.argv[1:] if item != "--config"]
    arguments = [item.removeprefix("--config=") for item in arguments]
    main(["train", *arguments])


def _prepare_process() -> None:
    import warnings

    import torch

    # DeepSpeed still calls what torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Before DeepSpeed is imported: without this it probes for accelerators and warns about each.
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_json(tree: dict[str, Any]) -> None:
    print(json.dumps(tree, indent=2))
