"""The command line: arguments, and nothing else. Every command is one function of commands.py.

What computes is imported once a command is known, because torch and transformers take seconds.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from . import __version__
from .choices import GPUS, MERGE_METHODS, PRECISIONS, ROLES, SPLITS, STAGES, STORES
from .config import preset_names

EXAMPLES = """examples:
  q3vl-mini run --preset tiny                       all stages on two CPU cores, and the stage table
  q3vl-mini run --config runs/tiny/config.json --folder runs/again
  q3vl-mini run --resume --folder runs/tiny         go on after an interruption (so does the same command again)
  q3vl-mini run --preset full --dry-run             every stage in minutes, before a cluster is paid for
  q3vl-mini train s1 --set stages.s1.steps=20       one stage, from what earlier ones wrote
  accelerate launch -m q3vl_mini run --preset full  several processes
  q3vl-mini eval s3 --reranker reranker --rows 100  MMEB-mini of saved models
  q3vl-mini mine text_to_image --model s0 --out mined
  q3vl-mini merge s1 s2 --method slerp --out merged
  q3vl-mini embed photos/ --model s3 --out vectors
  q3vl-mini index create photos.index photos/ --model s3
  q3vl-mini search photos.index "a red cat" --reranker reranker
  q3vl-mini rerank photos/ "a red cat" --model reranker
  q3vl-mini finetune pairs.csv --model s3 --folder runs/mine --budget 10m
  q3vl-mini export s3 exported --results results/tiny.json --push me/my-embedder
  q3vl-mini demo                                    search in a browser
  q3vl-mini data text_to_image --out sheet.png      a contact sheet of a task
  q3vl-mini plan --preset full --gpus 8xH100        what the stages would need, from the shapes alone
  q3vl-mini pretrain --folder runs/pretrain         make the backbone Q3VL-tiny again (hours)
  q3vl-mini doctor                                  what this machine can run, and what is missing

