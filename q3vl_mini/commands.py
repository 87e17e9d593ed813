"""What each command does: options in, a text for a person and a result for a program out."""

import argparse
import shutil
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from . import combine, evaluate, pipeline, report, stages
from .choices import GPUS, Gpu
from .config import Preset, load_config, load_preset, override
from .data import save_quadruple
from .disk import discard
from .doctor import doctor, doctor_table
from .dry_run import dry_run
from .embedder import Embedder
from .emoji_world import tasks
from .entries import Store, check_identity
from .export import export, push
from .finetune import finetune, finetune_preset
from .index import Index
from .items import Skipped, check_any, check_skipped, claim_folder, embed_items, embed_to_folder, read_items
from .mining_shares import mine_in_shares
from .plan import plan, plan_finetune, plan_table
from .pretrain import pretrain
from .records import MODALITIES
from .reranker import Reranker
from .stages import media_budget
from .stores import make_store, open_store, write_store
from .survey import survey

Options = argparse.Namespace


class Outcome(NamedTuple):
    """What a command has to say: `text` on a terminal, `result` with --json; `code` is the exit status."""

    text: str
    result: Any
    code: int = 0


def chosen_preset(options: Options) -> Preset:
    """The preset or saved configuration that the options name, with what they change."""
    saved = options.config
    if options.resume:
        saved = (options.folder or Path("runs") / options.preset) / "config.json"
        if not saved.is_file():
            raise ValueError(f"nothing to resume: there is no {saved}; give the --folder of a run, or start one")
    preset = load_config(saved) if saved else load_preset(options.preset)
    changes = {"backbone": options.backbone, "seed": options.seed}
    preset = replace(preset, **{name: value for name, value in changes.items() if value is not None})
    return override(preset, options.set or [])


def _run(options: Options) -> tuple[Preset, Path]:
    preset = chosen_preset(options)
    return preset, options.folder or Path("runs") / preset.name


def run(options: Options) -> Outcome:
    if options.dry_run:
        return _dry_run(options)
    preset, folder = _run(options)
    results = options.results or Path("results") / f"{folder.resolve().name}.json"
    pipeline.run(preset, folder, results=results, progress=not options.quiet, tracker=options.tracker)
    return Outcome("", {"folder": str(folder), "results": str(results)})


def _dry_run(options: Options) -> Outcome:
    preset, real = chosen_preset(options), options.dry_run == "real"
    folder = options.folder or Path("runs") / f"{preset.name}-dry-run"
    stand_in = None if real else options.backbone
    results = dry_run(preset, folder, real, stand_in, options.results, not options.quiet, options.tracker)
    told = "Every stage and the evaluation went through; the scores of a dry run say nothing."
    return Outcome(told, {"folder": str(folder), "results": str(results)})


def train(options: Options) -> Outcome:
    preset, folder = _run(options)
    metrics = stages.run_stage(stages.Run(preset, folder, not options.quiet, options.tracker), options.stage)
    before, after = metrics["validation"]["before"], metrics["validation"]["after"]
    return Outcome(f"{options.stage}: validation {before} -> {after}; {folder / options.stage / 'model'}", metrics)


def pretrain_backbone(options: Options) -> Outcome:
    folder = pretrain(options.folder)
    return Outcome(f"{folder}", {"folder": str(folder)})


def evaluate_models(options: Options) -> Outcome:
    benchmark = tasks.benchmark(options.split, options.rows)
    results, embedder = {}, None
    for path in options.models:
        embedder = Embedder(path)
        results[path] = evaluate.evaluate_embedder(embedder, benchmark, options.batch_size, not options.quiet)
    if options.reranker:
        results[f"{path} + reranker"] = evaluate.evaluate_reranker(
            Reranker(options.reranker), embedder, benchmark, top_k=options.top_k, batch_size=options.batch_size
        )
    records = report.result_records(results)
    if options.out:
        report.write_json(options.out, records, indent=1)
    return Outcome(report.stage_table(results, intervals=True), records)


def mine(options: Options) -> Outcome:
    state = _group()
    with state.main_process_first():  # a public set is prepared once
        quadruple = stages.sub_dataset(options.data, options.rows, options.seed)
    setting = {name: getattr(options, name) for name in ("k", "t_plus", "delta_minus", "n_negatives")}
    shares = options.out.with_name(f"{options.out.name}.shares")
    mined = mine_in_shares(
        Embedder(options.model),
        quadruple,
        shares,
        state,
        source={name: getattr(options, name) for name in ("data", "rows", "seed")},
        batch_size=options.batch_size,
        progress=not options.quiet and state.is_main_process,
        **setting,
    )
    if mined is None:
        return Outcome("", {})
    save_quadruple(mined.to_quadruple(), options.out)
    discard(shares)
    histograms = {name: counts.tolist() for name, counts in mined.histograms().items()}
    result = setting | mined.report | {"histograms": histograms}
    report.write_json(Path(options.out) / "mining.json", result)
    return Outcome(f"{mined}\n{options.out}", result)


