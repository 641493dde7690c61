"""`tensorllm report`."""

from tensorllm.requests.others import ReportRequest
from tensorllm_cli.show import print_json, print_lines, progress_bar
from tensorllm_cli.signature import takes


@takes(ReportRequest)
def report(request: ReportRequest, *, json: bool) -> None:
    """Show runs as one web page: what was changed, what is left, and what came of it.

    Several runs of one model make one story; several models stand side by side.

    Examples:

      tensorllm report out/ runs/fever

      tensorllm report laser/ tucker/ hybrid/ runs/* --out comparison.html
    """
    with progress_bar("drawing"):
        from tensorllm.commands.report import report

        made = report(request.runs, request.out, cards=request.card)
    if json:
        print_json(made.to_json())
        return
    plots = f", and {len(made.plots)} plots in {made.plots[0].parent}" if made.plots else ""
    print_lines(f"written: {made.page}{plots}")
    for path in made.cards:
        print_lines(f"extended: {path}")
