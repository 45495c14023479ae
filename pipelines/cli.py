"""The command line. It imports nothing heavy: what a command needs is loaded when the command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes; any other failure is a bug and shows its traceback

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

rewards = typer.Typer(no_args_is_help=True, help="Try rewards on answers.")
app.add_typer(rewards, name="rewards")

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (quickstart, tiny-base), or a YAML file.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, e.g. **--set stages.grpo-strings.steps=5**. The value is YAML. Repeatable; "
        "the last one wins. **stages.grpo-{domain}.steps=5** sets it for the stages of all domains.",
        show_default=False,
    ),
]
RunsOption = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", help="Where runs are kept; this one in DIR/NAME.", file_okay=False),
]

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, or a preset's name.", show_default=False)
]
ModeOption = Annotated[str, typer.Option("--mode", help="chat: answers at once; high, max: reasons first.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
LengthOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the sampling: the same seed, the same answers.")]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="KEY=VALUE,...",
        help="A recipe's **precision**: compute=float32 or bfloat16 and, to compute as a quantization-aware training "
        "of DeepSeek-V4 did, any of experts=fp4, linear=fp8, indexer=fp4, kv=fp8, with commas between.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"amalgam {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Raise domain experts with SFT and GRPO, and merge them into one model by on-policy distillation.

    **amalgam run quickstart** does all of it with a tiny model on a laptop, in about ten minutes.
    """


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    runs: RunsOption = Path("runs"),
    show: Annotated[
        bool,
        typer.Option("--print", metavar="", help="Print the recipe with every default and override in it, and end."),
    ] = False,
) -> None:
    """Run a recipe: train its stages, evaluate every model, write the report.

    Finished stages are skipped and a stage that was cut off goes on from its last saved step, so after an
    interruption (Ctrl-C, a crash, a reboot) the same command continues the run.

    **amalgam run quickstart --set seed=1 --set name=quickstart-1**
    """
    with _exit_codes():
        from .recipe import load_recipe, resolved_yaml

        loaded = load_recipe(recipe, overrides)
        if show:
            typer.echo(resolved_yaml(loaded), nl=False)
            return
        from .run import run_recipe

        typer.echo(f"report: {run_recipe(loaded, runs)}")


@app.command()
def submit(
    recipe: RecipeArgument,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="The cluster's dashboard, e.g. http://HOST:8265.")
    ],
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    runs: RunsOption = Path("runs"),
) -> None:
    """Run a recipe on an existing Ray cluster and follow its log.

    The recipe is checked here first. DIR has to be a folder that the cluster's machines share. Ctrl-C stops
    the log, not the run. The command ends with the run's own exit code.
    """
    with _exit_codes():
        from .submit import submit as submit_recipe

        raise typer.Exit(submit_recipe(recipe, overrides, address, runs))


@app.command()
def chat(
    checkpoint: CheckpointArgument,
    mode: ModeOption = "chat",
    temperature: TemperatureOption = 1.0,
    max_new_tokens: LengthOption = 1024,
    seed: SeedOption = 0,
    precision: PrecisionOption = "",
) -> None:
    """Talk to a checkpoint.

    Answers appear as they are sampled, and after each its tokens per second and what is wrong with it, if anything.
    Reasoning and tool calls are dim; no tool is run. Ctrl-C ends an answer, Ctrl-D the session; **/mode high** changes
    the mode, **/new** begins anew.
    """
    with _exit_codes():
        from .chat import chat as start

        start(checkpoint, mode, temperature, max_new_tokens, seed, precision)