def merge_models(options: Options) -> Outcome:
    """Adapters of one base as one model. Self Positioning needs a probe set and is the stage s3 of a run."""
    made = combine.merge_checkpoints(
        options.models,
        options.out,
        options.method,
        options.weights,
        density=options.density,
        scale=options.scale,
        rank=options.rank,
        full=options.full,
    )
    kind = "full weights" if options.full else f"rank {made['rank']}, relative error {made['error']:.2g}"
    return Outcome(f"{options.out}: {kind}", {"folder": str(options.out)} | made)


def _given(options: Options, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _group() -> PartialState:
    """The processes that this one was started with; without a word, accelerate looks for GPUs alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def embed(options: Options) -> Outcome:
    state, embedder = _group(), Embedder(options.model)
    given = _given(options, "instruction", "dim", "precision")
    with state.main_process_first():
        claim_folder(embedder, options.items, options.out, options.shard_size, **given)
    skipped = embed_to_folder(
        embedder,
        options.items,
        options.out,
        shard_size=options.shard_size,
        rank=state.process_index,
        world=state.num_processes,
        limit=options.limit,
        progress=not options.quiet,
        root=options.root,
        batch_size=options.batch_size,
        **given,
    )
    result = {"folder": str(options.out), "skipped": [asdict(item) for item in skipped]}
    return Outcome(f"{options.out}; {len(skipped)} items skipped", result)


def finetune_on_pairs(options: Options) -> Outcome:
    found = finetune(
        options.data,
        options.model,
        options.folder,
        columns=_named(options.column),
        kinds=_named(options.kind),
        root=options.root,
        may_skip=options.may_skip,
        instruction=options.instruction,
        reranker=None if options.reranker == "none" else options.reranker,
        distil=options.distil,
        qat=options.qat,
        budget=options.budget,
        epochs=options.epochs,
        forget=options.forget,
        changes=options.set or [],
        progress=not options.quiet,
    )
    return Outcome(f"{found}\n{found.folder}", found.verdict | {"ship": found.ship, "folder": str(found.folder)})


def _named(pairs: list[str] | None) -> dict[str, str] | None:
    """["query=title"] as {"query": "title"}."""
    if wrong := [pair for pair in pairs or [] if "=" not in pair]:
        raise ValueError(f"{wrong[0]!r}; write NAME=VALUE, e.g. query=title")
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


def index_create(options: Options) -> Outcome:
    """A new index, or LanceDB store, of the items of a table or folder."""
    if options.folder.exists():
        raise ValueError(f"{options.folder} exists; add to it with `q3vl-mini index add`, or give another folder")
    embedder = Embedder(options.model)
    dim = options.dim or embedder.dim
    identity = embedder.identity(dim)
    store = make_store(options.folder, dim, options.precision, identity, options.store)
    try:
        return _added(options, embedder, store)
    finally:
        if not len(store):  # a database is in its folder from the start
            shutil.rmtree(options.folder, ignore_errors=True)


def index_add(options: Options) -> Outcome:
    """More items into a store; those whose ids it has are replaced."""
    store = open_store(options.folder)
    return _added(options, _embedder_of(store, options), store)


def _added(options: Options, embedder: Embedder, store: Store) -> Outcome:
    items, skipped, added = read_items(options.items, options.root), [], 0
    with tqdm(unit="item", disable=options.quiet) as bar:
        while part := list(islice(items, 64 * options.batch_size)):
            kept, vectors, bad = embed_items(embedder, part, options.batch_size, dim=store.dim)
            added += len(kept)
            if kept:
                rows = [item.id for item in kept], vectors, [item.metadata for item in kept]
                store.add(*rows, embedder.identity(store.dim), replace=True)
            skipped += bad
            bar.update(len(part))
            check_skipped(skipped, options.limit, options.items)
    check_any(added > 0, skipped, options.items)
    write_store(store, options.folder)
    result = _described(store, options.folder) | {"skipped": [asdict(item) for item in skipped]}
    told = "".join(f"\nskipped {item.id}: {item.reason}" for item in skipped)
    return Outcome(f"{options.folder}: {len(store)} items{told}", result)


def _described(store: Store, folder: Path) -> dict[str, Any]:
    about = {"folder": str(folder), "items": len(store), "dim": store.dim, "precision": store.precision}
    return about | {"identity": store.identity} | ({"bytes": store.nbytes} if isinstance(store, Index) else {})


def index_delete(options: Options) -> Outcome:
    """Items out of a store, by their ids."""
    store = open_store(options.folder)
    gone = store.delete(options.ids)
    write_store(store, options.folder)
    return Outcome(f"{options.folder}: {gone} of {len(options.ids)} deleted, {len(store)} left", {"deleted": gone})


def index_info(options: Options) -> Outcome:
    """What a store holds, and of which model."""
    about = _described(open_store(options.folder), options.folder)
    return Outcome("\n".join(f"{name}: {value}" for name, value in about.items()), about)


def _embedder_of(store: Store, options: Options) -> Embedder:
    """The embedder that a person names, or the one that the store was made with."""
    name = options.model or (store.identity or {}).get("name")
    if not name:
        raise ValueError(f"{options.folder} does not record its model; give --model")
    return Embedder(name)


def search(options: Options) -> Outcome:
    """The best items of a store for a query, ordered again by a reranker if one is named."""
    query, store = _query(options), open_store(options.folder)
    embedder = _embedder_of(store, options)
    check_identity(store.identity, embedder.identity(store.dim))
    k = max(options.k, options.candidates) if options.reranker else options.k
    [hits] = store.search(embedder.encode([query], dim=store.dim), k, options.rescore)
    rows = [asdict(hit) for hit in hits]
    if options.reranker:
        documents = [{name: hit.metadata[name] for name in MODALITIES if name in hit.metadata} for hit in hits]
        scores = Reranker(options.reranker).score(query, documents, options.instruction, options.batch_size)
        rows = [row | {"relevance": float(score)} for row, score in zip(rows, scores, strict=True)]
        rows = sorted(rows, key=lambda row: -row["relevance"])[: options.k]
    lines = []
    for row in rows:
        judged = f"{row['relevance']:.3f}  " if options.reranker else ""
        lines.append(f"{judged}{row['score']:.3f}  {row['id']}")
    return Outcome("\n".join(lines), rows)


def rerank(options: Options) -> Outcome:
    items, query = list(read_items(options.items, options.root)), _query(options)
    check_any(bool(items), [], options.items)
    if bad := [item for item in items if isinstance(item, Skipped)]:
        raise ValueError(f"{options.items}, {bad[0].id}: {bad[0].reason}")
    ranked = Reranker(options.model).rank(
        query, [item.instance for item in items], top_k=options.k, batch_size=options.batch_size
    )
    rows = [{"id": items[r["corpus_id"]].id, "score": r["score"]} for r in ranked]
    return Outcome("\n".join(f"{row['score']:.3f}  {row['id']}" for row in rows), rows)


def _query(options: Options) -> dict[str, Any]:
    query = {name: getattr(options, name) for name in ("text", "image", "video", "instruction")}
    query = {name: value for name, value in query.items() if value}
    if not set(query) - {"instruction"}:
        raise ValueError("no query; give a text, --image or --video")
    return query


def export_model(options: Options) -> Outcome:
    folder = export(
        options.model,
        options.out,
        merged=not options.adapter,
        dtype=options.dtype,
        results=options.results,
        name=options.name or options.push,
        role=options.role,
        base=options.base,
    )
    address = push(folder, options.push, private=not options.public) if options.push else None
    return Outcome(f"{folder}" + (f"\n{address}" if address else ""), {"folder": str(folder), "address": address})


def plan_stages(options: Options) -> Outcome:
    if options.pairs:
        return _plan_finetune(options)
    preset = load_preset(options.preset)
    preset = override(replace(preset, backbone=options.backbone or preset.backbone), options.set or [])
    checkpointing = options.checkpointing or preset.checkpointing
    plans = plan(preset, *_gpus(options), options.utilisation, checkpointing)
    return Outcome(plan_table(plans), [asdict(p) for p in plans])


def _gpus(options: Options) -> tuple[Gpu, int]:
    """--gpus 8xH100, or --gpus T4, or --gpus 8 --gpu H100."""
    count, _, kind = (f"1x{options.gpus}" if options.gpus in GPUS else options.gpus).partition("x")
    kind = kind or options.gpu
    if not count.isdecimal() or int(count) < 1 or kind not in GPUS:
        raise ValueError(f"--gpus {options.gpus}: give a number, or as 8xH100 one of {', '.join(GPUS)} too")
    return GPUS[kind], int(count)


def _plan_finetune(options: Options) -> Outcome:
    """Of fine-tuning on a person's pairs, which are read and split as finetune() would."""
    preset = finetune_preset(options.backbone or load_preset("colab").backbone, changes=options.set or [])
    named = {"columns": _named(options.column), "kinds": _named(options.kind), "root": options.root}
    with TemporaryDirectory() as media:
        found = survey(
            options.pairs,
            media=media,
            budget=media_budget(preset.data),
            may_skip=options.may_skip,
            seed=preset.seed,
            progress=not options.quiet,
            **named,
        )
        plans = plan_finetune(found.splits["train"], preset, _gpus(options)[0], options.epochs, options.utilisation)
    return Outcome(plan_table(plans), [asdict(p) for p in plans])


def examine(options: Options) -> Outcome:
    checks = doctor()
    return Outcome(doctor_table(checks), [asdict(c) for c in checks], int(any(c.state == "missing" for c in checks)))
