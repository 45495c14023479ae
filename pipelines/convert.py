"""`amalgam convert` with its progress bar."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..errors import UserError
from ..model.config import Weights
from ..model.convert import Converted
from ..model.convert import convert as convert_checkpoint
from ..model.gguf import convert_gguf
from ..model.write import Format


def convert(source: str, target: Path, format: Format, dtype: Weights) -> Converted:
    """As `amalgam.model.convert.convert`; the bar counts bytes written and goes to stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{format} {dtype}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return convert_checkpoint(source, target, format, dtype, progress=show)


def gguf(file: Path, target: Path, format: Format, dtype: Weights) -> None:
    """A GGUF file to a checkpoint in transformers' names and bf16. UserError for another format or dtype."""
    if (format, dtype) != ("transformers", "bf16"):
        raise UserError(f"{file}: a GGUF file is converted with --format transformers --dtype bf16")
    convert_gguf(file, target)