@app.command()
def generate(
    checkpoint: CheckpointArgument,
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help='JSONL: rows {"prompt": TEXT} or {"messages": [...]}.'),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="JSONL: the same rows, with response, finish and tokens."),
    ],
    mode: ModeOption = "chat",
    temperature: TemperatureOption = 1.0,
    max_new_tokens: LengthOption = 1024,
    seed: SeedOption = 0,
    precision: PrecisionOption = "",
) -> None:
    """Answer a file of prompts.

    Every row is checked before the first is answered. After an interruption the same command goes on with the first row
    that the output lacks; other settings than those in its FILE.settings.json, or other prompts, are refused.
    """
    with _exit_codes():
        from .generate import generate as start

        start(checkpoint, prompts, out, mode, temperature, max_new_tokens, seed, precision)


@app.command()
def serve(
    checkpoint: CheckpointArgument,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; the default is for this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="A file with the token; else it is that of AMALGAM_SERVE_TOKEN, or made and printed.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="That of chats without a reasoning_effort.")] = "chat",
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="More requests that wait for their first token get a 429.")
    ] = 1024,
    request_seconds: Annotated[
        int, typer.Option("--request-seconds", min=1, help="Longest time that a request may take.")
    ] = 600,
    precision: PrecisionOption = "",
) -> None:
    """Serve a checkpoint over HTTP, in OpenAI's protocol.

    Chats and completions, streamed or whole, with tools, log-probs and seeds, for evaluation harnesses and agents.
    Every request needs the token. Ctrl-C or SIGTERM lets the open ones end first. docs/serve.md says what is built.
    """
    with _exit_codes():
        from .serve import serve as start

        start(checkpoint, host, port, token_file, mode, max_waiting, request_seconds, precision)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A checkpoint's folder in either format, a preset, or a GGUF file.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that is new or empty.", show_default=False)],
    format: Annotated[
        Literal["transformers", "official"],
        typer.Option("--format", help="The tensors' names: transformers', or those of DeepSeek's own files."),
    ],
    dtype: Annotated[
        Literal["bf16", "fp8", "fp4"],
        typer.Option(
            "--dtype", help="How matrices are stored; **fp4** is for routed experts, the others are FP8 then."
        ),
    ],
) -> None:
    """Convert a DeepSeek-V4 checkpoint, on disk and in little memory.

    What is already stored as asked is carried bit for bit; the rest is cast, dequantized or quantized. Every shard
    is read again and compared. After an interruption the same command goes on with the shards that are missing.

    **amalgam convert DeepSeek-V4-Flash flash-bf16 --format transformers --dtype bf16**

    With the same options, a GGUF file of any model that transformers reads becomes a checkpoint's folder.
    """
    with _exit_codes():
        from .convert import convert as convert_checkpoint
        from .convert import gguf

        if source.endswith(".gguf"):
            gguf(Path(source), target, format, dtype)
            typer.echo(f"{target}: converted")
            return

        done = convert_checkpoint(source, target, format, dtype)
        kept = f", {done.kept} of them from before" if done.kept else ""
        typer.echo(f"{done.folder}: {done.shards} shards{kept}, {done.nbytes / 1e9:.2f} GB, verified")


@rewards.command("try")
def try_rewards(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward, or **module:function**.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL or Parquet: problems with their responses.")],
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the reward.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
    fields: Annotated[
        list[str], typer.Option("--field", metavar="OURS=THEIRS", help="A field's name in FILE.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Grade a file of answers by one reward and explain each score.

    A row has a **question**, its **response**, and what the reward grades by: an **answer**, **tests** ... **mode**,
    **ended** and **tokens** may say more. docs/rewards.md lists the rewards.

    **amalgam rewards try math answers.jsonl --field answer=solution**
    """
    with _exit_codes():
        from .try_rewards import try_rewards as start

        start(name, file, settings, fields)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Bad input: its lines on stderr, exit code 2. Ctrl-C: exit code 130 (the run says where it stopped)."""
    try:
        yield
    except UserError as error:
        prefix = typer.style("error:", fg="red", bold=True)
        for line in str(error).splitlines():
            typer.echo(f"{prefix} {line}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """The console script."""
    app(prog_name="amalgam")


if __name__ == "__main__":
    main()