A model is a folder, a shipped name (q3vl-tiny, which is the raw backbone; s0, s1, s2, s3, reranker) or a Hub id.
Every command but demo, data, public-data and synthesize takes --json, which prints its result for a program, and
--debug, which shows where an error arose.
Exit status: 0 done; 1 failed, the reason on standard error; 2 wrong arguments; 130 interrupted.
"""

# Commands whose arguments are read where they are used, by its main(); each is also `python -m q3vl_mini.…`.
OWN_ARGUMENTS = {
    "demo": ("demo.__main__", "search, compare, map and judge pairs in a browser"),
    "data": ("data", "a contact sheet of a task"),
    "public-data": ("public_data.__main__", "public data sets as quadruples, prepared once"),
    "synthesize": ("synthesis", "quadruples from a folder of pictures and videos, by an annotator model"),
}


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("q3vl-mini", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    top.add_argument("--version", action="version", version=__version__)
    verbs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show where an error arose")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    batches = argparse.ArgumentParser(add_help=False)
    batches.add_argument("--batch-size", type=int, default=32, help="items at once (default 32)")
    config = argparse.ArgumentParser(add_help=False)
    source = config.add_mutually_exclusive_group()
    names = ", ".join(preset_names())
    source.add_argument("--preset", default="tiny", help=f"one of {names} (default tiny), or a file")
    source.add_argument("--config", type=Path, help="a saved run's config.json, instead of a preset")
    source.add_argument("--resume", action="store_true", help="go on with the configuration that --folder has")
    config.add_argument("--backbone", help="a folder, a shipped name or a Hub id, instead of the preset's")
    config.add_argument("--folder", type=Path, help="where the run writes (default runs/PRESET)")
    config.add_argument("--seed", type=int, help="instead of the preset's")
    config.add_argument("--set", action="append", metavar="KEY=VALUE", help="change one value, e.g. stages.s0.steps=9")
    config.add_argument("--tracker", default="auto", help="tensorboard, wandb, ... or none (default: TensorBoard)")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", type=Path, help="of the index")
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument("items", type=Path, help="a .jsonl, .csv or .parquet table, or a folder of files")
    root = dict(type=Path, help="below which the files that a table names must lie (default: the table's folder)")
    table.add_argument("--root", **root)
    query = argparse.ArgumentParser(add_help=False)
    query.add_argument("text", nargs="?", help="the query, or its text beside a picture")
    query.add_argument("--image", help="a picture file")
    query.add_argument("--video", help="a video file")
    query.add_argument("--instruction", help="what is wanted, for queries (default: the model's)")
    query.add_argument("-k", type=int, default=10, help="results (default 10)")

    def verb(name: str, function: str, help: str, *parents, example: str = "") -> argparse.ArgumentParser:
        epilog = f"example: q3vl-mini {name} {example}" if example else None
        made = verbs.add_parser(name, parents=[common, *parents], help=help, description=help, epilog=epilog)
        made.set_defaults(function=function)
        return made

    def read_as(command: argparse.ArgumentParser) -> None:
        """How a person's pairs are read."""
        command.add_argument("--column", action="append", metavar="NAME=COLUMN", help="e.g. query=title")
        command.add_argument("--kind", action="append", metavar="NAME=KIND", help="e.g. positive=image")
        command.add_argument("--root", **root)
        command.add_argument("--may-skip", type=float, default=0.1, help="share of rows that may be bad (default 0.1)")

    processes = {
        "type": int, "default": 1, "metavar": "N",
        "help": "of this machine that share the work and its cores, each with a part of every batch (default 1)",
    }  # fmt: skip
    command = verb("run", "run", "all stages, s0 to s3, and the stage table", config, example="--preset tiny")
    command.add_argument("--results", type=Path, help="the JSON of all figures (default results/NAME-OF-FOLDER.json)")
    command.add_argument("--processes", **processes)
    command.add_argument(
        "--dry-run", nargs="?", const="stand-ins", choices=("stand-ins", "real"),
        help="all stages on a few rows and steps: offline with a small backbone and made-up public sets (minutes on a "
        "CPU), or `real`, with the preset's own",
    )  # fmt: skip
    command = verb("train", "train", "one stage, from what earlier ones wrote", config, example="s0")
    command.add_argument("stage", choices=STAGES)

    command = verb(
        "mine", "mine", "refine positives and mine hard negatives (3.3)", batches,
        example="text_to_image --model s0 --out mined",
    )  # fmt: skip
    command.add_argument("data", help="an Emoji World task, or the folder of a saved quadruple")
    command.add_argument("--model", required=True, help="the embedder that mines")
    command.add_argument("--out", type=Path, required=True, help="folder for the mined quadruple and mining.json")
    command.add_argument("--rows", type=int, default=1000, help="queries (default 1000)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--k", type=int, default=100, help="candidates a query (default 100)")
    command.add_argument("--t-plus", type=float, default=0.1, help="least score of a positive (default 0.1)")
    command.add_argument("--delta-minus", type=float, default=0.05, help="margin of a negative (default 0.05)")
    command.add_argument("--n-negatives", type=int, default=8, help="negatives kept a query (default 8)")

    command = verb(
        "merge", "merge_models", "adapters of one base as one adapter", example="s1 s2 --method slerp --out m"
    )
    command.add_argument("models", nargs="+", help="adapters: folders, shipped names or Hub ids")
    command.add_argument("--method", default="slerp", choices=MERGE_METHODS)
    command.add_argument("--weights", type=float, nargs="+", help="one a model (default: equal)")
    command.add_argument("--scale", type=float, default=1.0, help="lambda, of the merged vector (default 1)")
    command.add_argument("--density", type=float, default=0.5, help="share that TIES keeps (default 0.5)")
    command.add_argument("--rank", type=int, help="of the merged adapter (default: the lowest that is exact)")
    command.add_argument("--full", action="store_true", help="write full weights instead of an adapter")
    command.add_argument("--out", type=Path, required=True)

    command = verb("eval", "evaluate_models", "MMEB-mini of saved models", batches, example="s3 --rows 100")
    command.add_argument("models", nargs="+", help="embedders: folders, shipped names or Hub ids")
    command.add_argument("--reranker", help="re-orders the last embedder's candidates")
    command.add_argument("--top-k", type=int, default=100, help="candidates that it re-orders (default 100)")
    command.add_argument("--split", default="test", choices=SPLITS)
    command.add_argument("--rows", type=int, default=300, help="queries of each sub-dataset (default 300)")
    command.add_argument("--out", type=Path, help="also write the records as JSON")

    command = verb(
        "embed", "embed", "embeddings of a table or a folder, in shards; goes on where it was cut short",
        table, batches, example="photos/ --model s3 --out vectors",
    )  # fmt: skip
    command.add_argument("--model", required=True)
    command.add_argument("--out", type=Path, required=True, help="folder for the shards")
    command.add_argument("--instruction", help="for items without their own (default: the model's)")
    command.add_argument("--dim", type=int, help="keep the first dimensions (default: all)")
    command.add_argument("--precision", default="float32", choices=PRECISIONS)
    command.add_argument("--shard-size", type=int, default=4096, help="items a shard (default 4096)")
    command.add_argument("--limit", type=int, default=100, help="bad items that stop the job (default 100)")

    command = verb(
        "finetune", "finetune_on_pairs", "an embedder on your own pairs, and a verdict: is it better?",
        example="pairs.csv --model s3 --folder runs/mine --budget 10m",
    )  # fmt: skip
    command.add_argument("data", help="a .jsonl, .csv or .parquet table, or a folder of pictures with captions")
    command.add_argument("--model", required=True, help="the base")
    command.add_argument("--folder", type=Path, required=True, help="for all results")
    read_as(command)
    command.add_argument("--instruction", help="what is wanted, for queries without one of their own")
    command.add_argument(
        "--reranker", default="auto", help="to train too (default: that of the base, if rows bring negatives); or none"
    )
    command.add_argument("--distil", action="store_true", help="let the reranker teach the embedder")
    command.add_argument("--qat", action="store_true", help="train for int8 and binary codes too")
    command.add_argument("--budget", help='"10m" or "2h" for all of it, or "1000steps" for each training')
    command.add_argument("--epochs", type=float, default=8, help="at most (default 8)")
    command.add_argument(
        "--forget", type=float, default=0.05, help="share of its mean on MMEB-mini that a model may lose (default 0.05)"
    )
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="change one value of finetune.toml")

    said = dict(help="make, fill and empty a search index", description="a search index on disk")
    index = verbs.add_parser("index", **said, epilog="example: q3vl-mini index create photos.index photos/ --model s3")
    acts = index.add_subparsers(dest="action", required=True, metavar="ACTION")

    def act(name: str, function: str, help: str, *parents, example: str) -> argparse.ArgumentParser:
        epilog = f"example: q3vl-mini index {name} {example}"
        made = acts.add_parser(name, parents=[common, folder, *parents], help=help, description=help, epilog=epilog)
        made.set_defaults(function=function)
        return made

    command = act(
        "create", "index_create", "an index of a table or a folder", table, batches,
        example="photos.index photos/ --model s3",
    )  # fmt: skip
    command.add_argument("--model", required=True, help="the embedder")
    command.add_argument("--dim", type=int, help="keep the first dimensions (default: all)")
    command.add_argument("--precision", default="float32", choices=PRECISIONS)
    command.add_argument(
        "--store", choices=STORES, help="lance: LanceDB, the default where installed; faiss: files, in memory"
    )
    command.add_argument("--limit", type=int, default=100, help="bad items that stop the job (default 100)")
    command = act(
        "add", "index_add", "more items; same ids are replaced", table, batches, example="photos.index more/"
    )
    command.add_argument("--model", help="the embedder (default: the one that the index records)")
    command.add_argument("--limit", type=int, default=100, help="bad items that stop the job (default 100)")
    command = act("delete", "index_delete", "items out of it", example="photos.index cat.png")
    command.add_argument("ids", nargs="+")
    act("info", "index_info", "what it holds, and of which model", example="photos.index")

    command = verb(
        "search", "search", "the best items of an index for a query", folder, query, batches,
        example='photos.index "a red cat" --reranker reranker',
    )  # fmt: skip
    command.add_argument("--model", help="the embedder (default: the one that the index records)")
    command.add_argument("--rescore", type=int, default=4, help="candidates by codes for each result (default 4)")
    command.add_argument("--reranker", help="orders the candidates again")
    command.add_argument("--candidates", type=int, default=100, help="that the reranker reads (default 100)")

    command = verb(
        "rerank", "rerank", "order the items of a table or folder by relevance to a query",
        table, query, batches, example='photos/ "a red cat" --model reranker',
    )  # fmt: skip
    command.add_argument("--model", required=True)

    command = verb(
        "export", "export_model", "a folder that transformers, sentence-transformers and vLLM load",
        example="runs/tiny/s3/model exported --results results/tiny.json",
    )  # fmt: skip
    command.add_argument("model", help="an embedder or a reranker")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument("--adapter", action="store_true", help="keep the adapter instead of merged weights")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="on disk (default float32)")
    command.add_argument("--results", type=Path, help="a run's results, for the table of its README.md")
    command.add_argument("--name", help="what README.md calls it (default: the folder's name, or that of --push)")
    command.add_argument("--role", choices=ROLES, help="of a checkpoint without a card, such as a released one")
    command.add_argument("--base", help="an adapter's base as others find it, e.g. a Hub id")
    command.add_argument("--push", metavar="REPO", help="upload it to the Hub under this id; needs a login")
    command.add_argument("--public", action="store_true", help="with --push: make a new repository public")

    command = verb(
        "plan", "plan_stages", "memory and hours of a preset's stages on given GPUs; runs nothing",
        example="--preset full --gpus 8xH100",
    )  # fmt: skip
    command.add_argument("--preset", default="full", help=f"one of {names} (default full), or a file")
    command.add_argument("--backbone", help="a Hub id, a shipped name or a folder, instead of the preset's")
    command.add_argument("--pairs", help="plan fine-tuning on this table or folder on one GPU, not the preset's stages")
    command.add_argument("--epochs", type=float, default=8, help="with --pairs: of the training (default 8)")
    read_as(command)
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="change one value of the preset")
    command.add_argument("--gpu", default="H100", choices=list(GPUS))
    command.add_argument("--gpus", default="1", help="how many (default 1), or which, or both: 8xH100")
    command.add_argument("--utilisation", type=float, default=0.35, help="share of the peak reached (default 0.35)")
    command.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")

    command = verb(
        "pretrain", "pretrain_backbone", "make Q3VL-tiny, the backbone of the preset tiny (hours)",
        example="--folder runs/pretrain",
    )  # fmt: skip
    command.add_argument("--folder", type=Path, default=Path("runs/pretrain"))
    command.add_argument("--processes", **processes)
    verb("doctor", "examine", "what this machine can run, and what is missing", example="--json")
    for name, (_, help) in OWN_ARGUMENTS.items():
        verbs.add_parser(name, add_help=False, help=f"{help}; `q3vl-mini {name} --help`")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `q3vl-mini`; `python -m q3vl_mini` is the same. Returns the exit status."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    own = OWN_ARGUMENTS.get(options.command)
    if rest and not own:
        top.error(f"unknown arguments {rest}")
    try:
        if own:
            importlib.import_module(f"{__package__}.{own[0]}").main(rest)
            return 0
        if getattr(options, "processes", 1) > 1 and "RANK" not in os.environ:
            from .processes import in_processes

            return in_processes("q3vl_mini.cli", sys.argv[1:] if arguments is None else arguments, options.processes)
        from . import commands

        with redirect_stdout(sys.stderr) if options.json else nullcontext():  # standard output is the result's alone
            outcome = getattr(commands, options.function)(options)
    except KeyboardInterrupt:
        print("q3vl-mini: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if getattr(options, "debug", False):
            traceback.print_exc()
        print(f"q3vl-mini {options.command}: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") != "0":  # of several processes, one says what came out
        return outcome.code
    if options.json:
        print(json.dumps(outcome.result, default=str))
    elif outcome.text:
        print(outcome.text)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
