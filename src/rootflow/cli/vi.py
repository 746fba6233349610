"""``rootflow vi``: fit a flow to an unnormalised density, judge the fit, write its draws."""

import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import rootflow
from rootflow import inference
from rootflow.cli import given
from rootflow.cli import run as runs
from rootflow.cli.common import Interrupted, WrongUse, machine, nats, print_grid, print_json, say
from rootflow.cli.progress import watching
from rootflow.cli.settings import as_words, merge_budget, parse
from rootflow.data import write_table
from rootflow.errors import RootflowError
from rootflow.inference import Posterior, Target, TargetError, VIConfig
from rootflow.store import write_json

__all__ = ["vi"]


def vi(
    target: Annotated[
        str | None,
        typer.Argument(help="A built-in name, or MODULE:NAME of a Target or of a function."),
    ] = None,
    flow: Annotated[str, typer.Option(help="Which flow; see `rootflow flows`.")] = "nsf-coupling",
    out: given.Out = None,
    n: Annotated[int, typer.Option("-n", "--draws", min=1, help="Draws to write.")] = 4000,
    resample: Annotated[
        bool, typer.Option("--resample", help="Correct the draws by importance resampling.")
    ] = False,
    form: Annotated[str, typer.Option("--format", help="parquet, csv, npy or npz.")] = "parquet",
    minutes: Annotated[
        float | None, typer.Option(help="Budget of time.  [default: 3, without --steps]")
    ] = None,
    steps: given.Steps = None,
    settings: given.Set = None,
    seed: given.OwnSeed = None,
    list_targets: Annotated[bool, typer.Option("--list", help="List the built-in names.")] = False,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Approximate an unnormalised density by a flow: draws, evidence, and whether to trust them.

    Ctrl-C ends the fit and keeps its best state so far.
    """
    if list_targets:
        _list(as_json)
        return
    if target is None:
        raise WrongUse("TARGET is missing; give a built-in name (see --list) or MODULE:NAME")
    if form not in ("parquet", "csv", "npy", "npz"):
        raise WrongUse(f"--format {form}: choose parquet, csv, npy or npz")
    where = machine(device, threads)
    options, chosen = parse(flow, settings or [], VIConfig)
    config = merge_budget(VIConfig, chosen, minutes, steps, seed, default_minutes=3.0)
    density = find_target(target)
    run = out or runs.default_path(target.replace(":", "-"), flow)
    words = ["vi", target, "--flow", flow, "-n", str(n), *["--resample"] * resample]
    words += as_words({**options, **config.model_dump(exclude_defaults=True)})
    runs.begin(run, runs.plan_of(words, config), resumes=False)
    with watching(run, config, quiet) as (on_record, should_stop, signals):
        try:
            posterior = inference.fit(
                density, flow, config=config, options=options, device=where,
                on_record=on_record, should_stop=should_stop,
            )  # fmt: skip
        except ValueError as error:
            _withdraw(run)
            raise WrongUse(str(error)) from error
        except TargetError as error:
            if error.posterior is None:
                _withdraw(run)
                raise
            error.posterior.save(run)
            raise RootflowError(f"{error}; the best state so far is kept in {run}") from error
    posterior.save(run)
    if signals.received is not None:
        done = posterior.trace.steps if posterior.trace is not None else 0
        raise Interrupted(
            signals.received,
            f"interrupted after step {done:,}; the best state so far is kept in {run}",
        )
    result = _finish(run, posterior, target, flow, n, resample, form, str(where), quiet)
    if as_json:
        print_json({**result, "run": str(run)})
    else:
        _show(result, run)


def _withdraw(run: Path) -> None:
    """Leave nothing of a run that never began, so that the command can be given again."""
    for path in run.iterdir():
        path.unlink()
    run.rmdir()


def find_target(name: str) -> Target:
    """The built-in target of that name, or what ``module:attribute`` names. Raises WrongUse.

    A function without arguments that returns a Target is called; one that takes the parameters
    says with attributes ``features``, ``support`` and ``names`` what it is a function of.
    """
    if ":" not in name:
        if name not in inference.TARGETS:
            raise WrongUse(
                f"{name}: no built-in target; they are {', '.join(inference.TARGETS)}; "
                "or give MODULE:NAME"
            )
        return inference.target(name)
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        stem = Path(module_name).stem
        raise WrongUse(f"{name}: give {stem}:{attribute}, from the directory of the file")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise RootflowError(f"{name}: importing {module_name} failed: {error}") from error
        raise WrongUse(
            f"{name}: there is no module {module_name} on the path or in {here}"
        ) from None
    except Exception as error:
        raise RootflowError(
            f"{name}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    value = getattr(module, attribute, None)
    if value is None:
        raise WrongUse(f"{name}: module {module_name} has no {attribute}")
    return _as_target(name, value)


def _as_target(name: str, value: Any) -> Target:
    if isinstance(value, Target):
        return value
    if not callable(value):
        raise WrongUse(f"{name} is {type(value).__name__}; give a Target or a function")
    words = {k: getattr(value, k) for k in ("features", "support", "names") if hasattr(value, k)}
    if words:
        try:
            return Target(value, name=name, **words)
        except (TypeError, ValueError) as error:
            raise WrongUse(f"{name}: {error}") from error
    try:
        made = value()
    except TypeError as error:
        raise WrongUse(
            f"{name}: calling it without arguments failed ({error}); give a function that returns "
            "a Target, or set its attribute features (and support, names)"
        ) from error
    except Exception as error:
        raise RootflowError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Target):
        raise WrongUse(f"{name}() returned {type(made).__name__}; it must return a Target")
    return made


def _finish(
    run: Path, posterior: Posterior, target: str, flow: str, n: int, resample: bool, form: str,
    device: str, quiet: bool,
) -> dict[str, Any]:
    """Judge the fit, write draws and result.json; the content of the latter."""
    if not quiet:
        say(f"judging the fit by {posterior.size:,} fresh draws")
    begin = time.monotonic()
    summary = posterior.summary()
    built_in = target in inference.TARGETS
    comparison = posterior.compare(inference.reference(target)) if built_in else None
    found = posterior.verdict(comparison)
    draws = posterior.sample(n, resample=resample, seed=posterior.seed + 1)
    columns = posterior.target.columns
    path = run / f"draws.{form}"
    write_table(draws, columns, ["float64"] * len(columns), path)
    trace = posterior.trace
    assert trace is not None
    result = {
        "target": target,
        "flow": flow,
        "features": posterior.target.features,
        "columns": list(columns),
        "flow_parameters": sum(p.numel() for p in posterior.flow.parameters()),
        **{k: v for k, v in summary.items() if k not in ("target", "seed")},
        "verdict": found.level,
        "verdict_line": found.line,
        "comparison": None if comparison is None else comparison.to_dict(),
        "objective": posterior.config.objective,
        **{k: v for k, v in trace.summary().items() if k != "draws"},
        "seconds": round(trace.seconds, 3),
        "judging_seconds": round(time.monotonic() - begin, 3),
        "written_draws": n,
        "resampled": resample,
        "draws_file": str(path),
        "seed": posterior.config.seed,
        "device": device,
        "torch_threads": torch.get_num_threads(),
        "version": rootflow.__version__,
    }
    write_json(run / "result.json", result)
    return result


def _show(result: Mapping[str, Any], run: Path) -> None:
    rows = [
        [name, *(f"{value[k]:.4g}" if value[k] is not None else "–" for k in value)]
        for name, value in result["parameters"].items()
    ]
    print_grid(rows, ["parameter", "mean", "sd", "weighted mean", "weighted sd"])
    khat = result["khat"]
    print_grid([
        ["ELBO", f"{nats(result['elbo'], result['elbo_se'])} nats"],
        ["log evidence", f"{nats(result['log_evidence'], result['log_evidence_se'])} nats"],
        ["k-hat", f"{'–' if khat is None else format(khat, '.2f')} at {result['draws']:,} draws"],
        ["effective draws", f"{result['ess']:,.0f} of {result['draws']:,}"],
        ["fit", f"{result['steps']:,} steps in {result['seconds']:.4g} s, "
                f"ended by {result['stopped']}; {result['skipped']:,} steps skipped, "
                f"{result['bad_draws']:,} draws left out"],
        ["draws", result["draws_file"]],
        ["verdict", result["verdict_line"]],
    ])  # fmt: skip


def _list(as_json: bool) -> None:
    targets = [(name, inference.target(name)) for name in inference.TARGETS]
    if as_json:
        print_json({"targets": [
            {"name": name, "summary": getattr(it, "summary", ""), "features": it.features,
             "columns": list(it.columns)}
            for name, it in targets
        ]})  # fmt: skip
        return
    print_grid([[name, str(it.features), getattr(it, "summary", "")] for name, it in targets])
