"""The command line `hv-batch`. Each command parses its flags and calls the layers below."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from hv_batch import __version__
from hv_batch.cli.bench import app as bench_app
from hv_batch.cli.config import app as config_app
from hv_batch.cli.doctor import doctor
from hv_batch.cli.export import export
from hv_batch.cli.init import init
from hv_batch.cli.output_root.diff import diff
from hv_batch.cli.output_root.gc import gc
from hv_batch.cli.output_root.retry import retry
from hv_batch.cli.output_root.status import status
from hv_batch.cli.output_root.verify import verify
from hv_batch.cli.output_root.withdraw import withdraw
from hv_batch.cli.report import report
from hv_batch.cli.run import nightly, plan, resume, run
from hv_batch.cli.run_result import end_run
from hv_batch.cli.simulate import simulate
from hv_batch.cli.terminal import (
    UNREACHABLE_REMEDY,
    Json,
    LogFormat,
    LogLevel,
    command_logging,
    fail,
    log_settings,
    show_json,
    wants_json,
)
from hv_batch.cli.weights import app as weights_app
from hv_batch.job.redaction import safe_text
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import UserError

app = typer.Typer(
    help="Render HunyuanVideo datasets: a prompt manifest in, videos and metadata out, on Ray.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hv_batch {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """The options of `hv-batch` itself."""


app.add_typer(weights_app, name="weights")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")


@app.command()
def demo(
    output: Annotated[
        str, typer.Option(help="output root: folder or URL; an unfinished run there is resumed")
    ] = "hv_batch_demo",
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    as_json: Json = False,
) -> None:
    """Render the demo manifest with the real architecture at toy width, on a local Ray on the CPU."""
    from hv_batch.cli.demo import run_demo

    with command_logging(log_settings(log_level, log_format)):
        code = run_demo(output, as_json)
    end_run(output, code, as_json)


@app.command()
def toy(
    folder: Annotated[Path, typer.Argument(help="folder to write to")],
    as_json: Json = False,
) -> None:
    """Write the toy checkpoint in the layout of the released one, and print the value for model_base."""
    from hv_batch.toy.trained import write_trained_checkpoint

    model_base = write_trained_checkpoint(folder.absolute())
    if as_json:
        show_json("hv_batch/toy/1", {"model_base": str(model_base)})
    else:
        print(model_base)


@app.command(
    add_help_option=False,  # `sample` parses the flags of the released command line, and --help, itself
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def sample(context: typer.Context) -> None:
    """Render one prompt without Ray; takes the flags of the released sample_video.py (--help lists them)."""
    from hv_batch.cli.sample.command import main as render_sample

    raise typer.Exit(render_sample(context.args))


for command in (run, resume, nightly, plan, simulate, report, init, doctor, export):
    app.command()(command)
for operation in (status, verify, retry, gc, diff, withdraw):
    app.command()(operation)


def main() -> None:
    """Run the command of `sys.argv`. Errors that the user can fix are one paragraph on stderr, without a traceback.

    With --json every error is one JSON object on stdout instead, also a wrong flag.
    """
    as_json = wants_json()
    try:
        with command_logging(log_settings(None, "text")):
            sys.exit(app(standalone_mode=not as_json) or 0)
    except UserError as error:
        fail(str(error), as_json)
    except StorageUnavailableError as error:
        fail(f"{str(error).rstrip('.')}. {UNREACHABLE_REMEDY}", as_json)
    except OSError as error:
        fail(f"{error}.", as_json)
    except Exception as error:  # noqa: BLE001  # a fault of this package; Python would print its secrets as well
        if describe := getattr(error, "format_message", None):  # click's error about a wrong flag or a missing argument
            fail(describe(), as_json, getattr(error, "exit_code", 2))
        if not as_json:
            sys.exit(safe_text(traceback.format_exc()))
        print(safe_text(traceback.format_exc()), file=sys.stderr)
        fail(f"{type(error).__name__}: {error}", as_json)
