"""The command line: arguments, and nothing else. Every command is one function of the package."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import __version__, data, evaluate, pipeline, report, stages
from .config import Preset, load_config, load_preset, preset_names
from .embedder import Embedder
from .emoji_world import tasks
from .plan import GPUS, plan, plan_table
from .pretrain import pretrain
from .reranker import Reranker

EXAMPLES = """examples:
  q3vl-mini run --preset tiny                       all stages on two CPU cores, and the stage table
  q3vl-mini run --config runs/tiny/config.json --folder runs/again
  q3vl-mini train s1 --preset tiny                  one stage, from what earlier ones wrote
  accelerate launch -m q3vl_mini run --preset full  several processes
  q3vl-mini eval runs/tiny/s3/model --reranker runs/tiny/reranker/model --rows 100
  q3vl-mini data text_to_image --out sheet.png      a contact sheet of a task
  q3vl-mini plan --preset full --gpu H100 --gpus 8  what the stages would need, from the shapes alone
  q3vl-mini pretrain --folder runs/pretrain         make the backbone Q3VL-tiny again (hours)
"""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("q3vl-mini", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    config = argparse.ArgumentParser(add_help=False)
    source = config.add_mutually_exclusive_group()
    names = ", ".join(preset_names())
    source.add_argument("--preset", default="tiny", help=f"one of {names} (default tiny), or a file")
    source.add_argument("--config", type=Path, help="a saved run's config.json, instead of a preset")
    config.add_argument("--backbone", help="a folder, a shipped name or a Hub id, instead of the preset's")
    config.add_argument("--folder", type=Path, help="where the run writes (default runs/PRESET)")
    config.add_argument("--seed", type=int, help="instead of the preset's")
    config.add_argument("--quiet", action="store_true", help="no progress bars")

    command = commands.add_parser("run", parents=[config], help="all stages, s0 to s3, and the stage table")
    command.add_argument("--results", type=Path, help="the JSON of all figures (default results/NAME-OF-FOLDER.json)")
    command = commands.add_parser("train", parents=[config], help="one stage")
    command.add_argument("stage", choices=list(stages.RECIPES))

    command = commands.add_parser("eval", help="MMEB-mini of saved models")
    command.add_argument("models", nargs="+", help="embedders: folders, shipped names or Hub ids")
    command.add_argument("--reranker", help="re-orders the last embedder's candidates")
    command.add_argument("--top-k", type=int, default=100, help="candidates that it re-orders (default 100)")
    command.add_argument("--split", default="test", choices=tasks.SPLITS)
    command.add_argument("--rows", type=int, default=300, help="queries of each sub-dataset (default 300)")
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--out", type=Path, help="also write the records as JSON")

    command = commands.add_parser("plan", help="memory and hours of a preset's stages on given GPUs; runs nothing")
    command.add_argument("--preset", default="full", help=f"one of {names} (default full), or a file")
    command.add_argument("--backbone", help="a Hub id, a shipped name or a folder, instead of the preset's")
    command.add_argument("--gpu", default="H100", choices=list(GPUS))
    command.add_argument("--gpus", type=int, default=1, help="how many (default 1)")
    command.add_argument("--utilisation", type=float, default=0.35, help="share of the peak reached (default 0.35)")
    command.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")

    command = commands.add_parser("pretrain", help="make Q3VL-tiny, the backbone of the preset tiny")
    command.add_argument("--folder", type=Path, default=Path("runs/pretrain"))
    commands.add_parser("data", add_help=False, help="a contact sheet of a task; `q3vl-mini data --help`")
    return top


def chosen_preset(options: argparse.Namespace) -> Preset:
    """The preset or saved configuration that the options name, with what they change."""
    preset = load_config(options.config) if options.config else load_preset(options.preset)
    changes = {"backbone": options.backbone, "seed": options.seed}
    return replace(preset, **{name: value for name, value in changes.items() if value is not None})


def evaluate_models(options: argparse.Namespace) -> None:
    """Print the stage table of saved models."""
    benchmark = tasks.benchmark(options.split, options.rows)
    results = {}
    for path in options.models:
        embedder = Embedder(path)
        results[path] = evaluate.evaluate_embedder(embedder, benchmark, options.batch_size, progress=True)
    if options.reranker:
        results[f"{path} + reranker"] = evaluate.evaluate_reranker(
            Reranker(options.reranker), embedder, benchmark, top_k=options.top_k, batch_size=options.batch_size
        )
    print(report.stage_table(results, intervals=True))
    if options.out:
        options.out.write_text(json.dumps(report.result_records(results), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `q3vl-mini`; `python -m q3vl_mini` is the same."""
    options, rest = parser().parse_known_args(arguments)
    if options.command == "data":
        return data.main(rest)
    if rest:
        parser().error(f"unknown arguments {rest}")
    if options.command == "eval":
        return evaluate_models(options)
    if options.command == "pretrain":
        return print(pretrain(options.folder))
    if options.command == "plan":
        preset = load_preset(options.preset)
        preset = replace(preset, backbone=options.backbone or preset.backbone)
        plans = plan(preset, GPUS[options.gpu], options.gpus, options.utilisation, options.checkpointing)
        return print(plan_table(plans))
    preset = chosen_preset(options)
    folder = options.folder or Path("runs") / preset.name
    if options.command == "train":
        stages.run_stage(stages.Run(preset, folder, not options.quiet), options.stage)
    else:
        results = options.results or Path("results") / f"{folder.resolve().name}.json"
        pipeline.run(preset, folder, results=results, progress=not options.quiet)


if __name__ == "__main__":
    main()
