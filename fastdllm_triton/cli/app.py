"""The command line: which commands there are, and how it answers errors. What each of them does is in a module of its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .bench import bench
from .chat import chat
from .compile_report import compile_report
from .console import USER_ERRORS, errors, keep_printing, say, tell, wants_traceback, warn
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .inspect import inspect
from .lm_eval import lm_eval
from .names import as_typed, option_names, renamed
from .options import examples
from .performance_report import performance_report
from .profile import profile
from .roofline import roofline
from .verify import verify

#: typer has these from click, or from its copy of it.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """Every command, and one way to end: a result, or one line on standard error and a status.

    The status is 2 for what a user can fix, 130 after Ctrl-C, and 1 with a traceback for anything else, which is a bug.
    """

    def main(self, args: Sequence[str] | None = None, *other: Any, **options: Any) -> Any:
        """Runs a command line and ends the process."""
        keep_printing()
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        command = self.commands.get(words[0])
        checked = command is not None and words[0] != "lm-eval"  # whose arguments are those of the harness
        try:
            if checked:
                words[1:] = renamed(command, words[1:], warn)
            status = super().main(words, *other, **options | {"standalone_mode": False})
        except (_USAGE_ERROR, *USER_ERRORS) as error:
            if wants_traceback():
                raise
            message = getattr(error, "format_message", error.__str__)()
            message = re.sub(r"^Invalid value for '([^']+)'[^:]*: (?:Value error, )?", r"\1: ", message)  # as ours read
            tell(as_typed(message, option_names(command) if checked else {}) or type(error).__name__)
            status = 2
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; Ctrl-C that it does not handle itself ends with a word and status 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say(errors, "interrupted", style="red")
            raise typer.Exit(130) from None


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, context_settings={"help_option_names": ["--help", "-h"]})


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastdllm-triton {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        'generate --prompt "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?" --live',
        "chat --model ./LLaDA-8B-Instruct",
        "evaluate --problems 100 --strategies fixed:1,fixed:4,threshold:0.9 --out scores",
        "generate --help",
    )
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fast-dLLM decoding of masked-diffusion language models."""


_GENERATE, _SCORE, _PROVE, _COMPUTE = "Generate", "Score", "Check and measure", "Know without a GPU"

app.command(
    rich_help_panel=_GENERATE,
    epilog=examples(
        'generate --prompt "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?" --live',
        "generate --model ./LLaDA-8B-Instruct --chat --prompt-file prompts.txt --strategy threshold:0.9 --json",
        'generate --prompt "Ann has 20 books. Ann buys 30. Ann loses 12. How many?" --trace trace.html',
    ),
)(generate)
app.command(rich_help_panel=_GENERATE, epilog=examples("chat --model ./LLaDA-8B-Instruct --system 'Be brief.'"))(chat)
app.command(rich_help_panel=_GENERATE, epilog=examples("demo", "demo --problems 20 --problem-seed 3"))(demo)
app.command(
    rich_help_panel=_SCORE,
    epilog=examples(
        "evaluate --problems 1000 --strategies fixed:1,fixed:4,threshold:0.9 --caches none,dual --block-length 16 --out scores",
        "evaluate --model ./LLaDA-8B-Instruct --data mine.jsonl --chat --out scores",
    ),
)(evaluate)
app.command(rich_help_panel=_SCORE, epilog=examples("inspect --caches prefix,dual,dual+refresh_every=4 --out inspected"))(inspect)
# Every argument is the harness's, --help too.
app.command(
    "lm-eval",
    rich_help_panel=_SCORE,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(lm_eval)
app.command(
    rich_help_panel=_PROVE,
    epilog=examples("info", "info --model ./LLaDA-8B-Instruct --prompt-length 1000 --gen-length 1024 --batch-size 8"),
)(info)
app.command(
    rich_help_panel=_PROVE,
    epilog=examples('profile --prompt "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?" --cache dual'),
)(profile)
app.command(rich_help_panel=_PROVE, epilog=examples("verify --quick", "verify --op swiglu --out verified.json"))(verify)
app.command(rich_help_panel=_PROVE, epilog=examples("bench --html bench.html", "bench ops --op swiglu --out results"))(bench)
app.command(
    rich_help_panel=_COMPUTE,
    epilog=examples("roofline --model llada-8b --gpu h200 --prompt-length 1000 --gen-length 256 --tokens-per-forward 3.25"),
)(roofline)
app.command("compile-report", rich_help_panel=_COMPUTE, epilog=examples("compile-report --arch sm_90 --op swiglu"))(
    compile_report
)
app.command(
    "performance-report", rich_help_panel=_COMPUTE, epilog=examples("performance-report --arch sm_90 --op window_attention")
)(performance_report)
