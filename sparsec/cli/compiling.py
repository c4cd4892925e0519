"""`sparsec compile`: the main job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.terminal import (
    Calib,
    CalibrationSamples,
    Json,
    MaxLength,
    TextColumns,
    Threads,
    folder_bytes,
    print_json,
    progress,
    reporting,
    set_threads,
    starting,
)
from sparsec.errors import UsageError


def compile(
    model: Annotated[
        str | None, typer.Argument(help="HF folder or hub id, module:function, program, .pt2, .onnx, demo:minilm")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Pattern of every eligible site, such as 64:2:5 or 2:4.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; default: MODEL's name + .sparsec")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Choose V and M site by site: the whole model so many times faster here.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="SELECTOR=PATTERN for some sites: 're:fc1=64:2:8'. Repeatable.")
    ] = None,
    also: Annotated[
        str | None, typer.Option(help="N:M that all patterns shall follow too: 2:4 makes 64:2:5 64:2:5+2:4.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Selector of sites that stay dense. Repeatable.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights in place of MODEL's: a masked state dict (.pth), or .safetensors.")
    ] = None,
    include_pooler: Annotated[bool, typer.Option("--include-pooler", help="Make poolers sparse too.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe YAML, or an artifact's manifest.json; llm-compressor's YAML too.")
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="Pass text; default: oneshot with calibration data, else mask | freeze.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="How kept weights make up for others: alps (default), sparsegpt, refit, none.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Importance: magnitude, wanda, ria, obs, taylor, fisher, seven.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Column choice of V:N:M: l1, l2, greedy, exact.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Train under the pattern: admm, fixed-mask, ... (see sparsec passes), or 'admm{rho=1e-3}'."),
    ] = None,
    train: Annotated[str | None, typer.Option(help="DATA to train on: labels and text, ids or pictures.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="DATA to judge by the task's metrics, dense and sparse.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="sequence-classification, image-classification, regression, causal-lm: a new head where the model "
            "has none; or none. Default: what data and model say."
        ),
    ] = None,
    bias: Annotated[
        str | None,
        typer.Option(help="What losses poe, reweight, confreg work against: columns of --train (default), or overlap."),
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the label. Default: label, score, ...")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of --method; default 3, admm 10.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of --method, the highest learning rate; default 5e-5.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of --method; default 16.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="MODEL whose outputs are learnt too; 'dense': MODEL itself as it was.")
    ] = None,
    permute: Annotated[
        str | None,
        typer.Option(help="Permute channels so that patterns keep more: auto, graph, kernel, both; default none."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Comma-separated: kernel, onnx, hf, tensorrt, torch24. Default: kernel.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Load a Hugging Face model as fp32, bf16 or fp16.")] = None,
    values: Annotated[str | None, typer.Option(help="Stored sparse weights: fp32, bf16, int8.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens that layers will see, such as 1-512: slower kernels are not used.")
    ] = None,
    drop_slow: Annotated[
        bool, typer.Option("--drop-slow", help="Leave sites dense that would run no faster sparse.")
    ] = False,
    onnx_weights: Annotated[
        str | None, typer.Option(help="packed (default): small, run sparse by sparsec.ort; dense: zeros in place.")
    ] = None,
    calib: Calib = None,
    num_calibration_samples: CalibrationSamples = None,
    max_seq_length: MaxLength = None,
    text_columns: TextColumns = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default 0.")] = None,
    threads: Threads = None,
    min_quality: Annotated[float | None, typer.Option(help="Fail below this cosine with the dense original.")] = None,
    allow_dense: Annotated[bool, typer.Option("--allow-dense", help="Accept sites without pattern.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if sparsec wrote it.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted compile.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a .pt2 file, which can run code.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="File for a line of JSON every few steps; a folder: for TensorBoard too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Make a model sparse, write an artifact, prove it and measure it."""
    # Threads that wait busily for each other are many times slower when another program has one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with reporting(as_json):
        with starting(as_json):
            from sparsec import api
            from sparsec.methods import Training, training_passes
            from sparsec.shorthand import recipe_of
            from sparsec.training.distributed import rank_in_environment

        made = recipe_of(
            model, pattern, layer, ignore, include_pooler, recipe, passes, score, columns, backend, seed, values,
            tokens, drop_slow, onnx_weights, dtype=dtype, calib=calib, num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length, text_columns=text_columns, target_speedup=target_speedup,
            solver=solver, also=also, train=train, evaluation=evaluation, label_column=label_column, task=task,
            training=Training(method, epochs, lr, batch_size, teacher), permute=permute, bias=bias, weights=weights,
        )  # fmt: skip
        folder = out or Path(Path(made.model.replace(":", "-")).name + ".sparsec")
        if dry_run:
            from sparsec.plan import plan

            sys.stdout.write(made.model_dump_json(indent=1) + "\n" if as_json else plan(made, folder) + made.to_yaml())
            return None
        if log and not training_passes(made.passes):
            raise UsageError(f"--log {log}: no pass trains; add --method and --train, or leave it out")
        set_threads(threads)
        other = bool(rank_in_environment())  # of several processes the first one speaks
        with progress(as_json or other) as show_progress:
            options = api.Options(force, trust, min_quality, allow_dense, resume=resume, progress=show_progress)
            artifact = api.compile_recipe(made, folder, options, resources={"log": log} if log else None)
        if other:
            return None
        if as_json:
            return print_json({"path": str(folder), **artifact.manifest})
        from sparsec import show

        show.manifest(artifact.manifest, folder_bytes(folder))
        show.wrote(folder)
